"""Locks between processes and threads, and what a store makes once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from refleet.common.errors import StoreBusy
from refleet.common.records import locked
from refleet.common.store import Store
from stored import go_on, run, running, start

HOLD_LOCK = """
with Store(sys.argv[1]).lock("publish", holder="refleet publish"):
    print("ready", flush=True)
    sys.stdin.readline()
"""
MAKE = "print(Store(sys.argv[1]).id)"
FORK = """
import os
store = Store(sys.argv[1])
with store.lock("x"):
    if os.fork() == 0:
        sys.stdin.read()
        os._exit(0)
with store.lock("x"):
    print("free")
"""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "store") as store:
        yield store


def test_a_lock_names_who_holds_it_and_falls_with_its_holder(store: Store) -> None:
    with running(HOLD_LOCK, store) as holder:
        with pytest.raises(StoreBusy, match=f"pid {holder.pid}, refleet publish"), store.lock("publish"):
            pass
        with store.lock("worker"):
            pass
        holder.kill()
        holder.wait()
        with store.lock("publish"):
            pass


def test_a_lock_is_waited_for(store: Store) -> None:
    with running(HOLD_LOCK, store) as holder:
        with pytest.raises(StoreBusy), store.lock("publish", wait_s=0.1):
            pass
        go_on(holder)
        with store.lock("publish", wait_s=20):
            pass


def test_a_lock_excludes_this_process_too_until_its_block_ends(store: Store) -> None:
    with pytest.raises(KeyError), store.lock("x", holder="first"):
        with pytest.raises(StoreBusy, match="first"), store.lock("x", holder="second"):
            pass
        raise KeyError
    with store.lock("x"):
        pass
    assert (store.root / "locks" / "x").read_bytes() == b""  # nobody is named who left


def test_processes_that_make_a_store_at_once_agree_on_its_id(tmp_path: Path, until: Callable[..., None]) -> None:
    gate = tmp_path / "store" / "locks" / "id"
    gate.parent.mkdir(parents=True)
    with locked(gate):
        processes = [start(MAKE, tmp_path / "store") for _ in range(3)]
        for process in processes:  # each has seen that there is no id, and waits to make one
            until(
                lambda fds=Path(f"/proc/{process.pid}/fd"): gate.resolve() in map(Path.resolve, fds.iterdir()),
                "at the lock",
            )
    ids = {process.communicate(timeout=60)[0] for process in processes}
    assert ids == {Store(tmp_path / "store").id + "\n"}


def test_a_lock_ends_with_its_block_though_a_forked_child_lives_on(store: Store) -> None:
    assert run(FORK, store.root) == (0, "free\n")


@pytest.mark.parametrize("name", ["objects", "order", "id", "../id", "a/b", ""])
def test_the_store_keeps_its_own_locks_to_itself(store: Store, name: str) -> None:
    with pytest.raises(AssertionError):
        store.lock(name)
