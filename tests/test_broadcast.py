"""One reading of a checkpoint: sent while it is read, stored at what changed, announced when all of it is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from refleet.common import named_records
from refleet.common.errors import CheckpointChanged, StreamUnavailable, VersionExists
from refleet.common.store import ANCHOR_EVERY
from refleet.publisher import Publisher
from refleet.publisher.compare import Comparison
from refleet.publisher.fleet import fleet
from safetensors.torch import save_file
from world import State, World, checkpoint, holds, reason, served

BIG = 3 << 20  # elements of a tensor that fills several chunks


def big(seed: int, *, base: State | None = None) -> State:
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(BIG, generator=generator).to(torch.bfloat16) for name in "abcdefghij"}
    if base is not None:
        made = {n: torch.where(torch.rand(BIG, generator=generator) < 0.9, t, base[n]) for n, t in made.items()}
    return made


def stepped(state: State, seed: int) -> State:
    """About 2 % of all floating elements moved by one unit in the last place."""
    generator = torch.Generator().manual_seed(seed)
    made = {name: tensor.clone() for name, tensor in state.items()}
    for name in ("embed.weight", "layer.0.bias"):
        bits = made[name].view(torch.int16)
        bits += (torch.rand(bits.shape, generator=generator) < 0.02).to(torch.int16)
        bits.view(-1)[0] += 1
    return made


def held(publisher: Publisher) -> set[str]:
    """What the store holds of versions."""
    folders = (publisher.store.root / name for name in ("packs", "deltas", "manifests", "temp"))
    return {path.name for folder in folders for path in folder.iterdir()}


def payloads_in_the_server(publisher: Publisher) -> int:
    return sum(publisher.stream.payload_chunks(p.payload_id) > 0 for p in publisher.book.payloads())


def test_the_first_bytes_leave_before_the_last_tensor_is_read(
    small_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher = small_world.publisher()
    first = big(1)
    publisher.publish(first, version="v1")
    events: list[str] = []
    put, inputs = publisher.stream.put_chunk, Comparison.inputs

    def noted_put(*args: object, **options: object) -> None:
        events.append("sent")
        put(*args, **options)  # type: ignore[arg-type]

    def noted_inputs(self: Comparison) -> object:
        for each in inputs(self):
            yield each
            events.append("read")

    monkeypatch.setattr(publisher.stream, "put_chunk", noted_put)
    monkeypatch.setattr(Comparison, "inputs", noted_inputs)
    publisher.publish(big(2, base=first), version="v2")
    assert events.index("sent") < len(events) - 1 - events[::-1].index("read")


def test_a_checkpoint_that_changes_while_it_is_sent_leaves_nothing(
    small_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher = small_world.publisher()
    worker = small_world.worker()
    first = checkpoint(1)
    publisher.publish(first, version="v1").wait(workers=1, timeout_s=20)
    before, there = held(publisher), payloads_in_the_server(publisher)
    second = checkpoint(2, change=0.1, base=first)
    inputs = Comparison.inputs

    def trained_on(self: Comparison) -> object:
        for number, each in enumerate(inputs(self)):
            yield each
            if number == 0:
                second["layer.0.weight"] += 1

    monkeypatch.setattr(Comparison, "inputs", trained_on)
    with pytest.raises(CheckpointChanged):
        publisher.publish(second, version="v2")
    assert held(publisher) == before
    assert payloads_in_the_server(publisher) <= there
    assert served(worker).version == "v1"  # type: ignore[union-attr]
    monkeypatch.undo()
    publisher.publish(second, version="v2").wait(workers=1, timeout_s=20)
    assert holds(worker, second)


def test_an_id_that_is_taken_by_other_content_leaves_nothing(small_world: World) -> None:
    publisher = small_world.publisher()
    first = checkpoint(1)
    publisher.publish(first, version="v1")
    publisher.publish(stepped(first, 2), version="v2")
    before, there = held(publisher), payloads_in_the_server(publisher)
    with pytest.raises(VersionExists):
        publisher.publish(stepped(first, 3), version="v1")
    assert held(publisher) == before
    assert payloads_in_the_server(publisher) <= there


@pytest.mark.parametrize("resident", [True, False])
def test_both_sides_write_what_changed_and_not_the_model(small_world: World, *, resident: bool) -> None:
    publisher, worker = small_world.publisher(resident=resident), small_world.worker()
    state = checkpoint(1)
    publisher.publish(state, version="v1").wait(workers=1, timeout_s=20)
    sizes = publisher.store.size_bytes, worker.store.size_bytes
    for number in range(2, 7):
        state = stepped(state, number)
        release = publisher.publish(state, version=f"v{number}").wait(workers=1, timeout_s=20)
    assert holds(worker, state)
    changed = state["embed.weight"].nbytes + state["layer.0.bias"].nbytes
    assert release["w0"].payload_bytes < changed / 4
    for store, before in zip((publisher.store, worker.store), sizes, strict=True):
        assert store.size_bytes - before < 5 * (changed / 4 + 4000)


def test_a_worker_that_was_away_and_one_that_starts_again_hold_the_newest(
    small_world: World, until: Callable[..., None]
) -> None:
    publisher, worker = small_world.publisher(), small_world.worker()
    state = checkpoint(1)
    publisher.publish(state, version="v1").wait(workers=1, timeout_s=20)
    small_world.stop("w0")
    for number in range(2, 6):
        state = stepped(state, number)
        publisher.publish(state, version=f"v{number}")
    worker = small_world.worker()
    worker.wait("v5", timeout_s=20)
    assert holds(worker, state)
    small_world.stop("w0")
    publisher.close()
    small_world.publishers.clear()
    worker = small_world.worker()
    until(lambda: served(worker), "it serves from its own disk")
    assert holds(worker, state)


def test_after_many_versions_both_sides_hold_one_whole(small_world: World, until: Callable[..., None]) -> None:
    publisher, worker = small_world.publisher(keep=2), small_world.worker(keep=2)
    state = checkpoint(1)
    publisher.publish(state, version="v1").wait(workers=1, timeout_s=20)
    for number in range(2, ANCHOR_EVERY + 6):
        state = stepped(state, number)
        publisher.publish(state, version=f"v{number}").wait(workers=1, timeout_s=20)
    for store in (publisher.store, worker.store):
        files = list((store.root / "deltas").glob("*.delta"))
        assert 0 < len(files) < ANCHOR_EVERY + 3
    back = f"v{ANCHOR_EVERY + 4}"
    publisher.rollback(back).wait(workers=1, timeout_s=20)
    small_world.stop("w0")
    worker = small_world.worker()
    until(lambda: served(worker), "it serves from its own disk")
    assert served(worker).version == back  # type: ignore[union-attr]


def test_bit_rot_in_the_base_makes_that_tensor_travel_whole(small_world: World) -> None:
    publisher, worker = small_world.publisher(resident=False), small_world.worker()
    first = checkpoint(1)
    publisher.publish(first, version="v1").wait(workers=1, timeout_s=20)
    for pack in (publisher.store.root / "packs").glob("*.pack"):
        data = bytearray(pack.read_bytes())
        data[100] ^= 1
        pack.write_bytes(data)
    second = checkpoint(2, change=0.02, base=first)
    publisher.publish(second, version="v2").wait(workers=1, timeout_s=20)
    assert holds(worker, second)


def test_files_and_tensors_make_the_same_version(small_world: World, tmp_path: Path) -> None:
    publisher = small_world.publisher()
    first, second = checkpoint(1), checkpoint(2, change=0.1, base=checkpoint(1))
    publisher.publish(first, version="v1")
    from_memory = publisher.publish(second, version="v2").release
    save_file(second, tmp_path / "second.safetensors")
    publisher.rollback("v1")
    from_file = publisher.publish(tmp_path / "second.safetensors", version="v2").release
    assert from_file.fingerprint == from_memory.fingerprint


def test_the_payload_of_a_release_that_the_server_did_not_take_yet_is_kept(
    small_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I15: the release is real, and is written again by the next command or the service."""
    publisher = small_world.publisher(answer=False)
    publisher.publish(checkpoint(1), version="v1")
    small_world.worker().wait("v1")

    def away(*_args: object, **_options: object) -> None:
        raise StreamUnavailable("away")

    with monkeypatch.context() as gone:
        gone.setattr(publisher.stream, "append", away)
        assert isinstance(reason(lambda: publisher.publish(checkpoint(2), version="v2")), StreamUnavailable)
    head = publisher.target()
    assert head is not None and head.version == "v2" and head.payload is not None
    publisher._payloads.clean(fleet(publisher.stream))  # as making room for another payload does
    assert publisher.stream.payload_chunks(head.payload.payload_id) > 0


def test_a_release_that_another_process_recorded_is_durable_before_it_is_written_again(
    small_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I24: that process may have died right after the record got its name."""
    publisher = small_world.publisher(answer=False)
    publisher.publish(checkpoint(1), version="v1")
    small_world.carrier.lose("log")
    steps: list[object] = []
    append = publisher.stream.append
    monkeypatch.setattr(named_records, "sync_path", steps.append)
    monkeypatch.setattr(publisher.stream, "append", lambda *a, **o: (steps.append("append"), append(*a, **o)))
    assert publisher.claim.heal()
    assert steps == [publisher.store.root / "records", "append"]


def test_half_a_payload_that_could_not_be_dropped_goes_with_the_next_clean(
    small_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while the process lives that began it."""
    publisher = small_world.publisher(answer=False)
    publisher.publish(checkpoint(1), version="v1")

    def away(*_args: object, **_options: object) -> None:
        raise StreamUnavailable("away")

    with monkeypatch.context() as gone:
        gone.setattr(publisher.stream, "put_chunk", away)
        gone.setattr(publisher.stream, "drop_payload", away)
        assert isinstance(reason(lambda: publisher.publish(checkpoint(2), version="v2")), StreamUnavailable)
    (half,) = [payload for payload in publisher.book.payloads() if payload.ref is None]
    publisher._payloads.clean(fleet(publisher.stream))
    assert half.payload_id not in [payload.payload_id for payload in publisher.book.payloads()]
