"""I24: real processes, killed at every named point of a write; the next one finds the state before or after it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from refleet.common.digest import tensor_digest
from refleet.common.store import Store
from stored import KIB, collect, content, flip_tensor, manifest_of, packs, put, put_unsettled, run, temp_files, version

PACK_POINTS = ["store.object-written", "store.pack-written", "store.pack-synced", "store.pack-renamed"]
CONTENT_POINTS = [*PACK_POINTS, "store.record-temp", "store.record-renamed", "store.settled"]
RECORD_POINTS = ["store.record-temp", "store.record-written", "store.record-synced", "store.record-renamed"]
COLLECT_POINTS = ["store.manifests-dropped", "store.pack-dropped", "store.pack-copied", *PACK_POINTS]

OPEN_AND_DIE = "arm(sys.argv[2]); Store(sys.argv[1])"
PUT_AND_DIE = "store = Store(sys.argv[1], pack_bytes=int(sys.argv[3])); arm(sys.argv[2]); put(store, version(2))"
SET_AND_DIE = "store = Store(sys.argv[1]); arm(sys.argv[2]); store.put_record('state', b'after')"
COLLECT_AND_DIE = """
store = Store(sys.argv[1]); arm(sys.argv[2])
store.collect([manifest_of(version(2)).fingerprint])
"""
HEAL_AND_DIE = """
store = Store(sys.argv[1]); arm(sys.argv[2])
store.forget(tensor_digest(version(1)["layer.0"]))
put(store, version(1))
"""


def killed(code: str, store: Path, point: str, *arguments: object) -> None:
    assert run(code, store, point, *arguments)[0] == -signal.SIGKILL, f"{point} was not reached"


def check_no_traces(store: Store) -> None:
    assert temp_files(store) == []
    assert list((store.root / "packs").glob("*.damaged")) == []


@pytest.mark.parametrize("pack_bytes", [100 * KIB, 1 << 30])
@pytest.mark.parametrize("point", CONTENT_POINTS)
def test_killed_while_a_version_is_put_in(tmp_path: Path, point: str, pack_bytes: int) -> None:
    first = put(Store(tmp_path), version(1))
    killed(PUT_AND_DIE, tmp_path, point, pack_bytes)
    store = Store(tmp_path)
    check_no_traces(store)
    second = manifest_of(version(2))
    assert (second.fingerprint in store.manifests()) is (point in ("store.record-renamed", "store.settled"))
    if second.fingerprint in store.manifests():
        assert content(store, second) == version(2)
    for name, data in version(2).items():  # what is visible of it is whole
        if store.has(tensor_digest(data)):
            assert store.read(tensor_digest(data), verify=True) == data, name
    assert content(store, first) == version(1)
    put(store, version(2))
    assert content(store, second) == version(2)
    collect(store, second)
    assert content(Store(tmp_path), second) == version(2)


@pytest.mark.parametrize("point", COLLECT_POINTS)
def test_killed_while_versions_are_removed(tmp_path: Path, point: str) -> None:
    sizes = []
    for folder in (tmp_path / "killed", tmp_path / "control"):
        first, second = (put(Store(folder), version(number)) for number in (1, 2))
        if folder.name == "killed":
            killed(COLLECT_AND_DIE, folder, point)
        store = Store(folder)
        check_no_traces(store)
        assert content(store, second) == version(2)
        if first.fingerprint in store.manifests():
            assert content(store, first) == version(1)
        collect(store, second)
        again = Store(folder)
        assert content(again, second) == version(2)
        sizes.append(again.size_bytes)
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("point", [*PACK_POINTS, "store.settled"])
def test_killed_while_a_damaged_tensor_is_healed(tmp_path: Path, point: str) -> None:
    held = put(Store(tmp_path), version(1))
    flip_tensor(Store(tmp_path), version(1)["layer.0"])
    killed(HEAL_AND_DIE, tmp_path, point)
    store = Store(tmp_path)
    check_no_traces(store)
    assert store.manifest(held.fingerprint) == held
    if len(packs(store)) == 1:
        store.forget(tensor_digest(version(1)["layer.0"]))
        put(store, version(1))
    assert content(store, held) == version(1)


@pytest.mark.parametrize("point", RECORD_POINTS)
def test_killed_while_a_record_is_set(tmp_path: Path, point: str) -> None:
    Store(tmp_path).put_record("state", b"before")
    killed(SET_AND_DIE, tmp_path, point)
    store = Store(tmp_path)
    check_no_traces(store)
    assert store.record("state") == (b"after" if point == "store.record-renamed" else b"before")


@pytest.mark.parametrize("point", RECORD_POINTS)
def test_killed_while_the_store_is_made(tmp_path: Path, point: str) -> None:
    killed(OPEN_AND_DIE, tmp_path / "store", point)
    made = (tmp_path / "store" / "id").exists()
    store = Store(tmp_path / "store")
    check_no_traces(store)
    assert made is (point == "store.record-renamed") and Store(tmp_path / "store").id == store.id
    put(store, version(1))


# A kill does not empty the page cache, so it proves nothing about syncing: here the order of the calls is what counts.


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was synced, renamed and removed from now on, in order, by folder; renames by source and target."""
    seen: list[str] = []

    def kind(path: str | Path) -> str:
        path = Path(path)
        return path.name if path.is_dir() else f"{path.parent.name}/*"

    def recorded(call: Callable[..., None], text: Callable[..., str]) -> Callable[..., None]:
        def wrapper(*arguments: object) -> None:
            call(*arguments)
            seen.append(text(*arguments))

        return wrapper

    monkeypatch.setattr(
        os, "fsync", recorded(os.fsync, lambda fd: f"sync {kind(Path(f'/proc/self/fd/{fd}').readlink())}")
    )
    monkeypatch.setattr(os, "rename", recorded(os.rename, lambda a, b: f"rename {kind(a)} {kind(b)}"))
    monkeypatch.setattr(os, "unlink", recorded(os.unlink, lambda path: f"remove {kind(path)}"))
    return seen


def test_bytes_are_synced_before_their_name_and_the_name_before_the_next_step(tmp_path: Path, calls: list[str]) -> None:
    store = Store(tmp_path)
    calls.clear()
    store.put_record("state", b"1")
    assert calls == ["sync temp/*", "rename temp/* records/*", "sync records"]
    calls.clear()
    store.put_records({"first": b"1", "second": b"2"})
    assert calls == ["sync temp/*"] * 2 + ["rename temp/* records/*"] * 2 + ["sync records"]


def test_what_its_digest_proves_is_visible_at_once_and_settled_later(tmp_path: Path, calls: list[str]) -> None:
    store = Store(tmp_path)
    calls.clear()
    put(store, version(1))
    assert calls == [
        "sync temp/*", "rename temp/* packs/*", "sync packs",
        "rename temp/* manifests/*", "sync manifests/*", "sync manifests",
    ]  # fmt: skip
    calls.clear()
    store.settle()
    assert calls == [], "once"


def test_a_version_that_is_put_in_again_stays_as_durable_as_it_was(tmp_path: Path, calls: list[str]) -> None:
    store = Store(tmp_path)
    put(store, version(1))
    calls.clear()
    put_unsettled(store, version(1))
    assert calls == []
    assert store.manifests() == [manifest_of(version(1)).fingerprint]


def test_what_is_new_is_settled_before_anything_older_goes(tmp_path: Path, calls: list[str]) -> None:
    store = Store(tmp_path)
    put(store, version(1))
    put_unsettled(store, version(2))
    calls.clear()
    store.collect([manifest_of(version(2)).fingerprint])
    assert calls[:3] == ["sync manifests/*", "sync manifests", "remove manifests/*"]


def test_removed_manifests_are_synced_before_their_tensors_go(tmp_path: Path, calls: list[str]) -> None:
    store = Store(tmp_path)
    put(store, version(1))
    kept = put(store, version(2))
    calls.clear()
    store.collect([kept.fingerprint])
    assert calls == [
        "remove manifests/*", "sync manifests",
        "sync temp/*", "rename temp/* packs/*", "sync packs", "remove packs/*",
    ]  # fmt: skip


def test_a_manifest_that_is_there_is_not_replaced_by_one_that_a_power_cut_may_tear(tmp_path: Path) -> None:
    """I24: publishing the target again, which then has nothing to do, must not put it at risk."""
    with Store(tmp_path) as store:
        manifest = put(store, version(1))
        store.settle()
        path = tmp_path / "manifests" / manifest.fingerprint.hex()
        durable = path.stat().st_ino
        put(store, version(1))
        assert path.stat().st_ino == durable
