"""The benchmarks run, print every row, and measure what they say."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmark_modules import BENCHMARKS, host, model, namespaces, publish_to_served, scale_report, steps
from safetensors.torch import load_file, save_file
from world import checkpoint


def bench(name: str, *arguments: str | Path) -> str:
    command = [sys.executable, BENCHMARKS / name, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """What a quick run of two workers printed and wrote."""
    out = tmp_path_factory.mktemp("bench") / "bench.json"
    text = bench("publish_to_served.py", "--size", "1", "--rounds", "1", "--workers", "2", "--json", out,
                 "--plot", out.with_suffix(".png"))  # fmt: skip
    return text, json.loads(out.read_text())


def test_publish_to_served_has_a_row_for_every_kind_shared_or_not(served: tuple[str, dict[str, Any]]) -> None:
    text, found = served
    rows = {(row["share"], row["kind"]): row for row in found["rows"]}
    assert rows.keys() == {(share, kind) for share in (False, True) for kind in steps.KINDS}
    for share in (False, True):
        sent = {kind: rows[share, kind]["wire_share"] for kind in steps.KINDS}
        assert 0 == sent["none"] < sent["rl"] < 0.02 < sent["tune"] < 0.2 < sent["first"] < 1
        assert sent["rl"] < sent["lora"] < sent["first"]
    assert all(row[name] > 0 for row in found["rows"] for name in ("served_s", "memcpys", "x_load", "x_gloo"))
    assert "x gloo" in text


def test_publish_to_served_names_the_peers_and_pictures_that_it_can_not_have(
    served: tuple[str, dict[str, Any]],
) -> None:
    text, found = served
    missing = [line for line in found["skipped"] if line.startswith("Ray")]
    assert len(missing) == (importlib.util.find_spec("ray") is None)
    assert all("No module named 'ray'" in line and line in text for line in missing)
    assert ("no plot: " in text) == (importlib.util.find_spec("matplotlib") is None)


def test_pictures_are_drawn_or_say_what_is_missing(served: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    file, picture = tmp_path / "found.json", tmp_path / "found.png"
    file.write_text(json.dumps(served[1]))
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "served_plot.py", file, picture], capture_output=True, text=True
    )
    if importlib.util.find_spec("matplotlib"):
        assert done.returncode == 0, done.stderr
        assert picture.read_bytes().startswith(b"\x89PNG")
    else:
        assert (done.returncode, done.stdout) == (1, "no plot: No module named 'matplotlib'\n")


def test_a_timeline_is_in_order_and_ends_when_the_fleet_serves(served: tuple[str, dict[str, Any]]) -> None:
    _, found = served
    for row in found["rows"]:
        lanes = {span["who"] for span in row["spans"]}
        assert lanes == {"publisher", "w0", "w1"}
        assert {"send", "release", "verify", "apply", "ack"} <= {span["phase"] for span in row["spans"]}
        for who in lanes:
            spans = [span for span in row["spans"] if span["who"] == who and span["phase"] != "receive early"]
            assert all(span["start"] <= span["end"] for span in spans)
            assert all(one["end"] == pytest.approx(next_["start"]) for one, next_ in pairwise(spans))
        assert min(span["start"] for span in row["spans"]) >= 0
        assert max(span["end"] for span in row["spans"]) < row["drawn_s"] + 0.5


def test_a_fleet_that_does_not_fit_is_left_out_and_said(tmp_path: Path) -> None:
    memory, disk = publish_to_served.needs(1 << 40, workers=8, share=False)
    assert "GB of memory" in host.no_room(memory, 0, tmp_path)
    assert "GB of disk" in host.no_room(0, disk * 1e6, tmp_path)
    assert not host.no_room(1, 1, tmp_path)
    shared, _ = publish_to_served.needs(1 << 40, workers=8, share=True)
    assert shared < memory


@pytest.mark.parametrize(
    ("kind", "least", "most"), [("rl", 0.012, 0.016), ("lora", 0.1, 0.13), ("tune", 0.45, 0.55), ("none", 0, 0)]
)
def test_a_step_changes_what_its_kind_says_and_the_same_again(kind: str, least: float, most: float) -> None:
    before, after, again = (model.fresh(1, seed=1) for _ in range(3))
    assert least <= steps.change(kind, after, seed=2) <= most
    steps.change(kind, again, seed=2)
    assert all(np.array_equal(after[name], again[name]) for name in before)
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    if kind == "lora":
        assert moved == {name for name in before if name.endswith(("_q", "_v"))}
        assert np.mean(before["layer_0_q"] != after["layer_0_q"]) > 0.9
    else:
        assert len(moved) >= (len(before) - 8 if kind != "none" else 0)  # a norm of 64 elements may keep all of them


def test_a_step_of_rl_moves_small_weights_by_one_unit_more_often() -> None:
    before, after = (model.fresh(4, seed=1) for _ in range(2))
    steps.change("rl", after, seed=2)
    old, new = before["embed"].astype(int), after["embed"].astype(int)
    magnitude = old & 0x7FFF
    moved = old != new
    assert moved[magnitude < 0x3C00].mean() > 2 * moved[magnitude >= 0x3C80].mean()
    assert np.mean(np.abs(old - new)[moved & (magnitude > 0x3A00)] == 1) > 0.99


def test_a_saved_model_is_what_safetensors_reads(tmp_path: Path) -> None:
    weights = model.fresh(1, seed=1)
    model.save(weights, tmp_path / "model.safetensors")
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == weights.keys()
    assert all(np.array_equal(found[name].view(torch.int16).numpy().view(np.uint16), weights[name]) for name in found)


@pytest.mark.parametrize("megabytes", [4, 64, 256, 1024, 2000, 4000])
def test_a_model_has_about_the_size_that_was_asked_for(megabytes: int) -> None:
    assert model.size_bytes(megabytes) == pytest.approx(megabytes * 1e6, rel=0.05)


def test_links_compare_the_whole_model_and_a_step_with_every_peer(tmp_path: Path) -> None:
    out = tmp_path / "links.json"
    text = bench("links.py", "--size", "1", "--rounds", "1", "--links", "0.1", "--json", out)
    if namespaces.missing():
        assert text.startswith("skipped: ")
        return
    rows = {row["kind"]: row for row in json.loads(out.read_text())["rows"]}
    assert rows.keys() == {"first", "rl"}
    assert rows["rl"]["payload_bytes"] < rows["first"]["payload_bytes"] / 50
    assert all(row[name] > 0 for row in rows.values() for name in ("x_raw", "x_copy", "x_gloo", "of_link"))
    assert all(row["of_link"] < 1 for row in rows.values())
    assert 0.05 < rows["first"]["raw_s"] < 5  # 8 Mbit through 100 Mbit/s


def test_a_line_and_an_exponent_are_fitted() -> None:
    rows = [{"x": float(x), "wall": 2.0 * x + 3, "sent": 7.0, "wrong": float(x) ** 2} for x in (10, 100, 1000, 10000)]
    line = scale_report.fit(rows, "wall")
    assert (line["slope"], line["start"], line["r2"]) == pytest.approx((2, 3, 1))
    assert line["exponent"] == pytest.approx(1, abs=0.01)
    assert scale_report.fit(rows, "sent")["exponent"] == pytest.approx(0, abs=1e-9)
    assert scale_report.fit(rows, "wrong")["exponent"] == pytest.approx(2)


def test_scale_fits_a_line_for_every_cost(tmp_path: Path) -> None:
    found = tmp_path / "scale.json"
    text = bench("scale.py", "--quick", "--rounds", "1", "--points", "2", "--json", found)
    lines = json.loads(found.read_text())["fits"]
    assert lines.keys() == set(scale_report.PARTS)
    assert lines["workers"].keys() >= {"publisher", "server", "idle server"}
    assert lines["workers"]["payload"]["exponent"] == pytest.approx(0, abs=1e-6)  # sent once, however many receive it
    assert 0.7 < lines["sizes"]["payload"]["exponent"] < 1.3
    assert lines["tensors"]["payload"]["slope"] > 0
    assert "per worker" in text
    assert "O(changed)" in text


def test_store_cost_counts_bytes_on_both_disks(tmp_path: Path) -> None:
    out = tmp_path / "store.json"
    bench("store_cost.py", "--size", "1", "--steps", "2", "--json", out)
    found = json.loads(out.read_text())
    assert found["wire_bytes"] < found["changed_bytes"] < found["full_bytes"] * 0.02
    assert all(found["wire_bytes"] <= size < found["full_bytes"] for size in found["written_median"].values())
    assert found["back"]["1"]["restart_s"] > 0


def test_wire_size_prints_what_a_publish_would_send(tmp_path: Path) -> None:
    first = checkpoint(1)
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    save_file(first, paths[0])
    save_file(checkpoint(2, change=0.01, base=first), paths[1])
    (step,) = json.loads(bench("wire_size.py", "--json", *paths))
    assert 0.005 < step["changed_elements"] < 0.02
    assert step["payload_bytes"] < step["full_bytes"] * 0.05
    assert step["codecs"]["sparse"] > 0


def test_transport_compares_both_carriers_with_bare_sockets_and_a_stock_client(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    text = bench("transport.py", "--quick", "--servers", "valkey", "--workers", "1", "--json", out)
    rows = {row["way"]: row for row in json.loads(out.read_text())["rows"]}
    assert rows.keys() == {"stock", "stream", "blobs"}
    figures = ("of_raw", "x_stock", "publisher_cpu", "worker_cpu", "server_cpu", "server_peak")
    assert all(row[name] > 0 for row in rows.values() for name in figures)
    assert "| Valkey" in text
