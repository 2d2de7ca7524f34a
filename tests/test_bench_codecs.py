"""The codec benchmarks: real steps, entropies that are right, peers that may be missing, a guard that fails."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmark_modules import BENCHMARKS, check, checkpoints, codec_forms, codec_peers, entropy, namespaces


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Quick checkpoints."""
    folder = tmp_path_factory.mktemp("checkpoints")
    checkpoints.ensure(folder, quick=True)
    return folder


def bench(name: str, *arguments: str | Path) -> str:
    done = subprocess.run([sys.executable, BENCHMARKS / name, *arguments], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_regime_changes_what_it_should(out: Path) -> None:
    about = json.loads((out / "quick" / "about.json").read_text())
    mean = {name: np.mean([step["elements"] for step in steps]) for name, steps in about["changed"].items()}
    assert mean.keys() == set(checkpoints.KINDS)
    assert 0.001 < mean["rl-1e-6"] < mean["rl-3e-6"] < mean["rl-1e-5"] < 0.3 < mean["sft-1e-4"]
    assert mean["sft-1e-4-fp32"] > 0.99 < mean["ema-fp32"]
    assert {step["tensors"] for step in about["changed"]["lora"]} == {4 / 20}  # q and v of two layers


def test_checkpoints_are_kept_and_come_out_the_same_again(out: Path, tmp_path: Path) -> None:
    made = (out / "quick" / "about.json").stat().st_mtime_ns
    files = checkpoints.ensure(out, quick=True)
    assert (out / "quick" / "about.json").stat().st_mtime_ns == made
    assert len(files["rl-1e-6"]) == 4
    short = replace(checkpoints.QUICK, pretrain=4, other=2, warm=2, keep=2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name in "ab":
        checkpoints.Maker(short, tmp_path / name, lambda _: None).all()
    torch.set_num_threads(threads)
    one, other = (sorted((tmp_path / name).rglob("*.safetensors")) for name in "ab")
    assert len(one) == 22
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in other]


def test_the_table_has_every_codec_and_says_what_is_missing(out: Path, tmp_path: Path) -> None:
    found = tmp_path / "codec.json"
    regimes = ["rl-1e-6", "sft-1e-4-fp32"]
    text = bench("codec_peers.py", "--quick", "--out", out, "--rounds", "1", "--steps", "1", "--threads", "1",
                 "--regimes", *regimes, "--json", found)  # fmt: skip
    rows = {(row["regime"], row["codec"]): row for row in json.loads(found.read_text())["rows"]}
    for regime in regimes:
        ours = rows[regime, "refleet"]
        assert 0 < ours["size"] < 1
        assert ours["of_compare"]["1"] > 0 < ours["of_copy"]["1"]
        assert all(row["failed"] or row["size"] > 0 for row in rows.values())
        assert ours["size"] < rows[regime, "gap16 + value + zstd-1"]["size"]
    if "fireworks_delta_compression" not in sys.modules and rows["rl-1e-6", "fireworks arc_v3"]["failed"]:
        assert "fireworks-delta-compression is not installed" in text


def test_entropy_of_flags_and_of_unit_steps() -> None:
    base = np.full(4096, 0x3F80, "<u2")
    base[2048:] = 0x4000  # another exponent
    new = base.copy()
    new[:1024] += 1  # half of the first kind, none of the second; always by one unit
    found = entropy.bounds(new.view(np.uint8), base.view(np.uint8), "BF16")
    assert found["given exponent"] == pytest.approx(2048 / 8)
    assert found["order 0"] == pytest.approx(4096 * 0.8112781244591328 / 8)
    unchanged = entropy.bounds(base.view(np.uint8), base.view(np.uint8), "BF16")
    assert unchanged["order 0"] == unchanged["given exponent"] == 0
    assert unchanged["alone"] == pytest.approx(4096 / 8)


def test_entropy_counts_what_lies_below_a_large_difference_as_noise() -> None:
    base = np.full(64, 0x3F800000, "<u4")
    new = base + (1 << 20)
    assert entropy.bounds(new.view(np.uint8), base.view(np.uint8), "F32")["order 0"] == 64 * 20 / 8


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("share", [0.0, 1e-5, 0.02, 1.0])
def test_plain_forms_are_bit_exact(dtype: str, share: float) -> None:
    rng = np.random.default_rng(1)
    base = rng.integers(0, 256, 1 << 20, np.uint8)
    new = base.copy()
    hit = rng.random(new.size) < share / 2
    new[hit] ^= rng.integers(1, 256, int(hit.sum()), np.uint8)
    for form in codec_forms.PLAIN:
        if not form.missing:
            row = codec_peers.Row("", form.name)
            codec_peers.sizes(form, [codec_peers.Step(new, base, dtype)], row)
            assert not row.failed, (form.name, row.failed)


def test_a_codec_that_returns_other_bits_is_shown_as_that() -> None:
    lossy = codec_forms.Form(
        "lossy", lambda new, _base, _dtype: (new, 1), lambda sent, out, _base, _dtype: np.copyto(out, sent & 254)
    )
    row = codec_peers.Row("", "lossy")
    data = np.arange(256, dtype=np.uint8)
    codec_peers.sizes(lossy, [codec_peers.Step(data, data, "BF16")], row)
    assert row.failed == "not bit-exact: 128 bytes of 256 differ"


@pytest.fixture(scope="module")
def measured() -> dict[str, object]:
    return check.measure(argparse.Namespace(rounds=1, mib=1, peers=False))


def test_the_guard_passes_what_did_not_change(measured: dict[str, object]) -> None:
    assert not [line for line in check.compare(measured, measured) if line.bad]


@pytest.mark.parametrize("part", ["sizes", "speeds", "libraries"])
def test_the_guard_fails_on_a_byte_and_on_a_slow_codec(measured: dict[str, object], part: str) -> None:
    better = json.loads(json.dumps(measured))
    if part == "speeds":
        better["speeds"]["rl encode"]["share"] = 3 * better["speeds"]["rl encode"]["best"]
    else:
        better["sizes"]["rl"]["bytes"] -= 1
        better["sizes"]["rl"]["of_entropy"] *= 0.98
    if part == "libraries":
        better["libraries"] = {}
    (bad,) = [line.name for line in check.compare(measured, better) if line.bad]
    assert bad.startswith("rl encode" if part == "speeds" else "rl: ")


def test_speeds_of_another_machine_are_not_compared(measured: dict[str, object]) -> None:
    better = json.loads(json.dumps(measured)) | {"machine": "another"}
    better["speeds"]["rl encode"]["share"] = 3 * better["speeds"]["rl encode"]["best"]
    assert not [line for line in check.compare(measured, better) if line.bad]


def test_namespaces_are_removed_again() -> None:
    if reason := namespaces.missing():
        pytest.skip(reason)
    with pytest.raises(ZeroDivisionError), namespaces.link() as (near, far):
        namespaces.shape(near, 1.0)
        assert near.namespace in subprocess.run(["ip", "netns"], capture_output=True, text=True).stdout
        _ = 1 / 0
    left = subprocess.run(["ip", "netns"], capture_output=True, text=True).stdout
    assert near.namespace not in left
    assert far.namespace not in left
