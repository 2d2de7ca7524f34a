"""Bundles that are damaged, hostile, half written or of another machine: refused with the reason, and nothing else."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgpack
import pytest
from bundle_twin import built
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refleet.common.digest import digest_of
from refleet.common.errors import DigestMismatch, MalformedRecord, RefleetError, StoreError, UsageError
from refleet.common.limits import LIMITS
from refleet.worker.bundle import Bundle, save
from refleet.worker.bundle_record import BundleRecord, Platform
from refleet.worker.signature import Signature
from twin_engine import CPU, two_load

FILES = ["bundle.msgpack", "engine-0.plan", "engine-1.plan", "tensors.safetensors"]


def used(folder: Path) -> None:
    Bundle.open(folder).model(device=CPU, load=two_load)


def refused(folder: Path, name: str) -> RefleetError:
    with pytest.raises((DigestMismatch, MalformedRecord)) as caught:
        used(folder)
    assert caught.value.about == str(folder / name)
    assert name in caught.value.what or name == "bundle.msgpack"
    assert "refleet-worker build" in caught.value.next
    return caught.value


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere_is_found(own_bundle: Path, name: str) -> None:
    data = (own_bundle / name).read_bytes()
    for at in {0, 31, 32, len(data) // 3, len(data) // 2, len(data) - 1} & set(range(len(data))):
        flipped = bytearray(data)
        flipped[at] ^= 4
        (own_bundle / name).write_bytes(flipped)
        refused(own_bundle, name)


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_or_longer_or_missing_file_is_named(own_bundle: Path, name: str) -> None:
    data = (own_bundle / name).read_bytes()
    for size in (0, 1, len(data) // 2, len(data) - 1):
        (own_bundle / name).write_bytes(data[:size])
        refused(own_bundle, name)
    (own_bundle / name).write_bytes(data + b"x")
    refused(own_bundle, name)
    (own_bundle / name).unlink()
    assert "missing" in refused(own_bundle, name).what


def test_a_bundle_that_is_not_there_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no bundle at"):
        Bundle.open(tmp_path / "b")


def test_a_file_that_can_not_be_read_is_named(own_bundle: Path) -> None:
    (own_bundle / "engine-1.plan").unlink()
    (own_bundle / "engine-1.plan").mkdir()
    with pytest.raises(StoreError) as caught:
        used(own_bundle)
    assert caught.value.about.endswith("engine-1.plan")


# ---------------------------------------------------------------------- records that somebody made up


def fields(folder: Path) -> list[Any]:
    data = (folder / "bundle.msgpack").read_bytes()[32:]
    found: list[Any] = msgpack.unpackb(data, strict_map_key=False)
    return found


def put(folder: Path, record: object) -> None:
    body = msgpack.packb(record, unicode_errors="surrogatepass")
    (folder / "bundle.msgpack").write_bytes(digest_of(body) + body)


def at(name: str) -> int:
    return 2 + list(BundleRecord.__dataclass_fields__).index(name)


def test_a_record_of_a_huge_file_is_refused_before_anything_is_read(own_bundle: Path) -> None:
    for name, where in [("tensors.safetensors", ("tensors",)), ("engine-0.plan", ("engines", 0, 1))]:
        record = fields(own_bundle)
        first, *path = where
        part = record[at(str(first))]
        for step in path:
            part = part[step]
        part[1] = 1 << 60
        put(own_bundle, record)
        assert str(1 << 60) in refused(own_bundle, name).what


def test_a_record_that_is_larger_than_any_is_not_read(own_bundle: Path) -> None:
    with open(own_bundle / "bundle.msgpack", "r+b") as file:
        file.truncate(LIMITS.bundle_record_bytes + 33)
    assert "at most" in refused(own_bundle, "bundle.msgpack").what


def test_files_outside_the_bundle_can_not_be_named(own_bundle: Path) -> None:
    for name in ("../engine-0.plan", "/etc/passwd", "engine-00.plan", "engine-1.plan", "bundle.msgpack"):
        record = fields(own_bundle)
        record[at("engines")][0][1][0] = name
        put(own_bundle, record)
        refused(own_bundle, "bundle.msgpack")


def test_another_format_says_so(own_bundle: Path) -> None:
    record = fields(own_bundle)
    record[at("format")] = 2
    put(own_bundle, record)
    assert "format 2, this refleet reads 1" in refused(own_bundle, "bundle.msgpack").what


def test_engines_of_another_bundle_are_not_taken(own_bundle: Path) -> None:
    record = fields(own_bundle)
    record[at("build")] = bytes(32)
    put(own_bundle, record)
    refused(own_bundle, "bundle.msgpack")


def test_formulas_can_not_go_round_in_circles(own_bundle: Path) -> None:
    record = fields(own_bundle)
    formula = record[at("plan")][1][0]
    formula[2][0] = formula[0]
    put(own_bundle, record)
    refused(own_bundle, "bundle.msgpack")


def test_a_signature_that_would_import_a_module_is_refused() -> None:
    enum = json.dumps({"__enum__": True, "fqn": "antigravity:x", "name": "y"})
    leaf = {"type": None, "context": None, "children_spec": []}
    for node in (
        {"type": "builtins.list", "context": enum, "children_spec": []},
        {"type": "builtins.dict", "context": "[" + enum.replace("_", "\\u005f") + "]", "children_spec": [leaf]},
        {"type": "collections.defaultdict", "context": {"default_factory_module": "antigravity"}, "children_spec": []},
    ):
        with pytest.raises(MalformedRecord, match="import"):
            Signature.from_data([json.dumps([1, node]), json.dumps([1, leaf])])
    assert "antigravity" not in sys.modules


_PLAIN = st.one_of(
    st.none(), st.booleans(), st.integers(-(1 << 63), (1 << 64) - 1), st.floats(), st.text(max_size=20),
    st.binary(max_size=40), st.just([]), st.just({}),
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner: list[tuple[Any, ...]] = [path] if path else []
    items = enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, dict) else ()
    for key, item in items:
        inner += places(item, (*path, key))
    return inner


def held(record: Any, path: tuple[Any, ...]) -> Any:
    for step in path:
        record = record[step]
    return record


def changed(record: Any, path: tuple[Any, ...], value: Any) -> Any:
    held(record, path[:-1])[path[-1]] = value
    return record


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_record_raises_other_errors_than_ours(own_bundle: Path, saved_bundle: Path, data: st.DataObject) -> None:
    record = fields(saved_bundle)
    for _ in range(data.draw(st.integers(1, 3))):
        graphs = [path for path in places(record) if str(held(record, path)).startswith("[")]
        others = places(record)
        path = data.draw(st.sampled_from(data.draw(st.sampled_from([graphs, others]))))
        found = held(record, path)
        kinds = ["plain", "copied"]
        if isinstance(found, str) and path in graphs:
            kinds += ["inside"] * 6  # change the graph, and keep it JSON
        match data.draw(st.sampled_from(kinds)):
            case "plain":
                value = data.draw(_PLAIN)
            case "copied":
                value = copy.deepcopy(held(record, data.draw(st.sampled_from(others))))
            case _:
                graph = json.loads(found)
                inside, source = (data.draw(st.sampled_from(places(graph))) for _ in range(2))
                value = json.dumps(changed(graph, inside, copy.deepcopy(held(graph, source))))
        changed(record, path, value)
    try:
        put(own_bundle, record)
    except (ValueError, OverflowError, TypeError):
        return  # no bytes stand for it
    try:
        used(own_bundle)
    except RefleetError as error:
        assert error.what


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_bytes_raise_other_errors_than_ours(own_bundle: Path, saved_bundle: Path, data: st.DataObject) -> None:
    body = bytearray((saved_bundle / "bundle.msgpack").read_bytes()[32:])
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    (own_bundle / "bundle.msgpack").write_bytes(digest_of(body) + body)
    try:
        used(own_bundle)
    except RefleetError as error:
        assert error.what


# ---------------------------------------------------------------------- another machine

H100 = Platform("2.13", "torch_tensorrt 2.13", "tensorrt 10.14", "NVIDIA H100", "9.0")


@pytest.mark.parametrize(
    ("here", "words"),
    [
        (H100, None),
        (Platform("2.14", "torch_tensorrt 2.14", "tensorrt 10.14", "NVIDIA GH200", "9.0"), None),
        (Platform("2.13", "", "tensorrt 10.15", "NVIDIA H100", "9.0"), "for tensorrt 10.14, here is tensorrt 10.15"),
        (Platform("2.13", "", "tensorrt_rtx 10.14", "NVIDIA H100", "9.0"), "here is tensorrt_rtx 10.14"),
        (Platform("2.13", "", "", "NVIDIA H100", "9.0"), "here is no TensorRT"),
        (Platform("2.13", "", "tensorrt 10.14", "NVIDIA B200", "10.0"), r"\(compute capability 9.0\), here is .*B200"),
        (Platform("2.13", "", "", "", ""), "no CUDA device here"),
    ],
)
def test_engines_are_for_one_tensorrt_and_one_compute_capability(here: Platform, words: str | None) -> None:
    import re

    found = H100.misfit(here)
    assert found is None if words is None else re.search(words, found or "")


# ---------------------------------------------------------------------- crashes and full disks

WRITE = """
import sys
from pathlib import Path
from bundle_twin import built
from refleet.common import crashpoint
from refleet.worker.bundle import save
model = built()
crashpoint.arm(sys.argv[2])
save(model, Path(sys.argv[1]), stripped=True)
"""


@pytest.mark.parametrize(("point", "stripped"), [("bundle.written", False), ("bundle.renamed", True)])
def test_a_kill_leaves_the_old_bundle_or_the_new_one(own_bundle: Path, point: str, stripped: bool) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    killed = subprocess.run([sys.executable, "-c", WRITE, own_bundle, point], env=environment, timeout=100)
    assert killed.returncode == -signal.SIGKILL
    assert Bundle.open(own_bundle).record.stripped is stripped
    used(own_bundle)
    assert len(list(own_bundle.parent.iterdir())) == 2, "what the dead process left"
    save(built(), own_bundle)
    assert [path.name for path in own_bundle.parent.iterdir()] == ["two"], "and it is removed by the next one"
    used(own_bundle)


def test_a_full_disk_leaves_the_old_bundle_and_nothing_beside_it(
    own_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left") as caught:
        save(built(), own_bundle, stripped=True)
    assert "df -h" in caught.value.next
    assert not Bundle.open(own_bundle).record.stripped
    assert [path.name for path in own_bundle.parent.iterdir()] == ["two"]
