"""One end of what people do without refleet, over one link: rank 0 has the checkpoint, rank 1 wants it.

    raw    the file's bytes through a TCP socket into memory that is there already: what the link can do
    copy   the file through a TCP socket into a file at the other end, `load_file`, `load_state_dict`
    gloo   a broadcast of the full state dict, tensor by tensor

Rank 0 prints {"raw": [seconds...], ...}.
"""

from __future__ import annotations

import socket
import sys
import tempfile
from pathlib import Path

import gloo
import torch.distributed as dist
from safetensors.torch import load_file


def connect(host: str, port: int, rank: int) -> socket.socket:
    """The socket between the two, after the group is there: rank 0 listens."""
    if rank == 0:
        with socket.create_server((host, port)) as server:
            dist.barrier()
            link, _ = server.accept()
    else:
        dist.barrier()
        link = socket.create_connection((host, port))
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return link


def receive(link: socket.socket, memory: memoryview) -> None:
    at = 0
    while at < len(memory):
        got = link.recv_into(memory[at:])
        if not got:
            raise SystemExit("the other end went away")
        at += got


def main() -> int:
    options = gloo.arguments().parse_args()
    served = gloo.join(options)
    link = connect(options.host, options.port + 1, options.rank)
    size = options.checkpoint.stat().st_size  # rank 1 sees it too, but takes only its size from there
    memory = memoryview(bytearray(size))
    if options.rank == 0:
        memory[:] = options.checkpoint.read_bytes()

    def raw() -> None:
        if options.rank == 0:
            link.sendall(memory)
        else:
            receive(link, memory)

    with tempfile.TemporaryDirectory(dir=options.checkpoint.parent) as folder:

        def copy() -> None:
            if options.rank == 0:
                with options.checkpoint.open("rb") as file:
                    link.sendfile(file)
                return
            mine = Path(folder) / "copy.safetensors"
            piece = memoryview(bytearray(1 << 20))
            with mine.open("wb") as file:
                left = size
                while left:
                    part = piece[: min(left, len(piece))]
                    receive(link, part)
                    file.write(part)
                    left -= len(part)
            served.load_state_dict(load_file(mine))

        steps = {"raw": raw, "copy": copy, "gloo": lambda: gloo.broadcast(served)}
        seen = {name: gloo.timed(step, options.rounds) for name, step in steps.items()}
    link.close()
    return gloo.end(options, seen)


if __name__ == "__main__":
    sys.exit(main())
