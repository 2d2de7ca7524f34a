"""Who may tell the fleet what to serve: signed envelopes (I9). Key and trust files are in test_keys.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from refleet.common import signing, wire
from refleet.common.errors import BadSignature, LimitExceeded, MalformedRecord, UnknownKey
from refleet.common.limits import LIMITS
from refleet.common.signing import Envelope, SigningKey, Trust, open_envelope, seal

PAYLOAD = b"the exact bytes of a record"


@pytest.fixture
def key() -> SigningKey:
    return SigningKey.new()


@pytest.fixture
def trust(key: SigningKey, tmp_path: Path) -> Trust:
    Trust.add(tmp_path / "trust", key.public_text)
    return Trust.load(tmp_path / "trust")


def opened_as(data: bytes, **change: object) -> bytes:
    """The same envelope with other fields."""
    return wire.pack(replace(wire.unpack(data, Envelope), **change))


def test_a_trusted_signature_opens_and_names_its_key(key: SigningKey, trust: Trust) -> None:
    found = open_envelope(seal(PAYLOAD, key), trust)
    assert (found.payload, found.key_id) == (PAYLOAD, key.key_id)


@pytest.mark.parametrize("bit", range(0, 8 * len(PAYLOAD), 7))
def test_one_flipped_bit_of_the_payload_breaks_the_signature(bit: int, key: SigningKey, trust: Trust) -> None:
    spoiled = bytearray(PAYLOAD)
    spoiled[bit // 8] ^= 1 << bit % 8
    with pytest.raises(BadSignature, match="does not match"):
        open_envelope(opened_as(seal(PAYLOAD, key), payload=bytes(spoiled)), trust)


def test_a_flipped_bit_anywhere_in_an_envelope_is_never_accepted(key: SigningKey, trust: Trust) -> None:
    sealed = seal(PAYLOAD, key)
    for bit in range(8 * len(sealed)):
        spoiled = bytearray(sealed)
        spoiled[bit // 8] ^= 1 << bit % 8
        with pytest.raises((BadSignature, UnknownKey, MalformedRecord)):
            open_envelope(bytes(spoiled), trust)


def test_an_unsigned_record_is_refused_where_signatures_are_demanded(trust: Trust) -> None:
    with pytest.raises(BadSignature, match="unsigned"):
        open_envelope(seal(PAYLOAD, None), trust)


def test_a_signature_removed_on_the_way_is_refused(key: SigningKey, trust: Trust) -> None:
    with pytest.raises(BadSignature, match="unsigned"):
        open_envelope(opened_as(seal(PAYLOAD, key), key_id=None, signature=None), trust)


def test_a_key_that_nobody_trusts_is_refused_by_name(trust: Trust) -> None:
    stranger = SigningKey.new()
    with pytest.raises(UnknownKey, match=stranger.key_id.hex()) as caught:
        open_envelope(seal(PAYLOAD, stranger), trust)
    assert "refleet keys trust" in caught.value.next


def test_a_stranger_cannot_sign_under_a_trusted_key_id(key: SigningKey, trust: Trust) -> None:
    with pytest.raises(BadSignature, match="does not match"):
        open_envelope(opened_as(seal(PAYLOAD, SigningKey.new()), key_id=key.key_id), trust)


def test_a_signature_of_another_payload_is_refused(key: SigningKey, trust: Trust) -> None:
    other = wire.unpack(seal(b"another record", key), Envelope)
    with pytest.raises(BadSignature, match="does not match"):
        open_envelope(opened_as(seal(PAYLOAD, key), signature=other.signature), trust)


def test_a_signature_made_for_something_else_is_refused(trust: Trust, tmp_path: Path) -> None:
    private = Ed25519PrivateKey.generate()
    key = SigningKey(private)
    Trust.add(tmp_path / "trust", key.public_text)
    trust = Trust.load(tmp_path / "trust")
    # what any other program would make with the same key: no domain in front
    with pytest.raises(BadSignature, match="does not match"):
        open_envelope(wire.pack(Envelope(key.key_id, private.sign(PAYLOAD), PAYLOAD)), trust)
    assert open_envelope(wire.pack(Envelope(key.key_id, private.sign(b"refleet record 1\0" + PAYLOAD), PAYLOAD)), trust)


def test_without_a_trust_file_any_envelope_opens_unchecked(key: SigningKey) -> None:
    assert open_envelope(seal(PAYLOAD, None), None).key_id is None
    assert open_envelope(seal(PAYLOAD, key), None).key_id == key.key_id
    forged = opened_as(seal(PAYLOAD, key), payload=b"other")
    assert open_envelope(forged, None).payload == b"other"


def test_an_empty_trust_file_trusts_nobody(key: SigningKey, tmp_path: Path) -> None:
    (tmp_path / "trust").write_text("# nobody yet\n\n")
    trust = Trust.load(tmp_path / "trust")
    assert trust.keys == {}
    with pytest.raises(UnknownKey):
        open_envelope(seal(PAYLOAD, key), trust)
    with pytest.raises(BadSignature):
        open_envelope(seal(PAYLOAD, None), trust)


def test_the_largest_record_fits_and_a_larger_one_is_refused_on_both_sides(key: SigningKey, trust: Trust) -> None:
    largest = bytes(LIMITS.record_bytes)
    sealed = seal(largest, key)
    assert len(sealed) <= LIMITS.record_bytes + signing.ENVELOPE_BYTES
    assert open_envelope(sealed, trust).payload == largest
    with pytest.raises(LimitExceeded):
        seal(largest + b"\0", key)
    for sender, reader in ((None, None), (key, trust), (None, trust)):
        data = seal(b"", sender)
        with pytest.raises(LimitExceeded):
            open_envelope(opened_as(data, payload=largest + b"\0"), reader)
        with pytest.raises(LimitExceeded):
            open_envelope(bytes(LIMITS.record_bytes + signing.ENVELOPE_BYTES + 1), reader)
