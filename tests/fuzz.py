"""Fuzz every decoder: `make fuzz CASES=1000000 SEED=1`. Guided by the lines of refleet that inputs reach.

Each process takes its share of the decoders' cases, under a limit on its memory. A finding is an error outside of
refleet's tree, a case that takes more than a second, or more memory than its decoder may, or the death of the process.
Its input is kept in tests/fuzz/corpus, which the tests run again for ever.
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import refleet.common
from blake3 import blake3
from fuzz_decoders import decoders
from fuzz_mutate import Mutator
from fuzz_scene import Decoder
from refleet.common.errors import RefleetError
from refleet.common.limits import MIB
from refleet.common.shm import SHM

T = TypeVar("T")
CORPUS = Path(__file__).parent / "fuzz" / "corpus"
SOURCES = str(Path(refleet.common.__path__[0]).parent)
CASE_S = 1.0
#: a case that does not end by itself
HANG_S = 20
#: of one process above what it has when it begins
ROOM_BYTES = 600 * MIB
#: one case of so many is looked at closely: which lines it reaches, and how much memory it takes
CLOSELY = 12
_POOL = 400
_CURRENT_BYTES = 1 << 17


class Finding(Exception):
    """What an input, `data`, did that no input may do."""

    data = b""


class Hang(BaseException):
    """Not an Exception, so that no decoder takes it for a damaged input."""


def run_case(decoder: Decoder, data: bytes) -> None:
    """Raises: Finding."""
    started = time.thread_time()
    signal.alarm(HANG_S)
    try:
        decoder.decode(data)
    except RefleetError:
        pass
    except Hang:
        raise Finding(f"it did not end within {HANG_S} s") from None
    except (Exception, RecursionError) as error:
        raise Finding(f"{type(error).__name__}: {error}"[:300]) from error
    finally:
        signal.alarm(0)
    if (taken := time.thread_time() - started) > CASE_S:
        raise Finding(f"it took {taken:.1f} s")


def closely(decoder: Decoder, data: bytes, seen: set[Any]) -> bool:
    """`run_case`, measured. Whether it reached a line that none before it reached. Raises: Finding."""
    before = len(seen)
    tracemalloc.start()
    try:
        with reached(seen):
            run_case(decoder, data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    if peak > decoder.memory_bytes + 16 * len(data):
        raise Finding(f"it took {peak / MIB:.1f} MiB of memory")
    return len(seen) > before


@contextlib.contextmanager
def reached(seen: set[Any]) -> Iterator[None]:
    """Adds every line of refleet that this thread passes in the block."""

    def line(frame: FrameType, event: str, _: object) -> Any:
        if event == "line":
            seen.add((frame.f_code, frame.f_lineno))
        return line

    def call(frame: FrameType, _event: str, _: object) -> Any:
        return line if frame.f_code.co_filename.startswith(SOURCES) else None

    sys.settrace(call)
    try:
        yield
    finally:
        sys.settrace(None)


def corpus(decoder: Decoder) -> list[bytes]:
    return [path.read_bytes() for path in sorted((CORPUS / decoder.name).glob("*"))]


def keep(name: str, data: bytes) -> Path:
    """Keeps a failing input for ever."""
    path = CORPUS / name / blake3(data).hexdigest(8)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def fuzz(decoder: Decoder, cases: int, seed: int, current: mmap.mmap | None = None) -> tuple[int, int, int]:
    """Runs so many cases; returns (cases, lines reached, inputs in the pool). Raises: Finding."""
    chance = random.Random(f"{seed} {decoder.name}")
    mutator, seen = Mutator(chance), set[Any]()
    pool = [*decoder.seeds, *corpus(decoder)]
    for look in (run_case, lambda *case: closely(*case, seen)):  # what is taken once, and used again, is no case's
        for data in pool:
            tried(look, decoder, data, f"seed {seed}, from the beginning")
    for number in range(cases):
        data = mutator.mutated(chance.choice(pool), pool, decoder.words)
        if decoder.repair and chance.random() < 0.6:
            data = decoder.repair(data)
        if current is not None:
            current.seek(0)
            current.write(len(data).to_bytes(4, "little") + data)
        case = f"seed {seed}, case {number}"
        if number % CLOSELY:
            tried(run_case, decoder, data, case)
        elif tried(lambda *case: closely(*case, seen), decoder, data, case) and len(pool) < _POOL:
            pool.append(data)
    return cases, len(seen), len(pool)


def tried(look: Callable[[Decoder, bytes], T], decoder: Decoder, data: bytes, case: str) -> T:
    """Its result. Raises: Finding, with the input in `data`."""
    try:
        return look(decoder, data)
    except Finding as found:
        found.add_note(f"{decoder.name}, {case}")
        found.data = data
        raise


def child(names: list[str], cases: int, seed: int, current_path: Path) -> int:
    """Fuzzes these decoders in this process; 0: no finding."""
    with open(current_path, "r+b") as file:
        current = mmap.mmap(file.fileno(), _CURRENT_BYTES)
    findings = 0
    with tempfile.TemporaryDirectory(dir=SHM) as folder, hang_alarm():
        made = decoders(Path(folder), only=names)
        limit_memory()
        for decoder in made:
            current[-64:] = decoder.name.encode().ljust(64)
            started = time.monotonic()
            try:
                done, lines, pool = fuzz(decoder, cases, seed, current)
                taken = time.monotonic() - started
                print(f"{decoder.name:14} {done:8} cases {lines:5} lines {pool:4} inputs {taken:6.1f} s", flush=True)
            except Finding as found:
                findings += 1
                at = keep(decoder.name, found.data)
                print(f"{decoder.name}: {found} ({'; '.join(found.__notes__)}), kept as {at}", flush=True)
    return 1 if findings else 0


@contextlib.contextmanager
def hang_alarm() -> Iterator[None]:
    def hang(_number: int, _frame: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, hang)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)


def limit_memory() -> None:
    """Address space from now on: a buffer of a size that somebody made up raises MemoryError, which is a finding."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmSize")]
    most = int(line.split()[1]) * 1024 + ROOM_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def names_of_all() -> list[str]:
    with tempfile.TemporaryDirectory(dir=SHM) as folder:
        return [decoder.name for decoder in decoders(Path(folder))]


def watched(command: list[str]) -> int:
    """Runs one process to its end; the input that killed it is kept. Returns its exit code."""
    with tempfile.NamedTemporaryFile() as current:
        current.truncate(_CURRENT_BYTES)
        code = subprocess.run([*command, "--current", current.name], check=False).returncode
        if code < 0:
            held = Path(current.name).read_bytes()
            name, size = held[-64:].decode().strip(), int.from_bytes(held[:4], "little")
            at = keep(name or "unknown", held[4 : 4 + size])
            print(f"{name}: the process died of signal {-code}, its input is kept as {at}", flush=True)
    return code


def main(cases: int, seed: int, processes: int) -> int:
    """All decoders, so many cases together. Returns the exit code."""
    names = names_of_all()
    each = -(-cases // len(names))
    print(f"seed {seed}: {each} cases for each of {len(names)} decoders in {processes} processes", flush=True)
    codes: list[int] = []

    def one(share: list[str]) -> None:
        words = ["--child", ",".join(share), "--cases", str(each), "--seed", str(seed)]
        codes.append(watched([sys.executable, __file__, *words]))

    threads = [threading.Thread(target=one, args=(names[n::processes],)) for n in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print("no findings" if not any(codes) else "FINDINGS: see above; their inputs are in tests/fuzz/corpus")
    return 1 if any(codes) else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--child", default="")
    parser.add_argument("--current", type=Path)
    given = parser.parse_args()
    if given.child:
        sys.exit(child(given.child.split(","), given.cases, given.seed, given.current))
    sys.exit(main(given.cases, given.seed, given.processes))
