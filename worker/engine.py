"""What the worker needs of an inference engine. `load_engine` makes the one that `--engine` names."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Protocol, TypeAlias

from ..common.digest import tensor_digest_of
from ..common.errors import NotRefittable
from ..common.messages import Serving
from ..common.types import Manifest, TensorSpec

if TYPE_CHECKING:
    from typing_extensions import Buffer

#: of a tensor's bytes, which come in blocks that are valid until the next is taken
Digest: TypeAlias = "Callable[[Iterable[Buffer]], bytes]"

NEXT_SPECS = (
    "publish a version with the names, dtypes and shapes that the engine has, or start the worker with its engine"
)


class StagedVersion(Protocol):
    """A complete version on this host, rebuilt and verified."""

    @property
    def serving(self) -> Serving: ...

    @property
    def manifest(self) -> Manifest: ...

    @property
    def restructure(self) -> bool:
        """Whether names, dtypes or shapes may be others than the engine has; then every name counts as changed."""
        ...

    def read(self, name: str) -> memoryview:
        """The bytes of one tensor in C order, little-endian; valid while the version is staged."""
        ...


class Engine(Protocol):
    """Holds the weights that answer requests.

    Called by one thread at a time. No request is running during `apply` and `probe`, nor during the `read_back` between
    them; all other calls come while requests are being answered, and must not change an answer.
    """

    @property
    def build(self) -> str:
        """Identifies this build of this engine. Equal build and equal weights must answer bit-identically."""
        ...

    @property
    def applied(self) -> str:
        """How the last `apply` was done, and why that way, for the ack; "" where there is only one way."""
        ...

    def check(self, manifest: Manifest, *, restructure: bool = False) -> None:
        """Raise NotRefittable, naming the tensor and both sides, if the engine can't hold this version. No effect.

        With `restructure` the version may have other names, dtypes or shapes, if this engine can be rebuilt for them.
        """
        ...

    def prepare(self, staged: StagedVersion, changed: frozenset[str]) -> bool:
        """The first half of an apply, while requests are still answered: whatever changes none of the answers.

        Returns True if from now on `read_back` reports what `apply` is going to put in, so that it can be proven before
        requests have to wait. Calls come as `prepare` and `apply` with the same arguments; as `prepare` alone, undone
        by a `prepare` of the previous version where there is one (when that fails, the next one comes with every name);
        or as `apply` alone, which restores: nothing that was prepared before may outlast it.
        Raises: what `apply` raises.
        """
        ...

    def apply(self, staged: StagedVersion, changed: frozenset[str]) -> None:
        """Put the `changed` tensors in; the engine holds the others already.

        Raises: RefitFailed or an error of `staged.read`. The engine may then be half-changed: the caller applies the
        previous version with every name in `changed` and every name that `staged` lacks, which restores it bit for bit.
        """
        ...

    def read_back(self, names: Iterable[str], digest: Digest = tensor_digest_of) -> Iterator[tuple[str, bytes]]:
        """(name, digest) of what the engine really holds now, never of what it was given.

        `tensor_digest_of` may be computed where the weights are; any other `digest` gets the bytes.
        Raises: DigestMismatch naming a tensor that it does not hold at all.
        """
        ...

    def content_digest(self) -> bytes | None:
        """BLAKE3 digest of everything that the engine holds, in its own serialized form; None without such a form.

        Equal build and equal weights must give equal digests. Slow: only asked for by `refleet verify --deep`.
        """
        ...

    def probe(self) -> bytes | None:
        """Digest of every output on the engine's own fixed inputs, bit-exact; None without such inputs.

        Changes nothing. Raises: ProbeMismatch when the engine can't answer.
        """
        ...

    def served(self, serving: Serving) -> str | None:
        """Told after the gate switched and the worker's record is on disk. Returns a warning to show, or None."""
        ...

    def close(self) -> None: ...


def named_few(names: Iterable[str], *, at_most: int = 5) -> str:
    """The first few of `names` and how many more: messages stay readable for any number of tensors."""
    listed = list(names)
    more = f" and {len(listed) - at_most} more" if len(listed) > at_most else ""
    return ", ".join(repr(name) for name in listed[:at_most]) + more


def check_specs(manifest: Manifest, held: Mapping[str, TensorSpec], *, holder: str, spare: Container[str] = ()) -> None:
    """Raise NotRefittable unless the version's tensors are exactly those `held` by `holder` (words for messages).

    `spare`: names that the version may leave out, because another of its tensors is the same memory.
    """
    wanted = manifest.by_name
    extra = [name for name in wanted if name not in held]
    lacking = [name for name in held if name not in wanted and name not in spare]
    if extra or lacking:
        parts = [f"the version has {named_few(extra)}, which {holder} lacks"] if extra else []
        parts += [f"the version lacks {named_few(lacking)}, which {holder} has"] if lacking else []
        raise NotRefittable(
            f"{'; '.join(parts)}; {holder} has {len(held)} tensors: {named_few(sorted(held))}",
            next=NEXT_SPECS,
            tensor=(extra or lacking)[0],
        )
    for name, entry in wanted.items():
        parts, have = [], held[name]
        if entry.spec.dtype != have.dtype:
            parts.append(f"dtype {entry.spec.dtype} where {holder} has {have.dtype}")
        if entry.spec.shape != have.shape:
            parts.append(f"shape {list(entry.spec.shape)} where {holder} has {list(have.shape)}")
        if parts:
            raise NotRefittable(
                f"the version's tensor {name!r} has {' and '.join(parts)}", next=NEXT_SPECS, tensor=name
            )
