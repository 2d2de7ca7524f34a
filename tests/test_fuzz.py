"""Fuzzing in CI: every kept finding, and some 20 000 cases of every decoder with fixed seeds. More: `make fuzz`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest
import zstandard
from fuzz import CORPUS, Finding, closely, corpus, fuzz, hang_alarm, run_case, watched
from fuzz_decoders import decoders
from fuzz_scene import Decoder
from refleet.common.errors import LimitExceeded, MalformedRecord, RefleetError, UnreadableCheckpoint, UsageError
from refleet.common.limits import LIMITS, MIB
from refleet.common.signing import ENVELOPE_BYTES

CASES = 20_000


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Decoder]]:
    with hang_alarm():
        yield {decoder.name: decoder for decoder in decoders(tmp_path_factory.mktemp("decoders"))}


def test_what_was_found_once_is_not_found_again(made: dict[str, Decoder]) -> None:
    for decoder in made.values():
        for data in corpus(decoder):
            run_case(decoder, data)
    unknown = {path.name for path in CORPUS.glob("*") if path.is_dir()} - made.keys()
    assert not unknown, "inputs of decoders that there are no more"


def test_every_seed_is_accepted(made: dict[str, Decoder]) -> None:
    """Else its mutations would die at the door."""
    for decoder in made.values():
        assert decoder.seeds, decoder.name
        for data in decoder.seeds[:1]:
            decoder.decode(data)


@pytest.mark.parametrize("half", [0, 1])
def test_no_mutated_input_leaves_the_error_tree(half: int) -> None:
    """In a process of its own, whose memory is limited."""
    code = f"import sys, fuzz; sys.exit(fuzz.main({CASES // 2}, seed={half + 1}, processes=1))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no findings" in done.stdout and done.stdout.count(" cases ") > 20


# ---------------------------------------------------------------------- the fuzzer itself


def planted(kind: str) -> Decoder:
    """Decoders with the mistakes that the fuzzer is there to find."""

    def decode(data: bytes) -> object:
        if data[:1] == b"r":
            raise MalformedRecord("as it should be")
        if b"\xff" not in data:
            return None
        if kind == "error":
            return b"abc"[len(data)]
        if kind == "memory":
            return bytearray(9 * MIB)
        if kind == "time":
            return sum(range(10**8 // 2))
        os.abort()

    return Decoder(f"planted-{kind}", decode, [b"rest of the record", b"a valid one"])


@pytest.mark.parametrize("kind", ["error", "memory", "time"])
def test_the_fuzzer_finds_what_is_planted(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuzz.CASE_S", 0.2)
    with hang_alarm(), pytest.raises(Finding) as found:
        fuzz(planted(kind), 4000, seed=1)
    assert b"\xff" in found.value.data
    assert {"error": "IndexError", "memory": "MiB", "time": "it took"}[kind] in str(found.value)


def test_an_input_that_kills_the_process_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuzz.CORPUS", tmp_path)
    monkeypatch.chdir(Path(__file__).parent)
    code = (
        "import sys, fuzz, test_fuzz; from pathlib import Path\n"
        "fuzz.decoders = lambda folder, only=(): [test_fuzz.planted('abort')]\n"
        "fuzz.child(['planted-abort'], 4000, 1, Path(sys.argv[-1]))"
    )
    assert watched([sys.executable, "-c", code]) == -signal.SIGABRT
    (kept,) = (tmp_path / "planted-abort").iterdir()
    assert b"\xff" in kept.read_bytes()


def test_lines_that_are_reached_for_the_first_time_are_noticed(made: dict[str, Decoder]) -> None:
    seen: set[object] = set()
    record = made["record"]
    assert closely(record, record.seeds[0], seen)
    assert not closely(record, record.seeds[0], seen)
    assert closely(record, record.seeds[0][:20], seen)


# ---------------------------------------------------------------------- bombs, at the limit and one above it


def refuses(decoder: Decoder, data: bytes, *errors: type[RefleetError], memory_bytes: int = 2 * MIB) -> None:
    """It costs no more than the input itself, and this."""
    tracemalloc.start()
    try:
        with pytest.raises(errors):
            decoder.decode(data)
        assert tracemalloc.get_traced_memory()[1] < memory_bytes
    finally:
        tracemalloc.stop()


def envelope_of(payload: bytes) -> bytes:
    return bytes(msgpack.packb(["envelope", 4, None, None, payload]))


def test_records_as_large_as_they_may_be_and_one_byte_larger(made: dict[str, Decoder]) -> None:
    largest = envelope_of(b"\x91" * LIMITS.record_bytes)
    assert len(largest) <= LIMITS.record_bytes + ENVELOPE_BYTES
    refuses(made["envelope"], largest, MalformedRecord, memory_bytes=4 * MIB)
    refuses(made["envelope"], envelope_of(b"\x91" * (LIMITS.record_bytes + 1)), LimitExceeded, memory_bytes=4 * MIB)
    refuses(made["record"], b"\x91" * LIMITS.record_bytes, MalformedRecord)
    refuses(made["record"], b"\x91" * (LIMITS.record_bytes + 1), LimitExceeded)


@pytest.mark.parametrize(
    "head", ["dd ff ff ff ff", "df ff ff ff ff", "c6 ff ff ff ff", "db ff ff ff ff", "dd 00 10 00 00"]
)
def test_records_that_declare_more_than_they_hold(made: dict[str, Decoder], head: str) -> None:
    for data in (
        bytes.fromhex(head),
        b"\x9a\xa7release\x04" + bytes.fromhex(head),
        bytes.fromhex(head) + b"\xc0" * 999,
    ):
        refuses(made["record"], data, MalformedRecord)
        refuses(made["envelope"], envelope_of(data), MalformedRecord)


@pytest.mark.parametrize("depth", [10, 511, 512, 513, 100_000])
def test_nesting_of_any_depth_is_refused(made: dict[str, Decoder], depth: int) -> None:
    refuses(made["record"], b"\x9c\xa7release\x04" + b"\x91" * depth + b"\xc0", MalformedRecord)
    for name in ("safetensors", "shards"):
        text = b'{"a":' + b"[" * depth + b"]" * depth + b"}"
        prefix = len(text).to_bytes(8, "little") if name == "safetensors" else b""
        refuses(made[name], prefix + text, UnreadableCheckpoint, memory_bytes=8 * MIB)
    refuses(made["config"], b"store = " + b"[" * depth + b"]" * depth, UsageError, memory_bytes=8 * MIB)


def test_files_as_large_as_they_may_be_and_one_byte_larger(made: dict[str, Decoder]) -> None:
    line = b"# a comment\n"
    for name, most in (("config", MIB), ("trust", MIB)):
        fits = made[name].seeds[0] + line * ((most - len(made[name].seeds[0])) // len(line))
        fits += b"#" * (most - len(fits))
        assert len(fits) == most
        made[name].decode(fits)
        refuses(made[name], fits + b"#", UsageError, memory_bytes=8 * MIB)


@pytest.mark.parametrize("name", ["codec-zstd", "codec-sparse", "codec-split", "codec-dense"])
def test_frames_that_hold_more_than_there_is_room_for(made: dict[str, Decoder], name: str) -> None:
    """Whole, and in the place of the frame in a valid block."""
    for size in (1399, 1401, 64 * MIB):
        frame = zstandard.ZstdCompressor(level=1).compress(bytes(size))
        for seed in made[name].seeds:
            at = seed.find(frame[:4])
            for data in (seed[:1] + frame, seed[:at] + frame if at > 0 else frame):
                refuses(made[name], data, MalformedRecord, LimitExceeded)
