"""`refleet serve --watch`: which checkpoints it publishes, in which order, and what it says of the others."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from refleet.common.errors import StaleEpoch, UsageError
from refleet.publisher import Publisher
from refleet.publisher.watch import Happened, Watch, version_id
from safetensors.torch import save_file
from servers import Server
from world import State, World, checkpoint


@dataclass
class Folder:
    """A watched folder, its watch, and what that told so far."""

    publisher: Publisher
    path: Path
    told: list[Happened] = field(default_factory=list)
    now_s: float = 0.0

    def __post_init__(self) -> None:
        self.path.mkdir()
        self.restart()

    def restart(self) -> None:
        """As a new daemon on the same store and folder."""
        self.watch = Watch(self.path, self.publisher, self.told.append, clock=lambda: self.now_s)

    def put(self, name: str, state: State, *, at_s: int | None = None) -> Path:
        """A checkpoint file, modified `at_s` (seconds since 1970), renamed into place."""
        temporary = self.path / f".{name}.tmp"
        save_file(state, temporary)
        if at_s is not None:
            os.utime(temporary, (at_s, at_s))
        return temporary.rename(self.path / name)

    def polls(self, count: int = 2) -> list[tuple[str, str]]:
        """Look `count` times; (kind, version) of what was told meanwhile."""
        before = len(self.told)
        for _ in range(count):
            self.watch.look()
        return [(happened.kind, happened.version) for happened in self.told[before:]]

    def released(self) -> list[str]:
        return [release.version for release in self.publisher.book.releases()]


@pytest.fixture
def folder(small_world: World, tmp_path: Path) -> Folder:
    return Folder(small_world.publisher(), tmp_path / "checkpoints")


def test_a_checkpoint_is_taken_once_nothing_changed_between_two_looks(folder: Folder) -> None:
    path = folder.put("step 1.safetensors", checkpoint(1))
    assert folder.polls(1) == []
    os.utime(path)
    assert folder.polls(1) == [], "it was touched meanwhile"
    assert folder.polls(1) == [("published", "step-1")]
    assert folder.polls(3) == [] and folder.released() == ["step-1"]


def test_several_new_ones_are_published_oldest_first(folder: Folder) -> None:
    for name, at_s in [("a", 3000), ("b", 1000), ("c", 2000)]:
        folder.put(f"{name}.safetensors", checkpoint(at_s), at_s=at_s)
    assert folder.polls() == [("published", "b"), ("published", "c"), ("published", "a")]


def test_neither_a_restart_nor_a_rollback_publishes_old_ones_again(folder: Folder) -> None:
    for number in (1, 2):
        folder.put(f"v{number}.safetensors", checkpoint(number), at_s=1000 * number)
    folder.polls()
    folder.publisher.rollback("v1")
    folder.restart()
    assert folder.polls(3) == []
    folder.put("v3.safetensors", checkpoint(3))
    assert folder.polls() == [("published", "v3")]
    assert folder.released() == ["v1", "v2", "v1", "v3"]


def test_other_content_under_a_known_id_is_told_once_and_not_published(folder: Folder) -> None:
    first, second = checkpoint(1), checkpoint(2)
    folder.put("v1.safetensors", first, at_s=1000)
    folder.polls()
    folder.put("v1.safetensors", first, at_s=2000)
    assert folder.polls(3) == [], "the same content again"
    folder.put("v1.safetensors", second, at_s=1000)
    assert folder.polls(4) == [("rewritten", "v1")], "even with its old time"
    folder.put("v1.safetensors", second)
    folder.restart()
    assert folder.polls(4) == [("rewritten", "v1")], "and when it happened while no daemon ran"
    assert folder.released() == ["v1"]
    folder.put("v2.safetensors", second)
    assert folder.polls() == [("published", "v2")]


def test_broken_files_are_told_once_per_change_and_the_watch_goes_on(folder: Folder) -> None:
    whole = folder.put("good.safetensors", checkpoint(1)).read_bytes()
    bad = folder.path / "bad.safetensors"
    bad.write_bytes(whole[:-9])
    assert sorted(folder.polls(4)) == [("broken", "bad"), ("published", "good")]
    bad.write_bytes(whole[:-8])
    assert folder.polls(4) == [("broken", "bad")]
    assert "cut off" in folder.told[-1].error.what  # type: ignore[union-attr]
    bad.write_bytes(whole)
    assert folder.polls(4) == [("published", "bad")], "it was only being written"
    folder.put("narrow.safetensors", {"scale": checkpoint(1)["scale"]})
    assert folder.polls(4) == [("broken", "narrow")]


def test_folders_with_an_index_are_checkpoints_and_loose_shards_are_not(folder: Folder) -> None:
    state = checkpoint(1)
    names = sorted(state)
    shards = {"model-00001-of-00002.safetensors": names[:3], "model-00002-of-00002.safetensors": names[3:]}
    sharded = folder.path / "step-7"
    sharded.mkdir()
    for name, held in shards.items():
        save_file({key: state[key] for key in held}, sharded / name)
        shutil.copy(sharded / name, folder.path / name)
    assert folder.polls(4) == [], "the index comes last"
    index = ", ".join(f'"{key}": "{name}"' for name, held in shards.items() for key in held)
    (sharded / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{index}}}}}')
    single = folder.path / "step-8"
    single.mkdir()
    save_file(checkpoint(8), single / "model.safetensors")
    assert folder.polls(4) == [("published", "step-7"), ("published", "step-8")]


def test_links_within_the_folder_and_hidden_files_are_no_checkpoints_of_their_own(folder: Folder) -> None:
    path = folder.put("v1.safetensors", checkpoint(1))
    (folder.path / "latest.safetensors").symlink_to(path.name)
    shutil.copy(path, folder.path / ".v2.safetensors")
    (folder.path / "notes.txt").write_text("nothing")
    assert folder.polls(3) == [("published", "v1")]


def test_two_names_for_one_id_are_told_and_only_the_older_is_published(folder: Folder) -> None:
    folder.put("v 1.safetensors", checkpoint(1), at_s=1000)
    folder.put("v-1.safetensors", checkpoint(2), at_s=2000)
    assert folder.polls(4) == [("published", "v-1"), ("ambiguous", "v-1")]
    error = folder.told[-1].error
    assert error is not None and "v-1.safetensors and v 1.safetensors would both be" in error.what
    assert folder.released() == ["v-1"]


def test_a_server_that_is_away_delays_but_loses_nothing(tmp_path: Path, model: str) -> None:
    server = Server("valkey").start()
    with Publisher(server.url, model=model, store=tmp_path / "store", answer=False) as publisher:
        folder = Folder(publisher, tmp_path / "checkpoints")
        folder.put("v0.safetensors", checkpoint(0), at_s=1000)
        folder.polls()
        server.kill()
        for number in (1, 2):
            folder.put(f"v{number}.safetensors", checkpoint(number), at_s=1000 * number)
        assert folder.polls(4) == [("waiting", "v1")], (
            "the later one waits behind it, and nothing is tried at each look"
        )
        server.start(empty=True)
        assert folder.polls(2) == []
        folder.now_s += 5
        assert folder.polls(1) == [("published", "v1"), ("published", "v2")]
    server.stop()


def test_a_take_over_ends_the_watch(small_world: World, folder: Folder) -> None:
    folder.put("v1.safetensors", checkpoint(1))
    folder.polls()
    small_world.publisher("other", take_over=True).publish(checkpoint(2), version="theirs")
    folder.put("v2.safetensors", checkpoint(3))
    with pytest.raises(StaleEpoch, match="taken over"):
        folder.polls(3)


def test_a_folder_that_vanishes_is_told_once_and_a_missing_one_refused(folder: Folder) -> None:
    away = folder.path.rename(folder.path.with_name("away"))
    assert folder.polls(3) == [("waiting", "")]
    with pytest.raises(UsageError, match="not there"):
        folder.restart()
    away.rename(folder.path)
    folder.put("v1.safetensors", checkpoint(1))
    assert folder.polls(3) == [("published", "v1")]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("step-1.safetensors", "step-1"),
        ("epoch=3 loss=0.1.safetensors", "epoch-3-loss-0.1"),
        ("__x.safetensors", "x"),
        ("folder.v2", "folder.v2"),
        ("é.safetensors", None),
        ("x" * 100 + ".safetensors", None),
    ],
)
def test_any_name_gives_a_valid_id_and_long_ones_stay_apart(name: str, expected: str | None) -> None:
    made = version_id(Path(name))
    assert expected in (None, made) and len(made) <= 64
    assert version_id(Path("y" + name)) != made
