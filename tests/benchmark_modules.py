"""Modules of benchmarks/, which is no package: its scripts import each other by name."""

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

import check as check  # noqa: E402
import checkpoints as checkpoints  # noqa: E402
import codec_forms as codec_forms  # noqa: E402
import codec_peers as codec_peers  # noqa: E402
import entropy as entropy  # noqa: E402
import host as host  # noqa: E402
import model as model  # noqa: E402
import namespaces as namespaces  # noqa: E402
import publish_to_served as publish_to_served  # noqa: E402
import scale_report as scale_report  # noqa: E402
import steps as steps  # noqa: E402
