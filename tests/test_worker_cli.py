"""`refleet-worker` as people and init systems run it: real processes against a real Valkey."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from refleet.common.redis_stream import RedisStream
from refleet.publisher.fleet import fleet
from safetensors import safe_open
from servers import Server
from worker_runs import PROGRAM, Runs, Until, get, publisher, sample, weights


@pytest.fixture
def own_valkey() -> Iterator[Server]:
    """A Valkey that the test may kill; it keeps nothing."""
    server = Server("valkey").start()
    yield server
    server.stop()


def test_help_needs_no_torch_and_shows_an_example_that_parses() -> None:
    code = "import sys, refleet.worker.cli as c; c.execute(['run', '--help'], {}); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "refleet-worker run --model policy --engine file:./policy.safetensors" in done.stdout


def test_the_names_of_the_package_are_imported_on_first_use() -> None:
    code = (
        "import sys\nfrom refleet.worker import Worker, FileEngine\nassert 'torch' not in sys.modules\n"
        "from refleet.worker import TorchEngine\nassert 'torch' in sys.modules\n"
        "import refleet.worker\ntry:\n    refleet.worker.Nonsense\nexcept AttributeError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, "Nonsense" in done.stdout) == (0, True), done.stderr


def test_a_torch_worker_serves_what_is_published_and_says_so(valkey: Server, runs: Runs, until: Until) -> None:
    worker = runs.start(redis=valkey.url, engine="torch:engines_here:make")
    with publisher(valkey, runs) as source:
        until(lambda: worker.url and get(worker.url + "/livez")[0] == 200, "it runs", 60)
        code, facts = get(worker.url + "/readyz")
        assert (code, facts["ready"], facts["version"]) == (503, False, None)
        assert facts["reason"]
        source.publish(weights(1), version="one").wait(workers=1)
        assert get(worker.url + "/readyz")[1]["version"] == "one"
        source.publish(weights(2), version="two").wait(workers=1)
        source.rollback("one").wait(workers=1)
        status = worker.status()
        metrics = get(worker.url + "/metrics")[1]
        fingerprint = source.book.version("one").fingerprint.hex()
    assert worker.end() == 0
    assert (status["state"], status["evidence"], status["lag"]) == ("SERVING", "SERVING", 0)
    assert status["serving"] == {"version": "one", "epoch": 1, "seq": 3, "fingerprint": fingerprint}
    assert status["have"][0] == fingerprint
    assert status["want"] is None
    assert sample(metrics, "refleet_worker_switches_total") == 3
    assert sample(metrics, 'refleet_worker_phase_seconds_count{phase="stage"}') == 2, "the rollback staged nothing"
    assert sample(metrics, 'refleet_worker_phase_seconds_count{phase="pause"}') == 3
    assert sample(metrics, "refleet_worker_received_bytes_total") == status["received_total_bytes"] > 0
    keys = {"event", "time", "worker", "model", "state", "serving", "text"}
    extra = {"started": {"http"}, "changed": {"failure"}, "stopping": set(), "ended": set()}
    events = worker.events
    assert all(event.keys() == keys | extra[event["event"]] for event in events)
    assert events[0]["event"] == "started"
    assert events[-1]["event"] == "ended"
    served = [event["text"] for event in events if event["text"].startswith("serving ")]
    assert served == ["serving one", "serving two", "serving one"]


def test_text_lines_name_time_worker_and_state_and_the_file_engine_runs_its_command(
    valkey: Server, runs: Runs, until: Until
) -> None:
    told = runs.here / "told"
    worker = runs.start("--text", "--on-serving", f"touch {told}", redis=valkey.url)
    with publisher(valkey, runs) as source:
        source.publish(weights(1), version="one").wait(workers=1)
    until(told.exists, "the command ran")
    with safe_open(runs.here / "w0.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("weight"), weights(1)["weight"])
    assert worker.end(signal.SIGINT) == 0
    lines = worker.out.splitlines()
    assert any(line.split(" ", 2)[2] == "w0 SERVING serving one" for line in lines), lines
    assert "http http://127.0.0.1:" in lines[0]
    assert worker.err == ""


def test_a_worker_that_starts_without_its_server_serves_from_disk_as_stale_and_follows_later(
    own_valkey: Server, runs: Runs, until: Until
) -> None:
    worker = runs.start(redis=own_valkey.url)
    with publisher(own_valkey, runs) as source:
        source.publish(weights(1), version="one").wait(workers=1)
        assert worker.end() == 0
        own_valkey.kill()
        worker = runs.start(redis=own_valkey.url)
        until(lambda: worker.serves("one"), "it serves its last version", 60)
        until(lambda: worker.status()["state"] == "STALE", "it says that the news is old")
        assert get(worker.url + "/readyz")[0] == 200
        assert worker.status()["silence_s"] > 1
        own_valkey.start(empty=True)
        until(lambda: worker.status()["state"] == "SERVING", "it has contact again")
        assert worker.status()["silence_s"] < 2
        source.publish(weights(2), version="two").wait(workers=1)
        assert worker.serves("two")
    assert worker.end() == 0


def test_a_worker_whose_server_dies_stays_ready_and_recovers_even_when_all_data_is_lost(
    own_valkey: Server, runs: Runs, until: Until
) -> None:
    worker = runs.start(redis=own_valkey.url)
    with publisher(own_valkey, runs) as source:
        source.publish(weights(1), version="one").wait(workers=1)
        own_valkey.kill()
        until(lambda: worker.status()["state"] == "STALE", "it says that the news is old")
        assert get(worker.url + "/readyz")[0] == 200
        assert sample(get(worker.url + "/metrics")[1], 'refleet_worker_state{state="STALE"}') == 1
        until(lambda: worker.events[-1]["state"] == "STALE", "the log says it as well")
        own_valkey.start(empty=True)
        until(lambda: worker.status()["state"] == "SERVING", "it has contact again")
        source.publish(weights(2), version="two").wait(workers=1)
    assert worker.end() == 0
    lost = [event for event in worker.events if "no contact" in event["text"]]
    assert [event["state"] for event in lost] == ["STALE"], "said once"


def test_without_server_and_version_it_says_so_once_and_waits(runs: Runs, until: Until) -> None:
    server = Server("valkey")
    worker = runs.start(redis=server.url)
    until(lambda: worker.url and worker.status()["silence_s"] > 4, "several tries", 60)
    assert get(worker.url + "/livez")[0] == 200
    assert get(worker.url + "/readyz")[0] == 503
    assert sum("no contact" in event["text"] for event in worker.events) == 1
    server.start()
    try:
        with publisher(server, runs) as source:
            source.publish(weights(1), version="one").wait(workers=1)
        assert worker.end() == 0
    finally:
        server.stop()


def test_a_version_that_does_not_fit_shows_in_status_and_metrics(valkey: Server, runs: Runs, until: Until) -> None:
    worker = runs.start(redis=valkey.url, engine="torch:engines_here:make")
    with publisher(valkey, runs) as source:
        release = source.publish({"weight": torch.ones(4, 9), "bias": torch.ones(4)}, version="other")
        until(lambda: worker.url and worker.status()["state"] == "FAILED", "it refuses the version", 60)
        status, metrics = worker.status(), get(worker.url + "/metrics")[1]
        with pytest.raises(Exception, match="NotRefittable"):
            release.wait(workers=1, timeout_s=10)
    assert status["failure"]["code"] == "NotRefittable"
    assert status["failure"]["tensor"] == "weight"
    assert status["behind_s"] > 0
    assert sample(metrics, 'refleet_worker_failures_total{code="NotRefittable"}') == 1
    assert sample(metrics, "refleet_worker_switches_total") == 0
    code, facts = get(worker.url + "/readyz")
    assert code == 503
    assert "NotRefittable" in facts["reason"]
    assert worker.end() == 0


def test_it_leaves_the_fleet_when_it_is_asked_to_end(valkey: Server, runs: Runs, until: Until) -> None:
    worker = runs.start(redis=valkey.url)
    stream = RedisStream(valkey.url, runs.model)
    until(lambda: [each.id for each in fleet(stream).live] == ["w0"], "it is a member", 60)
    assert worker.end() == 0
    assert stream.members() == []
    stream.close()


def test_a_second_signal_ends_it_at_once(valkey: Server, runs: Runs, until: Until) -> None:
    hanging = runs.here / "hangs"
    worker = runs.start("--on-serving", f"sh -c 'touch {hanging}; sleep 25'", redis=valkey.url)
    with publisher(valkey, runs) as source:
        source.publish(weights(1), version="one").wait(workers=1)
        until(hanging.exists, "the step at hand takes long")
        worker.process.terminate()
        until(lambda: worker.events[-1]["event"] == "stopping", "it drains")
        assert worker.process.poll() is None, "the step at hand is finished first"
        assert worker.end() == 128 + signal.SIGTERM


def test_a_reader_that_goes_away_does_not_end_the_worker(valkey: Server, runs: Runs, until: Until) -> None:
    read, write = os.pipe()
    command = [PROGRAM, "run", "--model", runs.model, "--id", "w0", "--state", "w0", "--engine", "file:m", "--redis"]
    process = subprocess.Popen([*command, valkey.url], cwd=runs.here, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    os.read(read, 1)
    os.close(read)
    with publisher(valkey, runs) as source:
        source.publish(weights(1), version="one").wait(workers=1)
    process.terminate()
    assert process.communicate(timeout=60)[1] == b""
    assert process.returncode == 0


def test_a_server_that_hangs_makes_it_stale_and_does_not_hold_up_its_end(
    own_valkey: Server, runs: Runs, until: Until
) -> None:
    worker = runs.start(redis=own_valkey.url)
    with publisher(own_valkey, runs) as source:
        source.publish(weights(1), version="one").wait(workers=1)
    os.kill(own_valkey.pid, signal.SIGSTOP)
    try:
        until(lambda: worker.status()["state"] == "STALE", "it says that the news is old")
        assert get(worker.url + "/readyz")[0] == 200
        worker.process.terminate()
        assert worker.process.wait(15) == 0, "well before the 20 s that a reply may take"
    finally:
        os.kill(own_valkey.pid, signal.SIGCONT)
