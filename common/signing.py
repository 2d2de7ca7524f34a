"""Signed envelopes, signing keys, and the trust file that says whose records count.

An envelope is a record around the exact bytes of another record: key id, Ed25519 signature, payload. The signature
covers `PREFIX` + payload, so a signature made for anything else is never one of ours. Nothing of the payload is parsed
before its signature was checked.

Trust file: text, one public key per line (`refleet-ed25519 <base64 of 32 bytes> <comment>`), `#` starts a comment line.
"""

from __future__ import annotations

import base64
import binascii
import os
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3
from cryptography.exceptions import InternalError, InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from . import wire
from .errors import BadSignature, LimitExceeded, UnknownKey, UsageError
from .limits import LIMITS

PREFIX = b"refleet record 1\0"
KEY_KIND = "refleet-ed25519"
ENVELOPE_BYTES = 128  # what an envelope adds at most to its payload: tag, format, key id, signature, lengths
_FILE_BYTES = 1 << 20  # neither a key file nor a trust file is larger


@wire.record("envelope")
@dataclass(frozen=True, slots=True)
class Envelope:
    """Key id (8 bytes) and signature (64 bytes), both or neither, and the bytes of a record."""

    key_id: bytes | None
    signature: bytes | None
    payload: bytes

    def __post_init__(self) -> None:
        if (self.key_id is None) != (self.signature is None):
            raise ValueError("key id without signature, or signature without key id")
        if self.key_id is not None and len(self.key_id) != 8:
            raise ValueError(f"a key id has 8 bytes, not {len(self.key_id)}")
        if self.signature is not None and len(self.signature) != 64:
            raise ValueError(f"a signature has 64 bytes, not {len(self.signature)}")


@dataclass(frozen=True, slots=True)
class Opened:
    """`key_id`: who signed, proven if a trust file was given, else only claimed. None: unsigned."""

    payload: bytes
    key_id: bytes | None


class SigningKey:
    """An Ed25519 private key. Its file is PEM (PKCS 8, no passphrase), readable by its owner only."""

    __slots__ = ("_private", "key_id", "public_bytes")

    def __init__(self, private: Ed25519PrivateKey):
        self._private = private
        self.public_bytes = private.public_key().public_bytes_raw()
        self.key_id = _key_id(self.public_bytes)

    @classmethod
    def new(cls) -> SigningKey:
        return cls(Ed25519PrivateKey.generate())

    @property
    def public_text(self) -> str:
        """The line for trust files; its comment is the key id that error messages name."""
        return f"{KEY_KIND} {base64.b64encode(self.public_bytes).decode()} {self.key_id.hex()}"

    def sign(self, payload: bytes) -> bytes:
        """64 bytes over `PREFIX` + `payload`."""
        return self._private.sign(PREFIX + payload)

    def save(self, path: Path | str) -> None:
        """Write a new file of mode 0600 and flush it to disk. Raises: UsageError if it exists or can't be written."""
        pem = self._private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        try:
            _write_new(Path(path), pem, mode=0o600)
        except FileExistsError:
            raise UsageError(
                "the key file exists; overwriting it would destroy the key in it",
                about=str(path),
                next="choose another path, or move the old key away",
            ) from None
        except OSError as error:
            raise UsageError(f"can't write the key file: {error.strerror}", about=str(path)) from None

    @classmethod
    def load(cls, path: Path | str) -> SigningKey:
        """Raises: UsageError for a file that is missing, open to others, not PEM, encrypted, or not Ed25519."""
        data = _read(Path(path), "key file", secret=True)
        new = "refleet keys new makes one"
        try:
            key = serialization.load_pem_private_key(data, password=None)
        except TypeError:  # this is how cryptography says that a password is needed
            raise UsageError("the key file is encrypted; refleet asks for no passphrase", about=str(path)) from None
        except (ValueError, UnsupportedAlgorithm, InternalError):  # the last one: OpenSSL on some damaged files
            raise UsageError("the key file is not a PEM private key (PKCS 8)", about=str(path), next=new) from None
        if not isinstance(key, Ed25519PrivateKey):
            raise UsageError("the key file holds a private key of another kind than Ed25519", about=str(path), next=new)
        return cls(key)


class Trust:
    """Public keys by key id: whose records are acted on. No keys: nobody's."""

    __slots__ = ("keys",)

    def __init__(self, keys: dict[bytes, Ed25519PublicKey]):
        self.keys = keys

    @classmethod
    def load(cls, path: Path | str) -> Trust:
        """Raises: UsageError for a missing file, or one with a malformed line (its number is named)."""
        return cls(_parse(_text(Path(path)), about=str(path)))

    @staticmethod
    def add(path: Path | str, line: str) -> bool:
        """Add one public line to the file at `path`, made if missing, replaced atomically. False: it was there before.

        Raises: UsageError for a malformed line, given or already in the file, or a file that can't be written.
        """
        file = Path(path).resolve()  # so that a symbolic link stays one
        line = line.strip()
        added = _parse(line, about="the public key to add")
        if len(added) != 1:
            raise UsageError(f"expected one public key, found {len(added)}", next=f"pass one line: {KEY_KIND} ...")
        old = _text(file) if file.exists() else ""
        if added.keys() <= _parse(old, about=str(path)).keys():
            return False
        if old and not old.endswith("\n"):
            old += "\n"
        temporary = file.with_name(f".{file.name}.{secrets.token_hex(8)}.tmp")
        try:
            _write_new(temporary, f"{old}{line}\n".encode(), mode=0o644, over=file)
        except OSError as error:
            raise UsageError(f"can't write the trust file: {error.strerror}", about=str(path)) from None
        return True


def seal(payload: bytes, key: SigningKey | None) -> bytes:
    """The envelope around the bytes of a record, signed if there is a key.

    Raises: LimitExceeded for a payload that no reader would take.
    """
    if len(payload) > LIMITS.record_bytes:
        raise LimitExceeded(f"a record of {len(payload)} bytes exceeds the limit of {LIMITS.record_bytes}")
    if key is None:
        return wire.pack(Envelope(None, None, payload))
    return wire.pack(Envelope(key.key_id, key.sign(payload), payload))


def open_envelope(data: bytes, trust: Trust | None) -> Opened:
    """The payload of an envelope. With `trust` it is signed by one of these keys; without, nothing is checked.

    Raises: LimitExceeded, MalformedRecord, BadSignature (also for an unsigned one), UnknownKey.
    """
    envelope = wire.unpack(data, Envelope, max_bytes=LIMITS.record_bytes + ENVELOPE_BYTES)
    if len(envelope.payload) > LIMITS.record_bytes:
        raise LimitExceeded(f"a record of {len(envelope.payload)} bytes exceeds the limit of {LIMITS.record_bytes}")
    if trust is None:
        return Opened(envelope.payload, envelope.key_id)
    if envelope.key_id is None or envelope.signature is None:
        raise BadSignature(
            "an unsigned record, but a trust file demands signatures",
            next="publish with --key, or run the worker without --trust",
        )
    public = trust.keys.get(envelope.key_id)
    if public is None:
        raise UnknownKey(
            f"signed by key {envelope.key_id.hex()}, which the trust file does not name",
            next="refleet keys trust, if that key is really your publisher's",
        )
    try:
        public.verify(envelope.signature, PREFIX + envelope.payload)
    except InvalidSignature:
        raise BadSignature(f"the signature of key {envelope.key_id.hex()} does not match the record") from None
    return Opened(envelope.payload, envelope.key_id)


def _key_id(public: bytes) -> bytes:
    return blake3(public).digest(length=8)


def _parse(text: str, *, about: str) -> dict[bytes, Ed25519PublicKey]:
    """The keys in the text of a trust file."""
    keys = {}
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), start=1):
        words = line.split(maxsplit=2)
        if not words or words[0].startswith("#"):
            continue
        public = _public_bytes(words)
        if public is None:
            raise UsageError(
                f"line {number} is not a public key: {line[:60]!r}",
                about=about,
                next=f"write it as refleet prints it: {KEY_KIND} <base64 of 32 bytes> <comment>",
            )
        keys[_key_id(public)] = Ed25519PublicKey.from_public_bytes(public)
    return keys


def _public_bytes(words: list[str]) -> bytes | None:
    if len(words) < 2 or words[0] != KEY_KIND:
        return None
    try:
        public = base64.b64decode(words[1], validate=True)
    except (binascii.Error, ValueError):
        return None
    return public if len(public) == 32 else None


def _read(path: Path, what: str, *, secret: bool) -> bytes:
    """A regular file of sane size; a secret one only if nobody else may touch it. Raises: UsageError."""
    try:
        # O_NONBLOCK: else opening a pipe that nobody writes would never return
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            state = os.fstat(file.fileno())  # of the opened file: nobody can swap it in between
            if not stat.S_ISREG(state.st_mode) or state.st_size > _FILE_BYTES:
                raise UsageError(f"the {what} is not a regular file of at most {_FILE_BYTES} bytes", about=str(path))
            mode = stat.S_IMODE(state.st_mode)
            if secret and os.name == "posix" and mode & 0o077:
                raise UsageError(
                    f"the {what} has mode {mode:04o}: others than its owner may use it",
                    about=str(path),
                    next=f"chmod 600 {path}",
                )
            return file.read(_FILE_BYTES)
    except OSError as error:
        raise UsageError(f"can't read the {what}: {error.strerror}", about=str(path)) from None


def _text(path: Path) -> str:
    try:
        return _read(path, "trust file", secret=False).decode()
    except UnicodeDecodeError:
        raise UsageError("the trust file is not UTF-8 text", about=str(path)) from None


def _write_new(path: Path, data: bytes, *, mode: int, over: Path | None = None) -> None:
    """Create `path` with `mode` and flush it to disk, then rename it over `over`. Leaves nothing behind on failure.

    Raises: FileExistsError, OSError.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if over is not None:
            path.replace(over)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
