"""Which packs go, which stay, and which are copied because less than half of them is still needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from .crashpoint import crash_point
from .errors import DamagedTensor, DigestMismatch, StoreFull
from .objects import EMPTY, Objects
from .pack import Pack, aligned
from .records import remove


def retain(objects: Objects, live: set[bytes]) -> int:
    """Removes objects that are not `live`; returns the bytes that this freed.

    Packs without a live object go. Packs less than half live are copied, every object verified on the way, and then go;
    that needs room, and waits for the next time where there is none. Of several copies of an object a sound one stays.
    A damaged object is not copied: it counts as missing afterwards.
    Must not run while objects are on their way to their manifest (see `Store.writing`). Raises: StoreFull, StoreError.
    """
    homes = {digest: home for digest, held in objects.copies(live).items() if (home := _home(digest, held))}
    kept: dict[str, list[bytes]] = {}
    for digest, pack in homes.items():
        kept.setdefault(pack.name, []).append(digest)
    # dead packs first: that makes the room for copies
    freed_bytes = sum(_drop(objects, pack) for pack in objects.by_age() if pack.name not in kept)
    for sources, moving in _steps(objects, homes, kept):
        try:
            freed_bytes -= _copy(objects, {digest: homes[digest] for digest in moving})
        except StoreFull:
            break
        crash_point("store.pack-copied")
        freed_bytes += sum(_drop(objects, pack) for pack in sources)
    if not live - objects.digests() - {EMPTY}:
        freed_bytes += sum(remove(path) for path in objects.folder.glob("*.damaged"))
    return freed_bytes


def _home(digest: bytes, held: list[Pack]) -> Pack | None:
    """The pack whose copy is kept: the newest, or the newest sound one where there is a choice."""
    return held[0] if len(held) == 1 else next((pack for pack in held if _is_sound(pack, digest)), None)


def _is_sound(pack: Pack, digest: bytes) -> bool:
    try:
        pack.read(digest, verify=True)
    except (DamagedTensor, FileNotFoundError):
        return False
    return True


def _steps(
    objects: Objects, homes: Mapping[bytes, Pack], kept: Mapping[str, list[bytes]]
) -> Iterator[tuple[list[Pack], list[bytes]]]:
    """(packs, digests): copy these digests, then remove these packs. Each step leaves one whole store to the next."""
    # a sound copy behind a newer damaged one is copied as well, else the damaged one would win after a restart
    newest = {digest: held[0] for digest, held in objects.copies(set(homes)).items()}
    shadowed = {digest for digest, pack in homes.items() if newest[digest] is not pack}
    if shadowed:
        yield [], sorted(shadowed)
    sources: list[Pack] = []
    moving: list[bytes] = []
    moving_bytes = 0
    for pack in objects.by_age():
        here = sorted(kept.get(pack.name, ()), key=lambda digest: pack.objects[digest])
        live_bytes = sum(aligned(pack.objects[digest][1]) for digest in here)
        # padding counts on both sides: else a pack of tiny tensors, which is mostly padding, would be copied for ever
        if not here or 2 * live_bytes >= pack.data_bytes:
            continue
        sources.append(pack)
        moving += [digest for digest in here if digest not in shadowed]
        moving_bytes += live_bytes
        if moving_bytes >= objects.pack_bytes:
            yield sources, moving
            sources, moving, moving_bytes = [], [], 0
    if sources:
        yield sources, moving


def _copy(objects: Objects, moving: Mapping[bytes, Pack]) -> int:
    """Writes these objects into one new pack, damaged ones left out; returns the bytes that it takes."""
    writer = objects.writer()
    try:
        for digest, pack in moving.items():
            try:
                writer.add((pack.read(digest, verify=False),), expect=digest, known=())
            except (DamagedTensor, DigestMismatch, FileNotFoundError):
                continue
        if not writer.objects:
            return 0
        objects.commit(writer)
        return writer.file_bytes
    finally:
        writer.close()


def _drop(objects: Objects, pack: Pack) -> int:
    freed_bytes = objects.remove(pack)
    crash_point("store.pack-dropped")
    return freed_bytes
