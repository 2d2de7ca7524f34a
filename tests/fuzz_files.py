"""Decoders of files: checkpoints, the store's, settings and keys, bundles. See fuzz_decoders.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
from bundle_twin import built
from fuzz_scene import Decoder, body_between, manifest_of, two_versions
from refleet.common import layout, wire
from refleet.common.config import settings
from refleet.common.delta import Encoder, Input
from refleet.common.deltas import DeltaFile, StoredDelta
from refleet.common.digest import digest_of, tensor_digest
from refleet.common.host_image import Image
from refleet.common.limits import MIB
from refleet.common.manifests import Manifests
from refleet.common.pack import Pack, table_bytes
from refleet.common.records import read_file
from refleet.common.signing import SigningKey, Trust
from refleet.common.types import DeltaTensor
from refleet.common.unsettled import Unsettled
from refleet.publisher import source_file
from refleet.publisher.checkpoint import open_checkpoint
from refleet.publisher.safetensors_header import header_bytes, parse_header
from refleet.worker.bundle import Bundle, save
from refleet.worker.bundle_record import RECORD
from test_wire import GOLDEN


def decoders(folder: Path) -> list[Decoder]:
    """All of them."""
    return [*_checkpoints(folder), *_files(folder), *_settings(folder), _bundle(folder)]


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
        with mock.patch.object(source_file, "SETTLE_S", 0.0):  # one that was written just now is waited for
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
    body_bytes = len(body_between())
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
    before, after = two_versions()
    old, new = manifest_of(before), manifest_of(after)
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
