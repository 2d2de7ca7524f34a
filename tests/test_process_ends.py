"""Real processes that are asked to end in the middle of things, on full disks, and before wrong certificates."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from fault_scene import Scene, fill, temporary_disk
from refleet.common.messages import Failure
from refleet.common.redis_stream import RedisStream
from refleet.publisher.fleet import fleet
from servers import Server, binary, certificate, free_port
from tcp_proxy import Link

Until = Callable[..., None]


@pytest.fixture
def scene(valkey: Server, tmp_path: Path, model: str) -> Iterator[Scene]:
    made = Scene(tmp_path, model, valkey)
    yield made
    made.close()


def begin(scene: Scene, until: Until) -> None:
    scene.start_publisher()
    scene.start_worker()
    scene.publish()
    scene.settle(until)


def asked_to_end(process: subprocess.Popen[bytes] | None, what: str) -> None:
    assert process is not None
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0, what


def test_sigterm_in_the_middle_of_everything_ends_with_zero_and_all_goes_on_after_a_restart(
    scene: Scene, until: Until
) -> None:
    begin(scene, until)
    moments: dict[str, Callable[[ExitStack], None]] = {
        "a slow link": lambda _: slow_link(scene),
        "a partition": lambda held: apart(scene, held),
        "a version that was published this very moment": lambda _: None,
    }
    for moment, arrange in moments.items():
        for who in ("worker", "publisher"):
            with ExitStack() as held:
                arrange(held)
                passed = scene.to_publisher.forwarded_bytes
                scene.publish(change=0.5)
                if moment == "a slow link":
                    until(lambda: scene.to_publisher.forwarded_bytes > passed + 10_000, "it is on its way")  # noqa: B023
                elif moment == "a partition":
                    until(lambda: scene.to_publisher.held, "it is waited for")
                asked_to_end(scene.worker if who == "worker" else scene.publisher, f"{who}, {moment}")
                scene.check()
            if who == "worker":
                scene.start_worker()
            else:
                scene.start_publisher()
            scene.settle(until)


def slow_link(scene: Scene) -> None:
    scene.to_publisher.link = scene.to_worker.link = Link(bytes_per_s=100_000)


def apart(scene: Scene, held: ExitStack) -> None:
    held.enter_context(scene.to_publisher.partition())
    held.enter_context(scene.to_worker.partition())


def test_sigterm_before_a_worker_has_begun_ends_it_with_zero(scene: Scene, until: Until) -> None:
    begin(scene, until)
    before = scene.served
    asked_to_end(scene.worker, "serving")
    again = scene.start_worker()
    until(lambda: handles_sigterm(again.pid), "it is starting")
    asked_to_end(again, "starting")
    scene.publish()
    assert scene.served == before
    scene.check()
    scene.start_worker()
    scene.settle(until)


def handles_sigterm(pid: int) -> bool:
    """Whether the process has a handler of its own: what the kernel says of it."""
    (caught,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt")]
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


# ---------------------------------------------------------------------- disks


def failure(scene: Scene) -> Failure | None:
    """What the worker tells the fleet."""
    stream = RedisStream(scene.server.url, scene.model)
    try:
        views = [worker for worker in fleet(stream).workers if worker.id == "w0"]
    finally:
        stream.close()
    return views[0].status.failure if views and views[0].status else None


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[dict[str, Path]]:
    """The worker's whole home and the publisher's store, each on a file system of its own."""
    homes = {"worker": tmp_path / "w0", "publisher": tmp_path / "store"}
    mounted = [folder for folder in homes.values() if temporary_disk(folder)]
    if len(mounted) < len(homes):
        pytest.skip("mounting a tmpfs needs root")
    yield homes
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("how", ["full", "read-only"])
def test_a_disk_that_takes_nothing_any_more_costs_no_version(
    disks: dict[str, Path], scene: Scene, until: Until, how: str
) -> None:
    begin(scene, until)
    for who, disk in disks.items():
        before, said = scene.served, scene.heard()
        says = {
            "worker": lambda: (found := failure(scene)) and found.code in ("StoreFull", "RefitFailed"),
            "publisher": lambda: "StoreFull" in said("publisher"),  # noqa: B023
        }
        with filled(disk) if how == "full" else read_only(disk):
            scene.publish(change=0.5)
            until(says[who], f"the {who} says so")
            assert scene.served == before
            scene.check()
        scene.settle(until)


@contextmanager
def filled(disk: Path) -> Iterator[None]:
    filler = fill(disk)
    yield
    filler.unlink()


@contextmanager
def read_only(disk: Path) -> Iterator[None]:
    """By a second mount over it: the kernel refuses to change one on which a file is open for writing."""
    subprocess.run(["mount", "--bind", disk, disk], check=True)
    subprocess.run(["mount", "-o", "remount,ro,bind", disk], check=True)
    yield
    subprocess.run(["umount", "-l", disk], check=True)


# ---------------------------------------------------------------------- certificates


@pytest.mark.skipif(binary("redis") is None, reason="redis-server is not installed")
def test_a_server_with_a_wrong_certificate_is_not_spoken_to(tmp_path: Path, model: str, until: Until) -> None:
    authority = certificate(tmp_path / "authority", "127.0.0.9")
    right = certificate(tmp_path / "right", "127.0.0.1", by=authority)
    wrong = {
        "signed by somebody else": certificate(
            tmp_path / "stranger", "127.0.0.1", by=certificate(tmp_path / "other", "127.0.0.9")
        ),
        "of another host": certificate(tmp_path / "elsewhere", "127.0.0.2", by=authority),
        "expired": certificate(tmp_path / "expired", "127.0.0.1", by=authority, expired=True),
    }
    port = free_port()
    files = {"tls-cert-file": right[0], "tls-key-file": right[1]}
    server = Server("redis", settings={**files, "tls-auth-clients": "no", "tls-port": str(port)}).start()
    (tmp_path / "fleet").mkdir()
    scene = Scene(tmp_path / "fleet", model, server, tls=(port, authority[0]))
    try:
        begin(scene, until)
        for what, (chain, key) in wrong.items():
            before, said = scene.served, scene.heard()
            present(server, chain, key)
            for proxy in (scene.to_publisher, scene.to_worker):
                proxy.reset()
            scene.publish()
            for who in ("publisher", "worker"):
                until(lambda: "certificate verify failed" in said(who), f"the {who} refuses one {what}")  # noqa: B023
            assert scene.served == before
            scene.check()
            present(server, *right)
            scene.settle(until)
    finally:
        scene.close()
        server.stop()


def present(server: Server, chain: str, key: str) -> None:
    with server.client() as client:
        client.execute_command("CONFIG", "SET", "tls-cert-file", chain, "tls-key-file", key)
