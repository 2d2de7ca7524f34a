"""Every decoder of bytes from outside, with valid inputs to begin from: what the fuzzer and its corpus run.

A decoder may refuse with an error of refleet's tree, or accept. Anything else is a finding.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import refleet.publisher.book
import refleet.worker.state  # noqa: F401 - both register records
from bundle_twin import built
from refleet.common import codec, layout, preface, wire
from refleet.common.config import settings
from refleet.common.delta import Encoder, Input, target_manifest, unpack_index
from refleet.common.deltas import DeltaFile, StoredDelta
from refleet.common.digest import digest_of, tensor_digest
from refleet.common.host_image import Image
from refleet.common.limits import MIB
from refleet.common.manifests import Manifests
from refleet.common.pack import Pack, table_bytes
from refleet.common.records import read_file
from refleet.common.signing import SigningKey, Trust, open_envelope, seal
from refleet.common.store import Store
from refleet.common.types import DTYPE_BYTES, DeltaTensor, Index, Manifest, TensorEntry, TensorSpec
from refleet.common.unsettled import Unsettled
from refleet.publisher.checkpoint import open_checkpoint
from refleet.publisher.safetensors_header import header_bytes, parse_header
from refleet.worker.bundle import Bundle, save
from refleet.worker.bundle_record import RECORD
from refleet.worker.early_decode import EarlyDecoder
from test_wire import GOLDEN, KEY, RECORDS


@dataclass(frozen=True, slots=True)
class Decoder:
    """`decode` takes any bytes. `repair` makes checksums right again, so that what they guard is reached, too.

    `words` are what texts of this format are made of. `memory_bytes`: what a case may take at most.
    """

    name: str
    decode: Callable[[bytes], object]
    seeds: Sequence[bytes]
    words: Sequence[bytes] = ()
    repair: Callable[[bytes], bytes] | None = None
    memory_bytes: int = 4 * MIB


def decoders(folder: Path, *, only: Sequence[str] = ()) -> list[Decoder]:
    """All of them; `folder` is empty and theirs."""
    made = [*_records(), *_codecs(), *_bodies(folder), *_checkpoints(folder), *_files(folder), *_settings(folder)]
    made.append(_bundle(folder))
    return [decoder for decoder in made if not only or decoder.name in only]


# ---------------------------------------------------------------------- records


def _records() -> list[Decoder]:
    golden = [bytes.fromhex(text) for text in GOLDEN.values()]
    kinds = tuple(wire._TAGS)
    trust = Trust({KEY.key_id: KEY._private.public_key()})
    sealed = [seal(wire.pack(record), key) for record in list(RECORDS.values())[:6] for key in (KEY, None)]
    indexes = [data for data in golden if b"index" in data[:8]]

    def envelope(data: bytes) -> None:
        for trusted in (None, trust):
            wire.unpack_any(open_envelope(data, trusted).payload, kinds)

    def index(data: bytes) -> None:
        target_manifest(unpack_index(data), None)

    return [
        Decoder("record", lambda data: wire.unpack_any(data, kinds), golden),
        Decoder("envelope", envelope, sealed),
        Decoder("index", index, [wire.pack(Index(None, b"t" * 32, (), (), 4096, 0, (), ())), *indexes]),
    ]


# ---------------------------------------------------------------------- codecs and bodies

_ELEMENTS = 700
_DTYPES = ("BF16", "F32", "U8", "F64", "F16")


def _pair(dtype: str) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    random = np.random.default_rng(3)
    base = random.integers(0, 256, _ELEMENTS * DTYPE_BYTES[dtype], dtype=np.uint8)
    new = base.copy()
    new.view(f"<u{DTYPE_BYTES[dtype]}")[:: random.integers(5, 30)] += 1
    return base, new


def _codecs() -> list[Decoder]:
    """The first byte of an input chooses the dtype."""

    def decoder(number: int) -> Decoder:
        def decode(data: bytes) -> None:
            dtype = _DTYPES[data[0] % len(_DTYPES)] if data else "U8"
            base, _ = _pair(dtype)
            room = np.full(base.size + 128, 0xA5, np.uint8)
            try:
                codec.decode_block(number, data[1:], room[64:-64], base, dtype=dtype)
            finally:
                assert (room[:64] == 0xA5).all() and (room[-64:] == 0xA5).all(), "wrote outside of the block"

        seeds = []
        for at, dtype in enumerate(_DTYPES):
            base, new = _pair(dtype)
            smooth = np.zeros_like(new)
            for target in (new, smooth, base):
                encoded = codec.CODECS[number].encode(target, base, dtype=dtype)
                if encoded is not None:
                    seeds.append(bytes([at]) + bytes(encoded))
        return Decoder(f"codec-{codec.CODECS[number].name}", decode, seeds or [b"\0"])

    return [decoder(number) for number in sorted(codec.CODECS)]


_SIZES = {"a": 900, "b": 64, "c": 5000}


def _tensors() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:  # type: ignore[type-arg]
    """Two versions of a few tensors, as bytes."""
    random = np.random.default_rng(5)
    before = {
        name: random.integers(0, 256, size, dtype=np.uint8) for name, size in (("a", 900), ("b", 64), ("c", 5000))
    }
    after = {name: data.copy() for name, data in before.items()}
    for data in after.values():
        data[::37] += 1
    return before, after


def _manifest(tensors: dict[str, np.ndarray]) -> Manifest:  # type: ignore[type-arg]
    return Manifest.of(TensorEntry(TensorSpec(n, "U8", (d.size,)), tensor_digest(d.data)) for n, d in tensors.items())


def _body() -> bytes:
    before, after = _tensors()
    encoder = Encoder(Input("U8", after[name], before[name], at) for at, name in enumerate(sorted(before)))
    return b"".join(bytes(chunk) for chunk in encoder.chunks())


def _bodies(folder: Path) -> list[Decoder]:
    before, _ = _tensors()
    manifest, store = _manifest(before), Store(folder / "store")
    with store.batch() as batch:
        for data in before.values():
            batch.add((data.data,))
    body = _body()

    def early(data: bytes) -> None:
        decoder = EarlyDecoder(manifest, store)
        for start in range(0, len(data), 500):
            decoder.feed(memoryview(data)[start : start + 500])

    return [
        Decoder("preface", preface.unpacked, [body, preface.packed(1, 9, (3, 9), 4, 70)]),
        Decoder("body", early, [body], memory_bytes=24 * MIB),
    ]


# ---------------------------------------------------------------------- checkpoints

_JSON = tuple(b'{ } [ ] : , "dtype" "shape" "data_offsets" "__metadata__" "weight_map" "F32" -1 1e9 null ..'.split())


def _checkpoints(folder: Path) -> list[Decoder]:
    place = folder / "m.safetensors"
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [], "data_offsets": [24, 26]},
    }
    text = json.dumps(header).encode()
    whole = len(text).to_bytes(8, "little") + text + bytes(26)
    shards = folder / "sharded"
    shards.mkdir()
    (shards / "model-1.safetensors").write_bytes(whole)
    listed = json.dumps({"metadata": {}, "weight_map": dict.fromkeys("ab", "model-1.safetensors")}).encode()

    def single(data: bytes) -> None:
        size = header_bytes(data[:9], file_bytes=len(data), path=place)
        parse_header(data[8 : 8 + size], file_bytes=len(data), path=place)

    def index(data: bytes) -> None:
        place = shards / "model.safetensors.index.json"
        place.write_bytes(data)
        os.utime(place, (1, 1))  # one that was written just now is waited for
        open_checkpoint(shards).close()

    def sized(data: bytes) -> bytes:
        return (len(data) - 34).to_bytes(8, "little") + data[8:] if len(data) > 34 else data

    return [
        Decoder("safetensors", single, [whole], _JSON, sized),
        Decoder("shards", index, [listed], _JSON),
    ]


# ---------------------------------------------------------------------- files of the store


def _checked(data: bytes) -> bytes:
    return digest_of(data[32:]) + data[32:] if len(data) >= 32 else data


def _delta_checked(data: bytes) -> bytes:
    """The footer's size and checksum as they belong to the record, which begins where the body of the seed ends."""
    body_bytes = len(_body())
    if len(data) < body_bytes + 56:
        return data
    record = data[body_bytes:-56]
    return data[:-56] + len(record).to_bytes(8, "little") + digest_of(record) + data[-16:]


def _pack_checked(data: bytes) -> bytes:
    """The checksum of whatever table the footer names."""
    start = int.from_bytes(data[-64:-56], "little")
    if len(data) < 64 or start > len(data):
        return data
    return data[:-48] + digest_of(data[start:-64], data[-64:-48]) + data[-16:]


def _files(folder: Path) -> list[Decoder]:
    before, after = _tensors()
    old, new = _manifest(before), _manifest(after)
    encoder = Encoder(Input("U8", after[name], before[name], at) for at, name in enumerate(sorted(before)))
    body = b"".join(bytes(chunk) for chunk in encoder.chunks())
    changed = [DeltaTensor(e.spec, e.digest, True, True) for e in new.tensors]
    record = wire.pack(StoredDelta.of(encoder.index(changed, target=new, base=old), changed, old))
    delta = body + record + len(record).to_bytes(8, "little") + digest_of(record) + b"refleet delta 1\n"
    data = b"".join(bytes(tensor) for tensor in before.values()).ljust(6016, b"\0")
    table = table_bytes({old.by_name["a"].digest: (0, 900), old.by_name["b"].digest: (900, 64)}, at=len(data))
    states = [bytes.fromhex(text) for text in GOLDEN.values()]
    paths = {name: folder / name for name in ("x.delta", "x.pack", "x.image", "record")}
    manifests = Manifests(folder / "manifests", temp=folder, unsettled=Unsettled())
    manifests.folder.mkdir()
    manifest_path = manifests.folder / old.fingerprint.hex()
    kinds = tuple(wire._TAGS)

    def stored_delta(data: bytes) -> None:
        paths["x.delta"].write_bytes(data)
        file = DeltaFile.open(paths["x.delta"])
        tensors = file.record.tensors
        if sum(tensor.size_bytes for tensor in tensors) > MIB:
            return  # as large as it says: whoever rebuilds it takes that
        out = [np.zeros(tensor.size_bytes, np.uint8) for tensor in tensors]
        base = [np.zeros(tensor.size_bytes, np.uint8) for tensor in tensors]
        with file.reading() as read:
            for place in file.places():
                encoded = read(place.offset, place.block.encoded_bytes)
                dtype = tensors[place.spans[0].number].dtype
                layout.decode(place, encoded, dtype=dtype, base=base.__getitem__, out=out.__getitem__)

    def pack(data: bytes) -> None:
        paths["x.pack"].write_bytes(data)
        found = Pack.open(paths["x.pack"])
        for digest in list(found.objects)[:20]:
            found.read(digest, verify=True)

    def image(data: bytes) -> None:
        paths["x.image"].write_bytes(data)
        found = Image.open(paths["x.image"])
        for digest in list(found.objects)[:20]:
            tensor_digest(found.read(digest).data)

    def state(data: bytes) -> None:
        paths["record"].write_bytes(data)
        held = read_file(paths["record"])
        assert held is not None
        wire.unpack_any(held, kinds)

    def manifest(data: bytes) -> None:
        manifest_path.write_bytes(data)
        manifests.get(old.fingerprint)

    held = wire.pack(old)
    return [
        Decoder("stored-delta", stored_delta, [delta], repair=_delta_checked),
        Decoder("pack", pack, [data + table], repair=_pack_checked),
        Decoder("host-image", image, [data + table], repair=_pack_checked),
        Decoder("state", state, [digest_of(record) + record for record in states], repair=_checked),
        Decoder("manifest", manifest, [digest_of(held) + held], repair=_checked),
    ]


# ---------------------------------------------------------------------- settings, keys, bundles


def _settings(folder: Path) -> list[Decoder]:
    config, trust, key = folder / "refleet.toml", folder / "trust", folder / "key"
    SigningKey.new().save(folder / "made")
    private, public = (folder / "made").read_bytes(), SigningKey.load(folder / "made").public_text.encode()
    key.touch(mode=0o600)

    def load(path: Path, loader: Callable[[Path], object]) -> Callable[[bytes], object]:
        def decode(data: bytes) -> object:
            path.write_bytes(data)
            return loader(path)

        return decode

    toml = b'redis = "redis://u:p@h:6379/0"\nstore = "./s"\nkey = "k"\ntrust = "t"\ncarrier = "blobs"\n'
    return [
        Decoder(
            "config", load(config, lambda path: settings({"REFLEET_CONFIG": str(path)})), [toml],
            tuple(b'redis store [ ] { } = " """ \\u 1979-05-27 inf 0x _ [[a]] a.b'.split()),
        ),
        Decoder("trust", load(trust, Trust.load), [public + b"\n", b"# who\n" + public + b"\r\n" + public], (b"#",)),
        Decoder("key", load(key, SigningKey.load), [private], (b"-----BEGIN", b"ENCRYPTED", b"PRIVATE KEY-----")),
    ]  # fmt: skip


def _bundle(folder: Path) -> Decoder:
    made = folder / "bundle"
    save(built(), made)
    record = made / RECORD

    def decode(data: bytes) -> None:
        record.write_bytes(data)
        Bundle.open(made)

    return Decoder("bundle", decode, [record.read_bytes()], repair=_checked, memory_bytes=16 * MIB)
