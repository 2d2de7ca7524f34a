"""What users do without refleet, measured in the same run: every process of one rank of a gloo group.

    gloo   rank 0 broadcasts the full state dict, tensor by tensor, to n processes
    load   n processes at once copy the safetensors file and `load_state_dict` it

Rank 0 prints {"gloo": [seconds...], "load": [seconds...]}.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import gloo
from safetensors.torch import load_file


def main() -> int:
    options = gloo.arguments().parse_args()
    served = gloo.join(options)
    with tempfile.TemporaryDirectory(dir=options.checkpoint.parent) as folder:

        def load() -> None:
            if options.rank:
                mine = shutil.copy(options.checkpoint, Path(folder) / f"rank-{options.rank}.safetensors")
                served.load_state_dict(load_file(mine))

        steps = {"gloo": lambda: gloo.broadcast(served), "load": load}
        seen = {name: gloo.timed(step, options.rounds) for name, step in steps.items()}
    return gloo.end(options, seen)


if __name__ == "__main__":
    sys.exit(main())
