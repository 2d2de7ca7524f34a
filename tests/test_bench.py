"""The benchmarks run, print every row, and measure what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from safetensors.torch import save_file
from world import checkpoint

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def bench(name: str, *arguments: str | Path) -> str:
    command = [sys.executable, BENCHMARKS / name, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_publish_to_served_prints_a_ratio_to_every_peer_for_every_change(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    text = bench("publish_to_served.py", "--quick", "--rounds", "1", "--workers", "1", "--json", out)
    rows = {row["change"]: row for row in json.loads(out.read_text())}
    assert rows.keys() == {"first", "0 %", "1 %", "100 %"}
    assert all(row[f"to_{peer}"] > 0 for row in rows.values() for peer in ("memcpy", "load", "gloo"))
    assert rows["0 %"]["wire_share"] < 0.001 < rows["1 %"]["wire_share"] < 0.05 < rows["100 %"]["wire_share"]
    assert {"send", "stage", "apply", "pause"} <= rows["1 %"]["phases_ms"].keys()
    assert "gloo" in text


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
