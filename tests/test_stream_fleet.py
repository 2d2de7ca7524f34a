"""A whole fleet over more than one server: through the command lines, and while the replica goes away."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_runs import Cli
from refleet.common.messages import Evidence
from refleet.common.redis_stream import RedisStream
from refleet.common.types import BLOBS, STREAM
from refleet.publisher import Publisher
from refleet.worker.memory_engine import MemoryEngine
from refleet.worker.worker import Worker
from safetensors.torch import save_file
from servers import Server
from worker_runs import Runs
from world import checkpoint, holds

Until = Callable[..., None]
NewServer = Callable[..., Server]


@pytest.fixture
def three(new_server: NewServer, until: Until) -> tuple[Server, Server, Server]:
    """A primary, its replica, and a server for payloads."""
    primary = new_server()
    replica = new_server(settings={"replicaof": f"127.0.0.1 {primary.port}"})
    payloads = new_server()
    with replica.client() as client:
        until(lambda: client.info("replication")["master_link_status"] == "up", "the replica follows its primary")
    return primary, replica, payloads


def calls(server: Server, command: str) -> int:
    with server.client() as client:
        stats = client.info("commandstats")
    return int(stats.get(f"cmdstat_{command}", {"calls": 0})["calls"])


def keys_of_payloads(server: Server) -> list[bytes]:
    with server.client() as client:
        return [key for key in client.scan_iter() if re.search(rb":(chunks|blob:\d+)$", key)]


def test_the_flags_lead_log_payloads_and_acks_to_their_servers(
    three: tuple[Server, Server, Server], cli: Cli, runs: Runs, tmp_path: Path, until: Until
) -> None:
    primary, replica, payloads = three
    cli.environ["REFLEET_REDIS"] = primary.url
    runs.model = cli.model
    worker = runs.start("--read-from", replica.url, "--payload-redis", payloads.url, redis=primary.url)
    from_variables = runs.start(
        redis=primary.url, worker="w1",
        environ={"REFLEET_READ_FROM": replica.url, "REFLEET_PAYLOAD_REDIS": payloads.url},
    )  # fmt: skip
    for number in (1, 2):
        save_file(checkpoint(number), tmp_path / "step.safetensors")
        done = cli.ok(
            "publish", tmp_path / "step.safetensors", "--version", f"v{number}", "--payload-redis", payloads.url,
            "--wait", "--workers", 2,
        )  # fmt: skip
        assert done["payload_bytes"] > 0
    assert worker.serves("v2") and from_variables.serves("v2")
    written, read, beats = calls(payloads, "xadd"), calls(replica, "xread"), calls(primary, "sadd")
    assert written and read and beats
    assert keys_of_payloads(primary) == []
    assert worker.end() == 0 and from_variables.end() == 0


@pytest.mark.parametrize("carrier", [STREAM, BLOBS])
def test_workers_of_a_replica_catch_up_after_it_was_away_and_after_it_came_back_empty(
    three: tuple[Server, Server, Server], tmp_path: Path, until: Until, carrier: str
) -> None:
    primary, replica, _ = three
    publisher = Publisher(primary.url, carrier=carrier, model="m", store=tmp_path / "store")
    worker = Worker(
        primary.url, read_from=replica.url, model="m", engine=MemoryEngine(), state_dir=tmp_path / "w0",
        worker_id="w0", heartbeat_s=0.1, poll_s=0.1,
    )  # fmt: skip
    try:
        worker.start()
        publisher.publish(checkpoint(1), version="v1").wait(workers=1, timeout_s=30)
        assert holds(worker, checkpoint(1))
        replica.kill()
        late = publisher.publish(checkpoint(2), version="v2")
        until(lambda: worker.board.silent, "the worker notices that the replica is away")
        assert worker.gate.current is not None, "it serves on"
        replica.start(empty=True)
        late.wait(workers=1, timeout_s=30)
        assert holds(worker, checkpoint(2))
        assert late.release.payload is not None and late.release.payload.carrier == carrier
        publisher.publish(checkpoint(3), version="v3").wait(workers=1, timeout_s=30)
        assert holds(worker, checkpoint(3))
        acks = RedisStream(primary.url, "m")
        assert acks.last_acks("w0", 1) and acks.member("w0").status
        acks.close()
    finally:
        worker.stop()
        publisher.close()


def test_a_payload_server_that_lost_everything_costs_a_new_payload_and_nothing_else(
    three: tuple[Server, Server, Server], tmp_path: Path
) -> None:
    primary, _, payloads = three
    publisher = Publisher(primary.url, payload_redis=payloads.url, model="m", store=tmp_path / "store")
    workers = [
        Worker(
            primary.url, payload_redis=payloads.url, model="m", engine=MemoryEngine(), state_dir=tmp_path / name,
            worker_id=name, heartbeat_s=0.1, poll_s=0.1,
        )
        for name in ("w0", "w1")
    ]  # fmt: skip
    try:
        workers[0].start()
        published = publisher.publish(checkpoint(1), version="v1")
        published.wait(workers=1, timeout_s=30)
        payloads.kill()
        payloads.start(empty=True)
        workers[1].start()
        acks = published.wait(workers=2, timeout_s=30)
        assert {name: ack.evidence for name, ack in acks.items()} == dict.fromkeys(("w0", "w1"), Evidence.SERVING)
        assert holds(workers[1], checkpoint(1))
    finally:
        for worker in workers:
            worker.stop()
        publisher.close()
