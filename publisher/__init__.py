"""The publishing side.

From checkpoint to release
    checkpoint, shards, source_file, safetensors_header, state_dict   open what a trainer wrote
    compare        read it once, and tell what changed; adapters: low-rank ones that it was merged from
    broadcast      send and store what changed
    publish        the Publisher: commit, roll back; published: a release, and waiting for it
    payloads       deltas in the server, within a budget
    claim          the right to publish, and the log as this store knows it
    book           the publisher's records
    retention      which versions stay, and why

The fleet
    fleet          who serves what
    service        answers to workers, lease, upkeep, as long as a publisher lives
    wait, verify   until the fleet got there; re-hash every engine

The command line
    cli, session   `refleet`, shared flags, errors and exit codes
    commands, history_cli, keys_cli, serve, server   its commands
    inspect, screen, watch   what they show, how, and the watched folder
"""

from __future__ import annotations

from .publish import Publisher
from .published import Published

__all__ = ["Publisher", "Published"]
