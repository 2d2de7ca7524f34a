"""Checkpoints on disk: files, folders of shards, and what is refused about them."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from refleet.common.digest import tensor_digest_of
from refleet.common.errors import LimitExceeded, UnreadableCheckpoint
from refleet.common.limits import LIMITS
from refleet.common.tensors import dtype_text, tensor_bytes, tensor_from, torch_dtype
from refleet.common.types import DTYPE_BYTES
from refleet.publisher.checkpoint import Checkpoint, open_checkpoint
from safetensors.torch import load_file, save_file

Tensors = Mapping[str, torch.Tensor]


def every_kind() -> dict[str, torch.Tensor]:
    """A tensor of every dtype with random bits, and the odd shapes."""
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for text, size in DTYPE_BYTES.items():
        bits = torch.randint(0, 256, (6, 10 * size), dtype=torch.uint8, generator=generator)
        # The safetensors library takes no bool other than 0 and 1 from torch.
        tensors[f"w.{text}"] = bits > 127 if text == "BOOL" else bits.view(torch_dtype(text))
    return tensors | {"scalar": torch.tensor(-0.0), "nothing": torch.empty(3, 0), "ünïcode/ %s": torch.ones(1)}


def read(checkpoint: Checkpoint, *, block_bytes: int = 64) -> dict[str, bytes]:
    return {name: b"".join(map(bytes, checkpoint.blocks(name, block_bytes=block_bytes))) for name in checkpoint.specs}


def save_folder(folder: Path, shards: Mapping[str, Tensors], weight_map: Mapping[str, object] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    for shard, tensors in shards.items():
        save_file(dict(tensors), folder / shard)
    listed = weight_map or {name: shard for shard, tensors in shards.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    return folder


def test_a_file_of_the_safetensors_library_reads_bit_for_bit(tmp_path: Path) -> None:
    tensors = every_kind()
    save_file(tensors, tmp_path / "m.safetensors", metadata={"format": "pt"})
    with open_checkpoint(tmp_path / "m.safetensors") as checkpoint:
        assert list(checkpoint.specs) == sorted(tensors, key=str.encode)
        for name, data in read(checkpoint).items():
            spec = checkpoint.specs[name]
            assert (spec.dtype, spec.shape) == (dtype_text(tensors[name].dtype), tuple(tensors[name].shape))
            assert data == bytes(tensor_bytes(tensors[name])), name
        checkpoint.confirm()


def test_what_was_read_goes_back_through_the_library_bit_for_bit(tmp_path: Path) -> None:
    save_file(every_kind(), tmp_path / "m.safetensors")
    with open_checkpoint(str(tmp_path / "m.safetensors")) as checkpoint:
        again = {name: tensor_from(data, checkpoint.specs[name]) for name, data in read(checkpoint).items()}
    save_file(again, tmp_path / "again.safetensors")
    theirs = load_file(tmp_path / "again.safetensors")
    for name, tensor in every_kind().items():
        assert theirs[name].dtype == tensor.dtype
        assert bytes(tensor_bytes(theirs[name])) == bytes(tensor_bytes(tensor)), name


def test_blocks_have_the_size_asked_for_and_only_the_last_is_shorter(tmp_path: Path) -> None:
    save_file({"w": torch.arange(100, dtype=torch.uint8), "none": torch.empty(0)}, tmp_path / "m.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        blocks = [(len(block), block.readonly, block[0]) for block in checkpoint.blocks("w", block_bytes=40)]
        assert blocks == [(40, True, 0), (40, True, 40), (20, True, 80)]
        assert list(checkpoint.blocks("none")) == []


def test_two_tensors_can_be_read_at_the_same_time(tmp_path: Path) -> None:
    save_file({"a": torch.full((90,), 1, dtype=torch.uint8), "b": torch.full((90,), 2, dtype=torch.uint8)},
              tmp_path / "m.safetensors")  # fmt: skip
    with open_checkpoint(tmp_path) as checkpoint:
        both = zip(checkpoint.blocks("a", block_bytes=40), checkpoint.blocks("b", block_bytes=40), strict=True)
        assert [(set(a), set(b)) for a, b in both] == [({1}, {2})] * 3


def test_a_folder_of_shards_is_one_checkpoint(tmp_path: Path) -> None:
    tensors = every_kind()
    names = list(tensors)
    shards = {f"model-{n}.safetensors": {name: tensors[name] for name in names[n::3]} for n in range(3)}
    folder = save_folder(tmp_path / "ckpt", shards)
    with open_checkpoint(folder) as checkpoint:
        assert read(checkpoint) == {name: bytes(tensor_bytes(tensor)) for name, tensor in tensors.items()}
        assert list(checkpoint.specs) == sorted(names, key=str.encode)
        checkpoint.confirm()
    with open_checkpoint(folder / "model.safetensors.index.json") as checkpoint:
        assert len(checkpoint.specs) == len(names)


def test_a_folder_may_have_one_index_of_any_name_or_one_file_of_any_name(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "indexed", {"a.safetensors": {"x": torch.ones(1)}})
    (folder / "model.safetensors.index.json").rename(folder / "weights.safetensors.index.json")
    (tmp_path / "single").mkdir()
    save_file({"x": torch.ones(1)}, tmp_path / "single" / "weights.safetensors")
    for found in (folder, tmp_path / "single"):
        with open_checkpoint(found) as checkpoint:
            assert list(checkpoint.specs) == ["x"]


def test_a_link_to_a_folder_is_followed_once(tmp_path: Path) -> None:
    save_folder(tmp_path / "step-1", {"a.safetensors": {"x": torch.tensor([1])}})
    save_folder(tmp_path / "step-2", {"a.safetensors": {"x": torch.tensor([2])}})
    (tmp_path / "latest").symlink_to("step-1")
    with open_checkpoint(tmp_path / "latest") as checkpoint:
        (tmp_path / "next").symlink_to("step-2")
        (tmp_path / "next").replace(tmp_path / "latest")
        assert read(checkpoint)["x"][0] == 1
        checkpoint.confirm()


ONE = {"x": torch.ones(1)}
TWO = {"y": torch.ones(2)}


@pytest.mark.parametrize(
    ("shards", "weight_map", "says"),
    [
        ({"a": ONE}, {"x": "b"}, "does not exist"),
        ({"a": ONE, "b": ONE | TWO}, {"x": "a", "y": "b"}, "'x' is in two shards: a and b"),
        ({"a": ONE, "b": TWO}, {"x": "a", "y": "b", "z": "b"}, "'z' is in b, but it is not there"),
        ({"a": ONE, "b": TWO}, {"x": "b", "y": "a"}, "'x' is in b, but it is not there"),
        ({"a": ONE | TWO}, {"x": "a"}, "a holds tensor 'y', which the index does not name"),
        ({"a": ONE}, {"x": "../ckpt/a"}, "no plain file name"),
        ({"a": ONE}, {"x": "/etc/passwd"}, "no plain file name"),
        ({"a": ONE}, {"x": "sub\\a"}, "no plain file name"),
        ({"a": ONE}, {"x": "a\0"}, "no plain file name"),
        ({"a": ONE}, {"x": ""}, "no plain file name"),
        ({"a": ONE}, {"x": ".."}, "no plain file name"),
        ({"a": ONE}, {"x": "."}, "not a regular file"),
        ({"a": ONE}, {"x": 3}, "no plain file name"),
        ({"a": ONE}, {"x": "a", "a..b": "a"}, "a name with '..'"),
    ],
)
def test_an_index_that_does_not_fit_its_shards_is_refused(
    tmp_path: Path, shards: Mapping[str, Tensors], weight_map: Mapping[str, object], says: str
) -> None:
    folder = save_folder(tmp_path / "ckpt", shards, weight_map)
    with pytest.raises(UnreadableCheckpoint) as caught:
        open_checkpoint(folder)
    assert says in caught.value.what
    assert str(folder) in caught.value.about


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ("[]", "not a JSON object"),
        ("{}", "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": [1]}', "no weight_map"),
        ('{"weight_map": {"x": "a", "x": "b"}}', "the key 'x' more than once"),
        ("", "not JSON"),
    ],
)
def test_a_broken_index_is_refused(tmp_path: Path, index: str, says: str) -> None:
    save_folder(tmp_path, {"a": ONE})
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UnreadableCheckpoint, match=says):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("what", ["bytes", "shards"])
def test_an_index_beyond_the_limits_is_refused(tmp_path: Path, what: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {f"{n}": f"{n}" for n in range(LIMITS.shards + 1)}}))
    if what == "bytes":
        os.truncate(index, LIMITS.header_bytes + 1)
    with pytest.raises(LimitExceeded, match=what):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["a.safetensors", "model.safetensors.index.json"])
def test_a_link_that_leads_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder = save_folder(tmp_path / "ckpt", {"a.safetensors": ONE})
    (folder / name).rename(tmp_path / "outside")
    (folder / name).symlink_to(tmp_path / "outside")
    with pytest.raises(UnreadableCheckpoint, match="leads out of the checkpoint's folder"):
        open_checkpoint(folder)


def test_links_within_the_folder_are_fine(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "ckpt", {"a.safetensors": ONE})
    (folder / "blobs").mkdir()
    (folder / "a.safetensors").rename(folder / "blobs" / "1")
    (folder / "a.safetensors").symlink_to("blobs/1")
    with open_checkpoint(folder) as checkpoint:
        assert list(checkpoint.specs) == ["x"]


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ([], "neither"),
        (["optimizer.pt", "notes.txt"], "only pickle files such as optimizer.pt"),
        (["a.safetensors", "b.safetensors"], "2 *.safetensors: a.safetensors, b.safetensors"),
        (["a.safetensors.index.json", "b.safetensors.index.json"], "2 *.safetensors.index.json"),
        (["model.safetensors", "model.safetensors.index.json"], "both"),
    ],
)
def test_a_folder_that_does_not_say_which_file_is_meant_is_refused(tmp_path: Path, files: list[str], says: str) -> None:
    for name in files:
        (tmp_path / name).write_text('{"weight_map": {"x": "model-1.safetensors"}}')
    with pytest.raises(UnreadableCheckpoint) as caught:
        open_checkpoint(tmp_path)
    assert says in caught.value.what
    assert caught.value.next


def test_what_is_no_file_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "circle.safetensors").symlink_to("circle.safetensors")
    save_file({}, tmp_path / "empty.safetensors")
    for path, says in [
        (tmp_path / "pipe.safetensors", "not a regular file"),
        (tmp_path / "circle.safetensors", "can't be reached"),
        (tmp_path / "empty.safetensors", "no tensors"),
        (tmp_path / "missing.safetensors", "does not exist"),
        (tmp_path / "a\0b", "can't be reached"),
        (Path("/dev/zero"), "not a regular file"),
    ]:
        with pytest.raises(UnreadableCheckpoint, match=says):
            open_checkpoint(path)


def test_a_module_is_refused_with_the_call_that_was_meant() -> None:
    with pytest.raises(UnreadableCheckpoint, match="Linear is not a checkpoint") as caught:
        open_checkpoint(torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    assert "state_dict()" in caught.value.next


@pytest.mark.parametrize(("locked", "says"), [("m.safetensors", "may not read"), (".", "can't be")])
def test_a_file_or_folder_that_may_not_be_read_says_so(locked: str, says: str) -> None:
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as folder:  # not tmp_path, which other users can't enter at all
        Path(folder).chmod(0o755)
        save_file(ONE, Path(folder) / "m.safetensors")
        (Path(folder) / locked).chmod(0)
        try:
            os.seteuid(user or 65534)  # root may read everything
            with pytest.raises(UnreadableCheckpoint, match=says):
                open_checkpoint(Path(folder) / ("m.safetensors" if locked != "." else ""))
        finally:
            os.seteuid(user)
            Path(folder).chmod(0o755)


def test_reading_a_file_needs_no_torch_and_a_few_blocks_of_memory(tmp_path: Path) -> None:
    size_bytes = 192 << 20
    save_file({"w": torch.zeros(1, dtype=torch.uint8)}, tmp_path / "m.safetensors")
    header = json.dumps({"w": {"dtype": "U8", "shape": [size_bytes], "data_offsets": [0, size_bytes]}}).encode()
    with open(tmp_path / "m.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size_bytes)  # sparse: zeros that take no disk
    code = f"""
import sys
from refleet.common.digest import tensor_digest_of
from refleet.publisher.checkpoint import open_checkpoint
# VmHWM, not ru_maxrss: that one starts with the peak of the process that started us
peak_kib = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
before = peak_kib()
with open_checkpoint({str(tmp_path / "m.safetensors")!r}) as checkpoint:
    digest = tensor_digest_of(checkpoint.blocks("w"))
    checkpoint.confirm()
print(peak_kib() - before, digest.hex(), "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    grown_kib, digest, torch_imported = done.stdout.split()
    assert digest == tensor_digest_of(itertools.repeat(bytes(1 << 20), 192)).hex()
    assert int(grown_kib) <= 3 * LIMITS.block_bytes >> 10
    assert torch_imported == "False"
