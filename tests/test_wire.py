"""Golden bytes of every record. Spoiled records are in test_wire_strict.py, random ones in test_wire_fuzz.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from refleet.common import wire
from refleet.common.errors import MalformedRecord
from refleet.common.messages import (
    Ack,
    Coming,
    Evidence,
    Failure,
    Lease,
    Offer,
    Release,
    Serving,
    Verified,
    VerifyRequest,
    Want,
    WorkerStatus,
)
from refleet.common.signing import Envelope, SigningKey, seal
from refleet.common.types import Block, DeltaTensor, Index, Manifest, PayloadRef, TensorEntry, TensorSpec

A, B, C = "11" * 32, "22" * 32, "33" * 32  # digests
N, P = "0" * 31 + "a", "0" * 31 + "b"  # ids of 32 hex digits
a, b, c = bytes.fromhex(A), bytes.fromhex(B), bytes.fromhex(C)

SPEC = TensorSpec("layer.0.weight", "BF16", (2, 300))
REF = PayloadRef(P, a, b, 1, 1000, 1, 200, c)
FAILURE = Failure("DigestMismatch", "bytes differ", "layer.0.weight")
SERVING = Serving("v16", 3, 6, a)
RELEASE = Release("chat", N, 3, 7, "publish", "v17", b, a, REF, 1, 2, 1200, 1204, 1_700_000_000_000, "näher", True)
KEY = SigningKey(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))

RECORDS = {
    "release": RELEASE,
    "release without payload": replace(
        RELEASE, kind="rollback", seq=8, payload=None, payload_bytes=0, message="", restructure=False
    ),
    "first release": replace(RELEASE, base=None, payload=None),
    "coming": Coming("chat", N, 3, P, a, "blobs", 4096),
    "offer": Offer("chat", N, 3, REF),
    "verify request": VerifyRequest("chat", N, 1_700_000_000_000, True),
    "index": Index(
        a,
        b,
        (DeltaTensor(SPEC, c, True, True), DeltaTensor(TensorSpec("z", "U8", (0,)), a, False, False)),
        (Block(2, 1200, 70),),
        64,
        70,
        (b, c),
        ("alt", "bias"),
    ),
    "empty index": Index(None, b, (), (), 4096, 0, (), ()),
    "manifest": Manifest((TensorEntry(TensorSpec("b", "F32", ()), a), TensorEntry(SPEC, b))),
    "payload": REF,
    "ack": Ack(
        "gpu-1",
        "chat",
        3,
        7,
        "v17",
        Evidence.SERVING,
        b,
        "v17",
        "torch 2.13 cpu",
        1200,
        {"fetch": 1.5, "refit": 0.25},
        c,
        FAILURE,
        Verified(N, False, 2, "layer.0.weight", a, "warum", b),
        "refitted in place",
    ),
    "smallest ack": Ack("gpu-1", "chat", 3, 7, "v17", Evidence.NONE, None, None, "", 0),
    "status": WorkerStatus(
        "gpu-1",
        P,
        "chat",
        "staging",
        SERVING,
        Serving("v17", 3, 7, b),
        Evidence.RECEIVED,
        FAILURE,
        100,
        1200,
        (a,),
        Want(b, (c,), (P,)),
        3,
        1,
        FAILURE,
        True,
        "torch 2.13 cpu",
        2.0,
        1_700_000_000_000,
    ),
    "smallest status": WorkerStatus(
        "gpu-1", P, "chat", "starting", None, None, Evidence.NONE, None, 0, 0, (), None, 0, 0, None, False, "", 0.5, 0
    ),
    "lease": Lease(N, 3, "host-1", "/srv/refleet", 4242),
    "envelope": Envelope(None, None, b"payload"),
}

#: If one of these changes, every worker and every state file out there must be able to read both: raise wire.FORMAT.
N_TEXT, P_TEXT = N.encode().hex(), P.encode().hex()
GOLDEN = {
    "release": (
        f"dc0012a772656c6561736504a463686174d920{N_TEXT}0307a77075626c697368a3763137c420{B}c420{A}99d920{P_TEXT}c420"
        f"{A}c420{B}01cd03e801ccc8c420{C}a673747265616d0102cd04b0cd04b4cf0000018bcfe56800a66ec3a4686572c3"
    ),
    "release without payload": (
        f"dc0012a772656c6561736504a463686174d920{N_TEXT}0308a8726f6c6c6261636ba3763137c420{B}c420{A}c0010200cd04b4cf00"
        "00018bcfe56800a0c2"
    ),
    "first release": (
        f"dc0012a772656c6561736504a463686174d920{N_TEXT}0307a77075626c697368a3763137c420{B}c0c00102cd04b0cd04b4cf00000"
        "18bcfe56800a66ec3a4686572c3"
    ),
    "coming": f"99a6636f6d696e6704a463686174d920{N_TEXT}03d920{P_TEXT}c420{A}a5626c6f6273cd1000",
    "offer": (
        f"96a56f6666657204a463686174d920{N_TEXT}0399d920{P_TEXT}c420{A}c420{B}01cd03e801ccc8c420{C}a673747265616d"
    ),
    "verify request": f"96a676657269667904a463686174d920{N_TEXT}cf0000018bcfe56800c3",
    "index": (
        f"9aa5696e64657804c420{A}c420{B}929493ae6c617965722e302e776569676874a4424631369202cd012cc420{C}c3c39493a17aa25"
        f"5389100c420{A}c2c2919302cd04b046404692c420{B}c420{C}92a3616c74a462696173"
    ),
    "empty index": f"9aa5696e64657804c0c420{B}9090cd1000009090",
    "manifest": (
        f"93a86d616e696665737404929293a162a346333290c420{A}9293ae6c617965722e302e776569676874a4424631369202cd012cc420"
        f"{B}"
    ),
    "payload": f"9ba77061796c6f616404d920{P_TEXT}c420{A}c420{B}01cd03e801ccc8c420{C}a673747265616d",
    "ack": (
        f"dc0011a361636b04a56770752d31a4636861740307a376313705c420{B}a3763137ae746f72636820322e313320637075cd04b082a56"
        f"665746368cb3ff8000000000000a57265666974cb3fd0000000000000c420{C}93ae4469676573744d69736d61746368ac6279746573"
        f"20646966666572ae6c617965722e302e77656967687497d920{N_TEXT}c202ae6c617965722e302e776569676874c420{A}a57761727"
        f"56dc420{B}b1726566697474656420696e20706c616365"
    ),
    "smallest ack": "dc0011a361636b04a56770752d31a4636861740307a376313700c0c0a00080c0c0c0a0",
    "status": (
        f"dc0015a6776f726b657204a56770752d31d920{P_TEXT}a463686174a773746167696e6794a37631360306c420{A}94a37631370307c"
        f"420{B}0193ae4469676573744d69736d61746368ac627974657320646966666572ae6c617965722e302e77656967687464cd04b091c4"
        f"20{A}93c420{B}91c420{C}91d920{P_TEXT}030193ae4469676573744d69736d61746368ac627974657320646966666572ae6c61796"
        "5722e302e776569676874c3ae746f72636820322e313320637075cb4000000000000000cf0000018bcfe56800"
    ),
    "smallest status": (
        f"dc0015a6776f726b657204a56770752d31d920{P_TEXT}a463686174a87374617274696e67c0c000c0000090c00000c0c2a0cb3fe000"
        "000000000000"
    ),
    "lease": f"97a56c6561736504d920{N_TEXT}03a6686f73742d31ac2f7372762f7265666c656574cd1092",
    "envelope": "95a8656e76656c6f706504c0c0c4077061796c6f6164",
    "signed envelope": (
        "95a8656e76656c6f706504c40898ba85304ac639f0c44050957cf87b3e641534e455d3b3bd5bc75692a677c40b0929e72e2bc5299a10"
        "39e4707a158a01dbd53b691928ef0e15b283b8abed7f9945442b91211df33f6200c4077061796c6f6164"
    ),
}
RECORDS["signed envelope"] = wire.unpack(bytes.fromhex(GOLDEN["signed envelope"]), Envelope)


@pytest.mark.parametrize("name", RECORDS)
def test_every_record_has_its_golden_bytes(name: str) -> None:
    data = bytes.fromhex(GOLDEN[name])
    assert wire.pack(RECORDS[name]) == data
    assert wire.unpack(data, type(RECORDS[name])) == RECORDS[name]


def test_every_kind_of_record_is_among_the_golden_ones() -> None:
    modules = {f"refleet.common.{name}" for name in ("types", "messages", "signing")}
    ours = {kind for kind in wire._TAGS if kind.__module__ in modules}
    assert ours == {type(record) for record in RECORDS.values()}


def test_a_signature_of_a_fixed_key_never_changes() -> None:
    assert seal(b"payload", KEY).hex() == GOLDEN["signed envelope"]


def test_a_stream_of_several_kinds_gives_each_as_itself() -> None:
    for name in ("offer", "verify request"):
        assert wire.unpack_any(bytes.fromhex(GOLDEN[name]), (Offer, VerifyRequest)) == RECORDS[name]
    with pytest.raises(MalformedRecord, match="offer or verify, found 'lease'"):
        wire.unpack_any(bytes.fromhex(GOLDEN["lease"]), (Offer, VerifyRequest))
