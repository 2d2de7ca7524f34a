"""Real publisher and worker processes on both servers, and what breaks between them or in the server.

After each fault: one whole version is served, no ack lied, and the fleet converges with nobody's help.
The processes of a server serve all its tests: each begins where the one before ended, on a fleet that is well.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fault_scene import Scene
from refleet.common import redis_scripts
from servers import KINDS, Server, needed
from tcp_proxy import Fault, Link

Until = Callable[..., None]
APPEND = redis_scripts._sha1(redis_scripts.APPEND).encode()
PASSWORD = "s3cret"


@pytest.fixture(scope="module", params=KINDS)
def shared_scene(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    server = Server(needed(request.param), aof=True).start()
    scene = Scene(tmp_path_factory.mktemp("faults"), f"m-{uuid.uuid4().hex[:12]}", server)
    scene.start_publisher()
    scene.start_worker()
    yield scene
    scene.close()
    scene.server.stop()  # another one than at first after a failover


@pytest.fixture
def scene(shared_scene: Scene, until: Until) -> Scene:
    if shared_scene.newest == "v0":
        shared_scene.publish()
    shared_scene.settle(until)
    return shared_scene


LINKS = {
    "latency": Link(latency_s=0.03),
    "bandwidth": Link(bytes_per_s=60_000),
    "slices": Link(slice_bytes=97),
}


@pytest.mark.parametrize("how", LINKS)
def test_a_bad_link_only_takes_longer(scene: Scene, how: str, until: Until) -> None:
    scene.to_publisher.link = scene.to_worker.link = LINKS[how]
    before = scene.served
    scene.publish()
    until(lambda: scene.served == scene.newest != before, "it arrives over the bad link", timeout_s=60)
    scene.settle(until)


def test_flipped_bits_in_replies_are_never_served(scene: Scene, until: Until) -> None:
    """A worker's chunks, log entries and everything else that it is told, and the publisher's answers."""
    for proxy in (scene.to_publisher, scene.to_worker):
        for every in (3000, 200):
            before = proxy.corrupted
            proxy.link = Link(corrupt_every=every)
            scene.publish()
            until(lambda: proxy.corrupted > before + 10, "many replies were spoiled", timeout_s=60)  # noqa: B023
            scene.settle(until)


@pytest.mark.parametrize("fault", [Fault.RESET, Fault.CUT_REQUEST, Fault.TEAR_REPLY])
@pytest.mark.parametrize("match", [b"XADD", APPEND], ids=["chunk", "append"])
def test_a_publisher_that_is_cut_off_goes_on(scene: Scene, fault: Fault, match: bytes, until: Until) -> None:
    scene.to_publisher.break_next(fault, match, forwarded_bytes=3)
    scene.publish()
    until(scene.to_publisher.fired.is_set, "it was cut off")
    scene.settle(until)


def test_all_connections_are_reset_again_and_again(scene: Scene, until: Until) -> None:
    scene.to_worker.link = Link(bytes_per_s=1_000_000)
    scene.publish()
    for _ in range(5):
        until(lambda: scene.to_publisher.reset() + scene.to_worker.reset(), "there was something to reset")
        scene.check()
    scene.settle(until)


@pytest.mark.parametrize("who", ["worker", "publisher", "both"])
def test_a_partition_of_five_seconds(scene: Scene, who: str, until: Until) -> None:
    before = scene.served
    with scene.to_worker.partition() if who != "publisher" else scene.to_publisher.partition():
        scene.publish()
        if who == "both":
            with scene.to_publisher.partition():
                scene.last_for(5, until)
        else:
            scene.last_for(5, until)
        assert scene.served == before, "there was no way for the new version"
    scene.settle(until)


def restarted_with_its_data(server: Server, _older: Path) -> None:
    server.start()


def restarted_empty(server: Server, _older: Path) -> None:
    server.start(empty=True)


def restarted_from_older_data(server: Server, older: Path) -> None:
    shutil.rmtree(server._folder / "data")
    shutil.copytree(older, server._folder / "data")
    server.start()


@pytest.mark.parametrize("how", [restarted_with_its_data, restarted_empty, restarted_from_older_data])
@pytest.mark.parametrize("when", ["idle", "publishing"])
def test_a_server_that_is_killed_and_comes_back(
    scene: Scene, how: Callable[[Server, Path], None], when: str, tmp_path: Path, until: Until
) -> None:
    shutil.copytree(scene.server._folder / "data", tmp_path / "older")
    scene.publish()
    if when == "idle":
        scene.settle(until)
    else:
        scene.to_publisher.break_next(Fault.LOSE_REPLY, b"XADD")
        until(scene.to_publisher.fired.is_set, "a chunk was on its way")
    scene.server.kill()
    scene.check()
    how(scene.server, tmp_path / "older")
    scene.settle(until)
    until(lambda: scene.target() == scene.newest, "the log says so, too")
    scene.publish()
    scene.settle(until)


def test_a_replica_that_lagged_is_promoted(scene: Scene, until: Until) -> None:
    """What it lacked is gone for good; the proxies then lead to it, as an address that moves would."""
    replica = Server(scene.server.kind, aof=True, settings={"replicaof": f"127.0.0.1 {scene.server.port}"}).start()
    primary = scene.server
    with replica.client() as client, primary.client() as first:

        def linked() -> bool:
            return bool(client.info("replication")["master_link_status"] == "up")

        until(linked, "the replica has what there is")
        log = f"refleet:{{{scene.model}}}:log"
        until(lambda: client.xlen(log) == first.xlen(log), "and the log")
        had = client.xlen(log)
        client.replicaof("NO", "ONE")  # the moment from which on it lags
        scene.publish()
        scene.settle(until)
        assert client.xlen(log) == had < first.xlen(log)
        primary.kill()
        for proxy in (scene.to_publisher, scene.to_worker):
            proxy.target_port = replica.port
            proxy.reset()
        scene.server = replica
        scene.check()
        until(lambda: client.xlen(log) > had, "the publisher writes again what the replica lacks", timeout_s=60)
    scene.publish()
    scene.settle(until)
    primary.stop()


def test_a_server_without_memory_left(scene: Scene, until: Until) -> None:
    before, said = scene.served, scene.heard()
    scene.server.configure(maxmemory="1mb", maxmemory_policy="noeviction")
    scene.publish()
    until(lambda: "is full" in said("publisher") or "waiting for room" in said("publisher"), "the publisher says so")
    assert scene.served == before
    scene.check()
    scene.server.configure(maxmemory="0")
    scene.settle(until)


def test_a_server_that_denies_everything(scene: Scene, until: Until) -> None:
    before, said = scene.served, scene.heard()
    with scene.server.client() as client:
        client.acl_setuser("admin", enabled=True, passwords=[f"+{PASSWORD}"], categories=["+@all"], keys=["*"])
    with scene.server.client(username="admin", password=PASSWORD) as admin:
        admin.execute_command("ACL", "SETUSER", "default", "-@all", "+auth", "+ping")
        try:
            scene.publish()
            for who in ("publisher", "worker"):
                until(lambda: "refuses" in said(who), f"the {who} says so")  # noqa: B023
            assert scene.served == before
            scene.check()
        finally:
            admin.execute_command("ACL", "SETUSER", "default", "+@all")
    scene.settle(until)
