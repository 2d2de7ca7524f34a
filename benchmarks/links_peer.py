"""One end of what people do without refleet, over one link: rank 0 has the checkpoint, rank 1 wants it.

    raw    the file's bytes through a TCP socket into memory that is there already: what the link can do
    copy   the file through a TCP socket into a file at the other end, `load_file`, `load_state_dict`
    gloo   a broadcast of the full state dict, tensor by tensor

Rank 0 prints {"raw": [seconds...], ...}: from a barrier to the barrier after the other end is done.
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from model import Served
from peers import timed
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
    parser = argparse.ArgumentParser()
    for name in ("rank", "port", "rounds", "layers", "width"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{options.host}:{options.port}",
        rank=options.rank,
        world_size=2,
        timeout=timedelta(seconds=300),
    )
    served = Served(options.layers, options.width)
    link = connect(options.host, options.port + 1, options.rank)
    size = options.checkpoint.stat().st_size  # rank 1 sees it too, but takes only its size from there
    memory = memoryview(bytearray(size))
    if options.rank == 0:
        memory[:] = options.checkpoint.read_bytes()
        served.load_state_dict(load_file(options.checkpoint))

    def raw() -> None:
        if options.rank == 0:
            link.sendall(memory)
        else:
            receive(link, memory)

    def gloo() -> None:
        for tensor in served.state_dict().values():
            dist.broadcast(tensor.view(torch.uint8), src=0)

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

        steps = {"raw": raw, "copy": copy, "gloo": gloo}
        seen = {name: timed(step, options.rounds) for name, step in steps.items()}
    if options.rank == 0:
        print(json.dumps(seen))
    link.close()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
