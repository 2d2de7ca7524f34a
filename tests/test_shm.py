"""Stores in this machine's memory: `--store memory`, `--state memory`, `--share memory`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from cli_runs import Cli
from refleet.common import shm
from refleet.common.config import settings
from refleet.common.errors import StoreError, StoreFull
from refleet.common.shm import placed
from refleet.common.store import Store
from refleet.publisher import Publisher
from refleet.worker.memory_engine import MemoryEngine
from refleet.worker.worker import Worker
from stored import put, version
from world import World, checkpoint, holds, reason

HOME = f"refleet-{os.getuid()}-stores"


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the tests take for /dev/shm."""
    folder = tmp_path / "shm"
    folder.mkdir(mode=0o1777)
    monkeypatch.setattr(shm, "SHM", folder)
    return folder


def test_a_fleet_that_keeps_everything_in_memory_survives_its_processes(small_world: World, memory: Path) -> None:
    world, states = small_world, [checkpoint(n) for n in range(2)]

    def worker() -> Worker:
        return Worker(
            world.carrier.stream(), model=world.model, engine=MemoryEngine(), state_dir="memory", share="memory",
            worker_id="w0", poll_s=0.1,
        ).start()  # fmt: skip

    def publisher() -> Publisher:
        return Publisher(world.carrier.stream(), model=world.model, store="memory")

    first = worker()
    with publisher() as one:
        for number, state in enumerate(states):
            one.publish(state, version=f"v{number}").wait(workers=1, timeout_s=20)
    first.stop()
    stores = memory / HOME
    assert sorted(path.relative_to(stores).parts for path in stores.glob("*/*/id")) == [
        ("publisher", world.model, "id"), ("share", world.model, "id"), ("worker", "w0", "id"),
    ]  # fmt: skip
    assert not (Path.cwd() / "memory").exists()
    again = worker()
    with publisher() as other:
        assert again.wait("v1", timeout_s=20).version == "v1"
        assert other.rollback("v0").wait(workers=1, timeout_s=20)
        assert holds(again, states[0])
    again.stop()


def test_commands_find_the_store_in_memory_by_flag_and_environment(cli: Cli, memory: Path) -> None:
    (step,) = cli.steps(1)
    cli.ok("publish", step, "--version", "step-1", "--store", "memory")
    assert (memory / HOME / "publisher" / cli.model / "id").exists()
    cli.environ["REFLEET_STORE"] = "memory"
    assert [release["version"] for release in cli.ok("history")] == ["step-1"]
    assert cli.ok("rollback", "--to", "step-1")["already"]


def test_the_word_in_a_settings_file_is_no_folder_beside_it(tmp_path: Path) -> None:
    (tmp_path / "refleet.toml").write_text('store = "memory"\nkey = "key.pem"\n')
    found = settings({"REFLEET_CONFIG": str(tmp_path / "refleet.toml")})
    assert (found.store, found.key) == (Path("memory"), tmp_path / "key.pem")


def test_a_folder_of_that_name_is_meant_by_its_path(memory: Path) -> None:
    assert placed(Path.cwd() / "memory") == Path.cwd() / "memory"
    assert list(memory.iterdir()) == []


@pytest.mark.parametrize("how", ["open to others", "a link"])
def test_a_folder_that_others_may_write_is_refused(memory: Path, how: str, tmp_path: Path) -> None:
    if how == "a link":
        (tmp_path / "elsewhere").mkdir()
        (memory / HOME).symlink_to(tmp_path / "elsewhere")
    else:
        (memory / HOME).mkdir()
        (memory / HOME).chmod(0o777)
    error = reason(lambda: placed("memory", "publisher"))
    assert isinstance(error, StoreError) and "somebody else's" in error.what
    assert str(memory / HOME) in error.next


def test_without_such_memory_a_folder_on_disk_is_asked_for(memory: Path) -> None:
    memory.rmdir()
    assert "name a folder on disk" in reason(lambda: placed("memory")).next


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no /dev/shm here")
def test_a_full_memory_is_a_full_disk() -> None:
    """A file system of 4 MiB of its own would need a mount: the limit of file sizes gives the same error."""
    import resource

    home = placed("memory", f"test-{os.getpid()}")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Store(home) as store:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
        try:
            with pytest.raises(StoreFull):
                put(store, version(1))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        put(store, version(1))
