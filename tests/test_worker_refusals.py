"""What `refleet-worker` refuses before it does anything: exit code and words, no traceback, nobody else disturbed."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from refleet.common.redis_stream import RedisStream
from refleet.publisher.fleet import fleet
from servers import Server, free_port
from worker_runs import Runs, Until, publisher, weights

Fails = Callable[..., tuple[int, str]]


def nobody() -> str:
    """The URL of a server that is not there."""
    return f"redis://127.0.0.1:{free_port()}"


@pytest.fixture
def fails(runs: Runs) -> Fails:
    """Exit code and standard error of a worker that can't start; nothing is printed and no traceback shown."""

    def run(*arguments: object, redis: str | None = None, **options: str) -> tuple[int, str]:
        worker = runs.start("--text", *arguments, redis=redis or nobody(), **options)  # type: ignore[arg-type]
        code = worker.code()
        assert "Traceback" not in worker.err
        assert worker.err.startswith("refleet-worker: "), worker.err
        return code, worker.err

    return run


@pytest.mark.parametrize(
    ("engine", "says"),
    [
        ("onnx:x", "starts with torch:, tensorrt:, bundle: or file:"),
        ("tensorrt:x", "tensorrt:package.module:factory"),
        ("torch:engines_here", "torch:package.module:factory"),
        ("torch:no_such_module:make", "no module 'no_such_module'"),
        ("torch:engines_here:mak", "make"),
        ("torch:engines_here:breaks", "RuntimeError: no GPU today"),
        ("file:no/such/folder/model", "there is no folder"),
    ],
)
def test_an_engine_that_can_not_be_made_is_refused(fails: Fails, engine: str, says: str) -> None:
    code, said = fails(engine=engine)
    assert code == 2
    assert says in said


def test_bad_settings_are_refused(fails: Fails, runs: Runs) -> None:
    bad_trust = runs.here / "trust"
    bad_trust.write_text("not a key\n")
    (runs.here / "refleet.toml").write_text("")
    for says, arguments in {
        "line 1 is not a public key": ("--trust", bad_trust),
        "can't read the trust file": ("--trust", "missing"),
        "is no address to listen on": ("--http", "80800"),
        "'x:y' is no address": ("--http", "x:y"),
        "worker id 'a b'": ("--id", "a b"),
        "0 is not in the range": ("--keep", "0"),
        "model name": ("--model", "Not A Name"),
    }.items():
        code, said = fails(*arguments)
        assert (code, says in said) == (2, True), said
    assert fails(redis="http://x")[0] == 2
    assert "unknown key" in fails(environ={"REFLEET_CONFIG": str(_config(runs.here))})[1]


def _config(here: Path) -> Path:
    path = here / "other.toml"
    path.write_text('colour = "red"\n')
    return path


def test_a_state_folder_that_is_not_this_workers_is_refused(
    fails: Fails, valkey: Server, runs: Runs, until: Until
) -> None:
    worker = runs.start(redis=valkey.url)
    with publisher(valkey, runs) as source:
        source.publish(weights(1), version="one").wait(workers=1)
    code, said = fails(redis=valkey.url)
    assert (code, "in use by pid" in said and "worker w0" in said) == (1, True), "a live process has it"
    assert worker.end() == 0
    code, said = fails(redis=valkey.url, worker="w1", state="w0")
    assert (code, "belongs to worker 'w0'" in said) == (2, True)
    code, said = fails(redis=valkey.url, model="another")
    assert (code, f"of model '{runs.model}'" in said) == (2, True)
    code, said = fails(redis=valkey.url, state=f"store/{runs.model}")
    assert (code, "publisher's store" in said) == (2, True)


def test_an_id_that_is_alive_elsewhere_is_refused_and_left_in_peace(
    fails: Fails, valkey: Server, runs: Runs, until: Until
) -> None:
    first = runs.start(redis=valkey.url)
    stream = RedisStream(valkey.url, runs.model)
    until(lambda: [each.id for each in fleet(stream).live] == ["w0"], "it is a member", 60)
    before = stream.member("w0").status
    code, said = fails(redis=valkey.url, state="elsewhere")
    assert (code, "is alive already" in said) == (2, True)
    assert [member.worker for member in stream.members()] == ["w0"]
    assert stream.member("w0").status is not None and before is not None
    stream.close()
    assert first.end() == 0


def test_a_taken_port_is_refused_before_the_fleet_hears_of_the_worker(fails: Fails, valkey: Server, runs: Runs) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, said = fails("--http", taken.getsockname()[1], redis=valkey.url)
    assert (code, "Address already in use" in said) == (2, True)
    stream = RedisStream(valkey.url, runs.model)
    assert stream.members() == []
    stream.close()


def test_an_error_with_json_is_one_json_line(runs: Runs) -> None:
    worker = runs.start(redis=nobody(), engine="what:ever")
    assert worker.code() == 2
    last = json.loads(worker.out)
    assert (last["event"], last["error"]["code"], worker.err) == ("failed", "UsageError", "")
