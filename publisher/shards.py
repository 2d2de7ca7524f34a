"""Which files a checkpoint on disk consists of, and in which of them each tensor lies.

An index file is data of a trainer like any other: the shards it names must be plain file names, and must lie in its
own folder also after symbolic links are followed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..common.errors import LimitExceeded, UnreadableCheckpoint
from ..common.limits import LIMITS
from ..common.types import tensor_name_problem
from .safetensors_header import CONVERT, PICKLE_SUFFIXES, PREFIX_BYTES, Place, header_bytes, load_object, parse_header
from .source_file import WAIT, SourceFile

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"

Places = dict[str, tuple[SourceFile, Place]]


def find_files(path: Path) -> tuple[list[SourceFile], Places]:
    """All files that the checkpoint at `path` (file, folder or index) consists of, and the place of every tensor.

    Raises: UnreadableCheckpoint, LimitExceeded, CheckpointChanged.
    """
    # Resolved once: `latest -> step-100` may be turned to step-200 while step-100 is read.
    found = _resolve(path)
    in_folder = found.is_dir()
    if in_folder:
        found = _choose(found)
    if found.name.endswith(INDEX_SUFFIX):
        return _indexed(found, in_folder=in_folder)
    file, places = _single(found)
    if not places:
        raise UnreadableCheckpoint("the checkpoint holds no tensors", about=str(path))
    return [file], {name: (file, place) for name, place in places.items()}


def _single(path: Path) -> tuple[SourceFile, dict[str, Place]]:
    file = SourceFile.at(path)
    size = header_bytes(file.read_start(PREFIX_BYTES), file_bytes=file.size_bytes, path=path)
    return file, parse_header(file.read_start(8 + size)[8:], file_bytes=file.size_bytes, path=path)


def _choose(folder: Path) -> Path:
    """The index or the only safetensors file of a folder."""
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise UnreadableCheckpoint(f"the folder can't be read: {error.strerror}", about=str(folder)) from None
    indexes = [name for name in names if name.endswith(INDEX_SUFFIX)]
    singles = [name for name in names if name.endswith(SUFFIX)]
    if "model" + INDEX_SUFFIX in indexes:
        return _inside(folder, "model" + INDEX_SUFFIX)
    for found, kind in ((indexes, f"*{INDEX_SUFFIX}"), (singles, f"*{SUFFIX}")):
        if len(found) == 1:
            return _inside(folder, found[0])
        if found:
            what = f"the folder has {len(found)} {kind}: {', '.join(found[:3])}{' ...' if len(found) > 3 else ''}"
            raise UnreadableCheckpoint(what, about=str(folder), next="name the file that is meant, not the folder")
    pickles = [name for name in names if Path(name).suffix.lower() in PICKLE_SUFFIXES]
    if pickles:
        what = f"the folder has no safetensors file, only pickle files such as {pickles[0]}"
        raise UnreadableCheckpoint(what, about=str(folder), next=CONVERT.format(path=folder / pickles[0]))
    what = f"the folder has neither a *{INDEX_SUFFIX} nor a *{SUFFIX}"
    raise UnreadableCheckpoint(what, about=str(folder), next="check the path, or " + WAIT)


def _indexed(path: Path, *, in_folder: bool) -> tuple[list[SourceFile], Places]:
    index = SourceFile.at(path)
    if index.size_bytes > LIMITS.header_bytes:
        what = f"an index of {index.size_bytes} bytes exceeds the limit of {LIMITS.header_bytes}"
        raise LimitExceeded(what, about=str(path))
    listed = _weight_map(load_object(index.read_start(index.size_bytes), "index", path), path)
    names = sorted(set(listed.values()))
    beside = path.with_name(path.name.removesuffix(".index.json"))
    if in_folder and beside.exists() and beside.name not in names:
        what = f"the folder has both {path.name} and {beside.name}, which may be of different checkpoints"
        raise UnreadableCheckpoint(what, about=str(path.parent), next="name the file that is meant, not the folder")
    files, places = {}, Places()
    for shard in names:
        files[shard], held = _single(_inside(path.parent, shard))
        for name, place in held.items():
            if name in places:
                what = f"tensor {name!r} is in two shards: {places[name][0].path.name} and {shard}"
                raise UnreadableCheckpoint(what, about=str(path), tensor=name, next=WAIT)
            places[name] = (files[shard], place)
    for name in [*listed, *places]:
        if name not in listed:
            what = f"{places[name][0].path.name} holds tensor {name!r}, which the index does not name"
        elif name not in places or places[name][0] is not files[listed[name]]:
            what = f"the index says that tensor {name!r} is in {listed[name]}, but it is not there"
        else:
            continue
        raise UnreadableCheckpoint(what, about=str(path), tensor=name, next=WAIT)
    return [index, *files.values()], places


def _weight_map(index: Mapping[str, object], path: Path) -> dict[str, str]:
    """Tensor name -> shard name, both checked."""
    found = index.get("weight_map")
    if not isinstance(found, dict) or not found:
        raise UnreadableCheckpoint("the index has no weight_map that names tensors", about=str(path))
    if len(found) > LIMITS.tensors:
        raise LimitExceeded(f"{len(found)} tensors exceed the limit of {LIMITS.tensors}", about=str(path))
    for name, shard in found.items():
        problem = tensor_name_problem(name)
        if problem is not None:
            raise UnreadableCheckpoint(f"the index has {problem}", about=str(path), next="rename the tensor")
        if not isinstance(shard, str) or tensor_name_problem(shard) is not None or "/" in shard or "\\" in shard:
            what = f"the index puts tensor {name!r} into {str(shard)[:200]!r}, which is no plain file name"
            raise UnreadableCheckpoint(what, about=str(path), tensor=name, next="save the shards beside their index")
    shards = len(set(found.values()))
    if shards > LIMITS.shards:
        raise LimitExceeded(f"{shards} shards exceed the limit of {LIMITS.shards}", about=str(path))
    return found


def _resolve(path: Path) -> Path:
    try:
        return path.resolve(strict=True)
    except FileNotFoundError:
        raise UnreadableCheckpoint("the checkpoint does not exist", about=str(path), next="check the path") from None
    except OSError as error:
        what = f"the checkpoint can't be reached: {error.strerror}"
        raise UnreadableCheckpoint(what, about=str(path), next="check the path and its permissions") from None
    except (RuntimeError, ValueError) as error:  # a circle of links; NUL in the path
        raise UnreadableCheckpoint(f"the checkpoint can't be reached: {error}", about=repr(str(path))) from None


def _inside(folder: Path, name: str) -> Path:
    """The file `name` of a folder (itself resolved), which must not lead out of it."""
    path = _resolve(folder / name)
    if not path.is_relative_to(folder):
        what = f"{name} is a link that leads out of the checkpoint's folder, to {path}"
        hint = f"copy the folder with its links followed: cp -rL {folder} COPY"
        raise UnreadableCheckpoint(what, about=str(folder), next=hint)
    return path
