"""Key files that nobody else reads, and trust files that are whole at any moment."""

from __future__ import annotations

import base64
import os
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from refleet.common.errors import UsageError
from refleet.common.signing import SigningKey, Trust

PAYLOAD = b"the exact bytes of a record"
PEM, PKCS8, CLEAR = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()


@pytest.fixture
def key() -> SigningKey:
    return SigningKey.new()


def test_a_key_survives_its_file(key: SigningKey, tmp_path: Path) -> None:
    key.save(tmp_path / "key")
    loaded = SigningKey.load(tmp_path / "key")
    assert (loaded.key_id, loaded.public_text) == (key.key_id, key.public_text)
    assert loaded.sign(PAYLOAD) == key.sign(PAYLOAD)
    assert (tmp_path / "key").read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----")


def test_a_key_has_one_public_line(key: SigningKey) -> None:
    kind, text, comment = key.public_text.split(" ")
    assert kind == "refleet-ed25519"
    assert len(base64.b64decode(text)) == 32
    assert comment == key.key_id.hex()


def test_a_new_key_file_is_never_open_to_others(
    key: SigningKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []
    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        modes.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        real_fsync(descriptor)

    old = os.umask(0)
    try:
        monkeypatch.setattr(os, "fsync", fsync)
        key.save(tmp_path / "key")
    finally:
        os.umask(old)
    assert modes[0] == 0o600  # not only once it was written
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600


def test_a_key_file_is_never_overwritten(key: SigningKey, tmp_path: Path) -> None:
    key.save(tmp_path / "key")
    before = (tmp_path / "key").read_bytes()
    with pytest.raises(UsageError, match="exists"):
        SigningKey.new().save(tmp_path / "key")
    assert (tmp_path / "key").read_bytes() == before
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="exists"):
        key.save(tmp_path / "link")
    with pytest.raises(UsageError, match="No such file"):
        key.save(tmp_path / "no folder" / "key")


def test_a_key_that_could_not_be_written_leaves_no_file(
    key: SigningKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match="No space left"):
        key.save(tmp_path / "key")
    with pytest.raises(UsageError, match="No space left"):
        Trust.add(tmp_path / "trust", key.public_text)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620, 0o601])
def test_a_key_file_open_to_others_is_refused(mode: int, key: SigningKey, tmp_path: Path) -> None:
    path = tmp_path / "key"
    key.save(path)
    path.chmod(mode)
    with pytest.raises(UsageError, match=f"mode {mode:04o}") as caught:
        SigningKey.load(path)
    assert caught.value.next == f"chmod 600 {path}"
    path.chmod(0o400)
    assert SigningKey.load(path).key_id == key.key_id


def pem(private: ec.EllipticCurvePrivateKey | Ed25519PrivateKey, passphrase: bytes = b"") -> bytes:
    return private.private_bytes(PEM, PKCS8, serialization.BestAvailableEncryption(passphrase) if passphrase else CLEAR)


BAD_KEYS = {
    "not a PEM": b"not a key",
    "not a PEM ": b"",
    "not a PEM  ": b"\xff" * 100,
    "of another kind than Ed25519": pem(ec.generate_private_key(ec.SECP256R1())),
    "is encrypted": pem(Ed25519PrivateKey.generate(), b"secret"),
    "not a regular file of at most": b"x" * ((1 << 20) + 1),
}


@pytest.mark.parametrize("match", BAD_KEYS)
def test_a_file_that_is_no_key_is_refused(match: str, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.touch(mode=0o600)
    path.write_bytes(BAD_KEYS[match])
    with pytest.raises(UsageError, match=match.strip()) as caught:
        SigningKey.load(path)
    assert caught.value.about == str(path)


@pytest.mark.timeout(10)
def test_a_path_that_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    for path, match in (
        (tmp_path / "missing", "No such file"),
        (tmp_path, "directory"),
        (tmp_path / "pipe", "regular"),
    ):
        with pytest.raises(UsageError, match=match):
            SigningKey.load(path)
        with pytest.raises(UsageError, match=match):
            Trust.load(path)


def test_a_trust_file_keeps_its_comments_and_gains_a_line(key: SigningKey, tmp_path: Path) -> None:
    path = tmp_path / "trust"
    other = SigningKey.new()
    path.write_text(f"# trainers\r\n\n  {other.public_text} Zoë's laptop\n# no newline at the end")
    assert Trust.add(path, f" {key.public_text}\n")
    assert path.read_bytes().decode().endswith(f"# no newline at the end\n{key.public_text}\n")
    assert path.read_text().startswith("# trainers\n\n")
    keys = Trust.load(path).keys
    assert set(keys) == {key.key_id, other.key_id}
    assert all(isinstance(public, Ed25519PublicKey) for public in keys.values())


def test_a_key_is_added_once(key: SigningKey, tmp_path: Path) -> None:
    path = tmp_path / "trust"
    assert Trust.add(path, key.public_text)
    before = path.read_bytes()
    assert not Trust.add(path, key.public_text + " with another comment")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_trust_file_behind_a_link_stays_there(key: SigningKey, tmp_path: Path) -> None:
    (tmp_path / "real").touch()
    (tmp_path / "link").symlink_to("real")
    Trust.add(tmp_path / "link", key.public_text)
    assert (tmp_path / "link").is_symlink()
    assert set(Trust.load(tmp_path / "real").keys) == {key.key_id}


def test_a_trust_file_is_whole_at_any_moment(key: SigningKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "trust"
    Trust.add(path, key.public_text)
    before = path.read_bytes()
    seen = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: seen.append(path.read_bytes()))
    Trust.add(path, SigningKey.new().public_text)
    assert seen[0] == before  # while the new content is flushed
    assert path.read_bytes().startswith(before)


GOOD = base64.b64encode(bytes(range(32))).decode()
BAD_LINES = {
    "another kind": f"ssh-ed25519 {GOOD} me",
    "no key": "refleet-ed25519",
    "not base64": "refleet-ed25519 !!!! me",
    "not ASCII": f"refleet-ed25519 é{GOOD} me",
    "31 bytes": f"refleet-ed25519 {base64.b64encode(bytes(31)).decode()} me",
    "33 bytes": f"refleet-ed25519 {base64.b64encode(bytes(33)).decode()} me",
    "cut": f"refleet-ed25519 {GOOD[:-1]} me",
    "junk inside": f"refleet-ed25519 {GOOD[:5]}!{GOOD[5:]} me",
    "a private key": "-----BEGIN PRIVATE KEY-----",
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_malformed_line_is_refused_by_its_number(name: str, key: SigningKey, tmp_path: Path) -> None:
    path = tmp_path / "trust"
    path.write_text(f"# first\n{key.public_text}\n{BAD_LINES[name]}\n")
    with pytest.raises(UsageError, match="line 3 ") as caught:
        Trust.load(path)
    assert caught.value.about == str(path)
    with pytest.raises(UsageError, match="line 3 "):
        Trust.add(path, SigningKey.new().public_text)
    with pytest.raises(UsageError, match="line 1 "):
        Trust.add(tmp_path / "other", BAD_LINES[name])
    assert not (tmp_path / "other").exists()


def test_exactly_one_line_is_added(key: SigningKey, tmp_path: Path) -> None:
    for lines in ("", "# a comment", f"{key.public_text}\n{SigningKey.new().public_text}"):
        with pytest.raises(UsageError, match="one public key"):
            Trust.add(tmp_path / "trust", lines)
    (tmp_path / "trust").write_bytes(b"\xff\n")
    with pytest.raises(UsageError, match="UTF-8"):
        Trust.load(tmp_path / "trust")
