"""What the facts refuse to be, and what a fingerprint covers."""

from __future__ import annotations

import unicodedata
from dataclasses import replace
from itertools import permutations

import pytest
from refleet.common.digest import fingerprint
from refleet.common.limits import LIMITS
from refleet.common.types import (
    DTYPE_BYTES,
    Block,
    DeltaTensor,
    Index,
    Manifest,
    PayloadRef,
    TensorEntry,
    TensorSpec,
    tensor_name_problem,
)

D1, D2, D3 = (bytes([n]) * 32 for n in (1, 2, 3))
SPEC = TensorSpec("layer.weight", "BF16", (2, 3))


def entry(name: str, dtype: str = "F32", shape: tuple[int, ...] = (2,), digest: bytes = D1) -> TensorEntry:
    return TensorEntry(TensorSpec(name, dtype, shape), digest)


def test_a_tensor_has_the_size_of_its_elements() -> None:
    assert (SPEC.item_bytes, SPEC.size_bytes, str(SPEC)) == (2, 12, "layer.weight BF16[2, 3]")
    assert TensorSpec("scalar", "F64", ()).size_bytes == 8
    assert TensorSpec("empty", "F64", (3, 0)).size_bytes == 0
    assert {TensorSpec("x", dtype, (1,)).size_bytes for dtype in DTYPE_BYTES} == {1, 2, 4, 8}


@pytest.mark.parametrize("name", ["w", "módulo.重み", "a/b", "emoji 🚀", ".hidden", "x" * 512, "é" * 256])
def test_a_tensor_may_have_any_unicode_name(name: str) -> None:
    assert tensor_name_problem(name) is None
    assert Manifest((entry(name),)).by_name[name].spec.name == name


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("", "empty"),
        ("..", "'..'"),
        ("../../etc/passwd", "'..'"),
        ("a/../b", "'..'"),
        ("nul\0", "NUL"),
        ("\ud800", "Unicode"),
        ("x" * 513, "longer than 512 bytes"),
        ("é" * 257, "longer than 512 bytes"),
    ],
)
def test_a_name_that_can_do_harm_is_refused(name: str, problem: str) -> None:
    assert problem in (tensor_name_problem(name) or "")
    with pytest.raises(ValueError, match="tensor name"):
        TensorSpec(name, "F32", (1,))


@pytest.mark.parametrize(
    ("dtype", "shape", "match"),
    [
        ("F4", (1,), "dtype 'F4' is not supported"),
        ("bf16", (1,), "dtype"),
        ("F32", (-1,), "size -1"),
        ("F32", (0, -1), "size -1"),
        ("F32", (1,) * 17, "more than 16 dims"),
        ("F32", (1 << 47, 2), "bytes"),
        ("U8", (0, 1 << 64), "size 18446744073709551616"),  # would not fit the fingerprint's 64 bits
    ],
)
def test_a_spec_out_of_range_is_refused(dtype: str, shape: tuple[int, ...], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        TensorSpec("w", dtype, shape)


def test_the_largest_shapes_still_have_a_fingerprint() -> None:
    assert TensorSpec("w", "U8", (LIMITS.tensor_bytes,)).size_bytes == LIMITS.tensor_bytes
    assert len(Manifest((entry("w", "U8", (0, *[LIMITS.tensor_bytes] * 15)),)).fingerprint) == 32


@pytest.mark.parametrize("digest", [b"", D1[:-1], D1 + b"\0"])
def test_a_digest_has_32_bytes(digest: bytes) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        TensorEntry(SPEC, digest)
    with pytest.raises(ValueError, match="32 bytes"):
        DeltaTensor(SPEC, digest, True, False)


def test_a_manifest_is_sorted_by_utf8_bytes_and_has_no_name_twice() -> None:
    names = ["a", "B", "é", "\ue000", "🚀"]  # by UTF-8 bytes, which is neither dictionary nor UTF-16 order
    for order in permutations(names):
        assert [item.spec.name for item in Manifest.of(map(entry, order)).tensors] == ["B", "a", "é", "\ue000", "🚀"]
    with pytest.raises(ValueError, match="sorted and unique"):
        Manifest((entry("b"), entry("a")))
    with pytest.raises(ValueError, match="sorted and unique"):
        Manifest.of([entry("a", digest=D1), entry("a", digest=D2)])


def test_a_manifest_has_a_limited_number_of_tensors() -> None:
    entries = tuple(entry(f"{n:06d}") for n in range(LIMITS.tensors + 1))
    assert len(Manifest(entries[:-1]).tensors) == LIMITS.tensors
    with pytest.raises(ValueError, match="100001 tensors exceed 100000"):
        Manifest(entries)


def test_a_manifest_tells_what_changed_in_bytes_type_or_shape() -> None:
    base = Manifest.of([entry("same"), entry("bytes"), entry("type"), entry("shape", shape=(4,))])
    target = Manifest.of(
        [entry("same"), entry("bytes", digest=D2), entry("type", "I32"), entry("shape", shape=(2, 2)), entry("new")]
    )
    assert [item.spec.name for item in target.changed_from(base)] == ["bytes", "new", "shape", "type"]
    assert target.changed_from(target) == ()
    assert target.changed_from(None) == target.tensors
    assert target.size_bytes == 8 + 8 + 8 + 16 + 8


def test_a_fingerprint_does_not_depend_on_the_order_of_tensors() -> None:
    entries = [entry("a"), entry("b", digest=D2), entry("c", "I8", (3, 1))]
    assert len({Manifest.of(order).fingerprint for order in permutations(entries)}) == 1


def test_a_fingerprint_depends_on_every_field() -> None:
    whole = [entry("a"), entry("b", "F32", (2, 3), D2)]
    variants = [
        whole,
        whole[:1],
        [],
        [whole[0], entry("c", "F32", (2, 3), D2)],  # name
        [whole[0], entry("b", "I32", (2, 3), D2)],  # dtype
        [whole[0], entry("b", "F32", (3, 2), D2)],  # shape
        [whole[0], entry("b", "F32", (6,), D2)],
        [whole[0], entry("b", "F32", (2, 3, 1), D2)],
        [whole[0], entry("b", "F32", (2, 3), D3)],  # bytes
        [entry("a", digest=D2), entry("b", "F32", (2, 3), D1)],  # the same digests, exchanged
    ]
    assert len({Manifest.of(entries).fingerprint for entries in variants}) == len(variants)


def test_fields_of_a_fingerprint_do_not_run_into_each_other() -> None:
    pairs = [
        (entry("aF", "F32"), entry("a", "F32")),
        (entry("wB", "F16"), entry("w", "BF16")),  # "wB" + "F16" and "w" + "BF16" are the same letters
        (entry("wU", "I8"), entry("w", "I8")),
        (entry("w", "U8", (1, 2)), entry("w", "U8", (1 | 2 << 8,))),
        (entry("w", "U8", ()), entry("w", "U8", (0,))),
        (entry("w", "U8", (0, 1)), entry("w", "U8", (1, 0))),
    ]
    for left, right in pairs:
        assert Manifest((left,)).fingerprint != Manifest((right,)).fingerprint


def test_names_that_look_alike_are_different_tensors() -> None:
    composed = "é"
    decomposed = unicodedata.normalize("NFD", composed)
    both = Manifest.of([entry(composed), entry(decomposed)])
    assert len(both.by_name) == 2
    assert Manifest((entry(composed),)).fingerprint != Manifest((entry(decomposed),)).fingerprint


def test_the_fingerprint_of_known_versions_never_changes() -> None:
    # Recorded once: stores, logs and acks out there are named by these.
    assert fingerprint(Manifest(())).hex() == "b1ad39aacb1dd61d334f4a95effb9b299706114db9883024ee5412b2944b6bd4"
    known = Manifest.of([entry("layer.weight", "BF16", (2, 3), D1), entry("scale", "F32", (), D2)])
    assert fingerprint(known).hex() == "9e80057bede3657bad3280e0bd09d932cee8c180342af2cc347674cbdb24ce99"


BIG = TensorSpec("big", "F32", (LIMITS.block_bytes // 4 + 5,))
EMPTY = TensorSpec("empty", "U8", (0,))


@pytest.mark.parametrize(("spec", "carried", "based"), [(EMPTY, True, False), (BIG, False, True), (EMPTY, True, True)])
def test_only_a_carried_tensor_has_bytes_and_a_base(spec: TensorSpec, *, carried: bool, based: bool) -> None:
    with pytest.raises(ValueError, match="carried"):
        DeltaTensor(spec, D1, carried, based)


@pytest.mark.parametrize(
    ("size", "encoded"), [(0, 0), (LIMITS.block_bytes + 1, 1), (10, 11 + LIMITS.preface_bytes), (10, -1)]
)
def test_a_block_is_bounded_and_hardly_larger_than_what_it_encodes(size: int, encoded: int) -> None:
    with pytest.raises(ValueError, match="a block of"):
        Block(0, size, encoded)


def of_blocks(*sizes: int, based: bool = False) -> Index:
    tensors = (DeltaTensor(BIG, D1, True, based), DeltaTensor(TensorSpec("small", "U8", (3,)), D2, True, based))
    return Index(D1, D2, tensors, tuple(Block(0, size, 0) for size in sizes), 4, 0, (), ())


def test_blocks_fill_the_groups_of_carried_tensors() -> None:
    of_blocks(LIMITS.block_bytes, 20, 3)
    of_blocks(LIMITS.block_bytes - 4, 24, 1, 2)


@pytest.mark.parametrize(
    "sizes",
    [
        (),
        (LIMITS.block_bytes, 20),
        (LIMITS.block_bytes, 23),
        (LIMITS.block_bytes, 20, 3, 1),
        (LIMITS.block_bytes, 18, 2, 3),
    ],
)
def test_blocks_that_do_not_fill_the_groups_are_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="block"):
        of_blocks(*sizes)


def test_without_a_base_no_tensor_builds_on_one() -> None:
    index = of_blocks(LIMITS.block_bytes, 20, 3, based=True)
    with pytest.raises(ValueError, match="builds on no base"):
        replace(index, base=None)


INDEX = Index(
    D1, D2, (DeltaTensor(SPEC, D3, True, False),), (Block(0, SPEC.size_bytes, 10),), 4, 10, (D1, D2, D3), ("gone",)
)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"base": b""}, "base fingerprint"),
        ({"target": b""}, "target fingerprint"),
        ({"tensors": (*INDEX.tensors, *INDEX.tensors)}, "sorted and unique"),
        ({"chunk_bytes": 0}, "chunk size"),
        ({"chunk_bytes": LIMITS.chunk_bytes_max + 1}, "chunk size"),
        ({"body_bytes": 11}, "add up to 10"),
        ({"chunks": (D1, D2)}, "2 chunk digests"),
        ({"chunks": (D1, D2, D3, D3)}, "4 chunk digests"),
        ({"chunks": (D1, D2, b"")}, "chunk digest"),
        ({"base": None}, "removed from no base"),
        ({"removed": ("b", "a")}, "sorted and unique"),
        ({"removed": ("a", "a")}, "sorted and unique"),
    ],
)
def test_an_index_that_contradicts_itself_is_refused(change: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        replace(INDEX, **change)


PAYLOAD = PayloadRef("0" * 32, None, D1, 3, 10, 1, 100, D2)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"payload_id": "../x"}, "payload id"),
        ({"payload_id": "0" * 32 + "\n"}, "payload id"),
        ({"index_bytes": 0}, "index of 0"),
        ({"index_bytes": LIMITS.index_bytes + 1}, "index of"),
        ({"index_chunks": 0}, "index chunks"),
        ({"index_chunks": 101}, "index chunks"),
        ({"body_chunks": 11}, "body chunks"),
        ({"body_chunks": 0}, "body chunks"),  # a body that is nowhere
        ({"body_bytes": -1, "body_chunks": 0}, "body chunks"),
        ({"body_bytes": 3 * LIMITS.chunk_bytes_max + 1}, "body chunks"),  # chunks larger than a reader accepts
        ({"carrier": "pigeons"}, "carrier 'pigeons'"),
    ],
)
def test_a_payload_that_contradicts_itself_is_refused(change: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        replace(PAYLOAD, **change)


def test_a_payload_may_have_an_index_and_no_body() -> None:
    assert replace(PAYLOAD, body_bytes=0, body_chunks=0).size_bytes == 100
    assert PAYLOAD.size_bytes == 110
