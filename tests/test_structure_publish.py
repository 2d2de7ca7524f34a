"""A publisher refuses other names, dtypes or shapes than its last release has, unless told otherwise."""

from __future__ import annotations

from cli_runs import Cli
from refleet.common.errors import IncompatibleCheckpoint
from world import State, World, checkpoint, reason, restructured

OLD = checkpoint(1)
NEW = restructured(OLD)
NEWER = NEW | {"head": NEW["head"] + 1}


def test_another_structure_is_refused_before_any_byte_moves_and_the_flag_is_named(small_world: World) -> None:
    """I17."""
    publisher = small_world.publisher()
    publisher.publish(OLD, version="v1")
    before = [payload.payload_id for payload in publisher.book.payloads()]
    error = reason(lambda: publisher.publish(NEW, version="v2"))
    assert isinstance(error, IncompatibleCheckpoint)
    assert error.tensor == "embed.weight"
    assert "--allow-structure-change" in error.next
    assert [release.version for release in publisher.book.releases()] == ["v1"]
    assert [payload.payload_id for payload in publisher.book.payloads()] == before


def test_a_rollback_to_another_structure_is_refused_in_the_same_way(small_world: World) -> None:
    publisher = small_world.publisher()
    publisher.publish(OLD, version="v1")
    publisher.publish(NEW, version="v2", allow_structure_change=True)
    error = reason(lambda: publisher.rollback("v1"))
    assert isinstance(error, IncompatibleCheckpoint)
    assert "v2" in error.what and "--allow-structure-change" in error.next
    assert publisher.target().version == "v2"  # type: ignore[union-attr]
    assert publisher.rollback("v1", allow_structure_change=True).release.restructure


def test_a_release_says_that_the_structure_changes_only_where_it_does(small_world: World) -> None:
    publisher = small_world.publisher()

    def release(state: State, **options: bool) -> bool:
        return publisher.publish(state, **options).release.restructure

    assert not release(OLD, allow_structure_change=True), "the first one"
    assert not release(checkpoint(2), allow_structure_change=True)
    assert release(NEW, allow_structure_change=True)
    assert not release(NEWER)
    assert not publisher.rollback("v3", allow_structure_change=True).release.restructure


def test_a_store_that_takes_over_does_not_know_the_structure_before_and_says_so_only_if_allowed(
    small_world: World,
) -> None:
    small_world.publisher("one").publish(OLD, version="v1")
    other = small_world.publisher("two", take_over=True)
    assert other.publish(NEW, version="x1", allow_structure_change=True).release.restructure
    third = small_world.publisher("three", take_over=True)
    assert not third.publish(NEW, version="y1").release.restructure


def test_the_flag_on_the_command_line_is_needed_both_ways(cli: Cli) -> None:
    old, new = checkpoint(1), checkpoint(1) | {"head": checkpoint(1)["scale"]}
    with cli.worker("w0"):
        cli.ok("publish", cli.save("old.safetensors", old), "--version", "v1", "--wait")
        other = cli.save("new.safetensors", new)
        code, error = cli.fails("publish", other, "--version", "v2")
        assert (code, error["code"]) == (1, "IncompatibleCheckpoint")
        assert "--allow-structure-change" in error["next"]
        published = cli.ok("publish", other, "--version", "v2", "--allow-structure-change", "--wait")
        assert published["restructure"] is True
        assert cli.fails("rollback", "--to", "v1")[1]["code"] == "IncompatibleCheckpoint"
        said = cli.on("rollback", "--to", "v1", "--allow-structure-change", "--wait")
    assert said.code == 0 and "other names, dtypes or shapes" in said.out
