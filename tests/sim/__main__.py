"""`python tests/sim`: runs seeds of the simulator, or one of them with a trace."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from sim.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
