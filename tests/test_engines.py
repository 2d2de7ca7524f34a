"""One contract, three engines: a torch module, a safetensors file, and the memory twin, which may also prepare."""

from __future__ import annotations

import pytest
from engine_cases import SPECS, Case, Staged, one_changed, with_spec, without, zoo_version
from refleet.common.digest import tensor_digest
from refleet.common.errors import ApplyError, DigestMismatch, NotRefittable, RefitFailed
from refleet.worker.memory_engine import MemoryEngine


def test_what_is_read_back_after_applying_everything_is_the_version(case: Case) -> None:
    staged = zoo_version(1)
    case.engine.check(staged.manifest)
    case.engine.apply(staged, staged.names)
    assert case.read_back(staged.names) == staged.digests


@pytest.mark.parametrize("name", [name for name, spec in SPECS.items() if spec.size_bytes])
def test_applying_one_changed_tensor_gives_the_new_version_and_back_the_old_one(case: Case, name: str) -> None:
    first = zoo_version(1)
    case.engine.apply(first, first.names)
    second = one_changed(first, name)
    case.engine.apply(second, frozenset({name}))
    assert case.read_back(second.names) == second.digests
    case.engine.apply(first, frozenset({name}))
    assert case.read_back(first.names) == first.digests


def test_there_and_back_again_keeps_nan_payloads_and_negative_zeros(case: Case) -> None:
    one, two = zoo_version(1), zoo_version(2)
    assert one.tensors["embed.weight"][-16:] != two.tensors["embed.weight"][-16:]
    for staged in (one, two, one):
        case.engine.apply(staged, staged.names)
        assert case.read_back(staged.names) == staged.digests


def test_unchanged_tensors_are_not_even_read(case: Case) -> None:
    if case.kind == "file":
        return  # a file is written anew as a whole
    first = zoo_version(1)
    case.engine.apply(first, first.names)
    second = one_changed(first, "norm")
    second.broken = {name: OSError("must not be read") for name in second.names - {"norm"}}
    case.engine.apply(second, frozenset({"norm"}))
    assert case.read_back(second.names) == second.digests


@pytest.mark.parametrize(
    ("staged", "tensor", "words"),
    [
        (with_spec("norm", "F16", (4,)), "norm", ["F16", "BF16"]),
        (with_spec("norm", "BF16", (2, 2)), "norm", ["[2, 2]", "[4]"]),
        (with_spec("norm", "BF16", (1,)), "norm", ["[1]", "[4]"]),
        (with_spec("steps", "I64", (1,)), "steps", ["[1]", "[]"]),
        (with_spec("head.bias", "F32", (2,)), "head.bias", ["has 9 tensors", "'columns'"]),
        (without("mask"), "mask", ["version lacks 'mask'", "has 9 tensors"]),
        (without("empty"), "empty", ["version lacks 'empty'"]),
    ],
    ids=["dtype", "shape", "broadcastable", "scalar", "extra", "missing", "missing-empty"],
)
def test_a_version_of_another_model_is_refused_by_name_and_nothing_is_touched(
    case: Case, staged: Staged, tensor: str, words: list[str]
) -> None:
    first = zoo_version(1)
    case.engine.apply(first, first.names)
    for attempt in (lambda: case.engine.check(staged.manifest), lambda: case.engine.apply(staged, staged.names)):
        with pytest.raises(NotRefittable) as caught:
            attempt()
        assert caught.value.tensor == tensor
        assert caught.value.next
        for word in [tensor, *words]:
            assert word in caught.value.what
        assert case.read_back(first.names) == first.digests


def test_these_engines_have_one_way_to_apply_and_no_serialized_form(case: Case) -> None:
    staged = zoo_version(1)
    case.engine.apply(staged, staged.names)
    assert (case.engine.applied, case.engine.content_digest()) == ("", None)


@pytest.mark.parametrize("failing", ["columns", "mask", "wide"])
def test_a_half_failed_apply_is_healed_by_applying_the_old_version(case: Case, failing: str) -> None:
    old, new = zoo_version(1), zoo_version(2)
    case.engine.apply(old, old.names)
    new.broken = {failing: OSError("disk gone")}
    with pytest.raises(RefitFailed, match="disk gone"):
        case.engine.apply(new, new.names)
    case.engine.apply(old, old.names)
    assert case.read_back(old.names) == old.digests


def test_errors_of_the_store_pass_through_an_apply(case: Case) -> None:
    staged = zoo_version(1)
    staged.broken = {"mask": DigestMismatch("rotten", tensor="mask")}
    with pytest.raises(DigestMismatch, match="rotten"):
        case.engine.apply(staged, staged.names)


@pytest.mark.parametrize("size_change", [-2, 2])
def test_bytes_of_the_wrong_length_are_never_put_in(case: Case, size_change: int) -> None:
    old, new = zoo_version(1), zoo_version(2)
    case.engine.apply(old, old.names)
    data = new.tensors["norm"]
    new.tensors["norm"] = data[:size_change] if size_change < 0 else data + bytes(size_change)
    with pytest.raises(ApplyError) as caught:
        case.engine.apply(new, frozenset({"norm"}))
    assert caught.value.tensor == "norm"


@pytest.mark.parametrize("name", ["embed.weight", "rotary", "wide"])
def test_a_bit_flipped_inside_the_engine_shows_in_the_read_back(case: Case, name: str) -> None:
    staged = zoo_version(1)
    case.engine.apply(staged, staged.names)
    case.spoil(name)
    wrong = {n for n, digest in case.read_back(staged.names).items() if digest != staged.digests[n]}
    assert wrong == {name}


def test_reading_back_a_tensor_that_the_engine_lacks_names_it(case: Case) -> None:
    staged = zoo_version(1)
    case.engine.apply(staged, staged.names)
    with pytest.raises(DigestMismatch) as caught:
        list(case.engine.read_back(["norm", "no.such"]))
    assert caught.value.tensor == "no.such"


def test_empty_tensors_read_back_as_the_tensor_digest_nothing(case: Case) -> None:
    staged = zoo_version(1)
    case.engine.apply(staged, staged.names)
    assert case.read_back(frozenset({"empty"})) == {"empty": tensor_digest()}


def test_the_probe_is_the_same_for_the_same_weights_and_another_for_others(case: Case) -> None:
    if case.kind == "file":
        assert case.engine.probe() is None
        return
    one, two = zoo_version(1), zoo_version(2)
    seen = []
    for staged in (one, two, one, one):
        case.engine.apply(staged, staged.names)
        seen.append(case.engine.probe())
        assert case.read_back(staged.names) == staged.digests  # a probe changes nothing
    assert seen[0] == seen[2] == seen[3] != seen[1]
    for name in ("embed.weight", "rotary", "steps") if case.kind == "torch" else ("mask",):
        changed = one_changed(one, name)
        case.engine.apply(changed, frozenset({name}))
        assert case.engine.probe() != seen[0]
        case.engine.apply(one, frozenset({name}))


def test_an_engine_names_its_build_and_takes_the_news_of_serving(case: Case) -> None:
    assert case.engine.build
    assert case.engine.build == case.engine.build
    assert case.engine.served(zoo_version(1).serving) is None
    case.engine.close()


def test_the_memory_engine_fails_once_where_it_is_told_to() -> None:
    engine, staged = MemoryEngine(), zoo_version(1)
    engine.fail_after = 3
    with pytest.raises(RefitFailed):
        engine.apply(staged, staged.names)
    assert engine.written == sorted(staged.names)[:3]
    engine.apply(staged, staged.names)
    assert dict(engine.read_back(staged.names)) == staged.digests
    assert MemoryEngine(probes=False).probe() is None
