"""The worker's HTTP port: what probes and Prometheus are told, and that nobody can block it."""

from __future__ import annotations

import gc
import json
import socket
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from refleet.common.errors import RefitFailed
from refleet.common.messages import Serving
from refleet.worker import http
from refleet.worker.engine import StagedVersion
from refleet.worker.http import HttpFront, parse_address, status_dict
from refleet.worker.memory_engine import MemoryEngine
from refleet.worker.worker import Worker
from worker_runs import get, sample
from world import World, checkpoint, reason

Until = Callable[..., None]


class Breaking(MemoryEngine):
    """Fails while `broken`, also when the previous version is to be restored."""

    broken = False

    def apply(self, staged: StagedVersion, changed: frozenset[str]) -> None:
        if self.broken:
            raise RefitFailed("the GPU fell off the bus", tensor="scale")
        super().apply(staged, changed)


@pytest.fixture
def worker(small_world: World) -> Worker:
    return small_world.worker(engine=Breaking())


@pytest.fixture
def front(worker: Worker) -> Iterator[HttpFront]:
    with HttpFront(worker) as made:
        yield made


def engine_of(worker: Worker) -> Breaking:
    assert isinstance(worker.engine, Breaking)
    return worker.engine


def test_a_worker_is_alive_from_the_start_and_ready_from_the_first_version(
    front: HttpFront, small_world: World
) -> None:
    assert get(front.url + "/livez") == (200, {"alive": True, "reason": None})
    code, facts = get(front.url + "/readyz")
    assert (code, facts["ready"], facts["reason"]) == (503, False, "no verified version is served yet")
    small_world.publisher().publish(checkpoint(1), version="one").wait(workers=1)
    assert get(front.url + "/readyz") == (
        200, {"ready": True, "state": "SERVING", "version": "one", "reason": None},
    )  # fmt: skip


def test_a_failed_switch_shows_everywhere_and_leaves_the_worker_ready(
    front: HttpFront, worker: Worker, small_world: World, until: Until
) -> None:
    publisher = small_world.publisher()
    publisher.publish(checkpoint(1), version="one").wait(workers=1)
    engine_of(worker).fail_after = 2
    publisher.publish(checkpoint(2), version="two")
    until(lambda: worker.board.status.state == "FAILED", "the second version fails")
    assert get(front.url + "/readyz")[0] == 200
    status, text = get(front.url + "/status")[1], get(front.url + "/metrics")[1]
    assert (status["serving"]["version"], status["target"]["version"], status["lag"]) == ("one", "two", 1)
    assert status["failure"]["code"] == "RefitFailed"
    assert sample(text, 'refleet_worker_failures_total{code="RefitFailed"}') == 1
    assert sample(text, "refleet_worker_switches_total") == 1
    assert sample(text, "refleet_worker_lag_releases") == 1
    assert sample(text, 'refleet_worker_state{state="FAILED"}') == 1
    assert sample(text, "refleet_worker_behind_seconds") > 0


def test_a_quarantined_worker_is_alive_but_not_ready_and_says_why(
    front: HttpFront, worker: Worker, small_world: World, until: Until
) -> None:
    publisher = small_world.publisher()
    publisher.publish(checkpoint(1), version="one").wait(workers=1)
    engine_of(worker).broken = True
    publisher.publish(checkpoint(2), version="two")
    until(lambda: worker.gate.current is None, "nothing is served")
    until(lambda: worker.board.status.state == "QUARANTINED", "it says so")
    assert get(front.url + "/livez")[0] == 200
    code, facts = get(front.url + "/readyz")
    assert (code, facts["version"]) == (503, None)
    assert "the GPU fell off the bus" in facts["reason"]
    text = get(front.url + "/metrics")[1]
    assert sample(text, 'refleet_worker_serving_info{fingerprint="",state="QUARANTINED",version=""}') == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_crashed_loop_is_neither_alive_nor_ready(
    front: HttpFront, worker: Worker, small_world: World, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a mistake of ours")

    monkeypatch.setattr(worker._follower, "read", broken)
    until(lambda: worker.crash, "the loop ends")
    code, facts = get(front.url + "/livez")
    assert (code, facts["reason"]) == (503, "ZeroDivisionError: a mistake of ours")
    assert get(front.url + "/readyz")[0] == 503
    assert sample(get(front.url + "/metrics")[1], "refleet_worker_up") == 0


def test_a_stopped_worker_is_neither_alive_nor_ready(front: HttpFront, worker: Worker) -> None:
    worker.stop()
    assert get(front.url + "/livez") == (503, {"alive": False, "reason": "the loop does not run"})
    assert get(front.url + "/readyz")[1]["reason"] == "the worker was stopped"


def test_the_status_is_everything_in_json_with_digests_in_hex(
    front: HttpFront, worker: Worker, small_world: World
) -> None:
    release = small_world.publisher().publish(checkpoint(1), version="one").release
    worker.wait("one")
    status = get(front.url + "/status?pretty")[1]
    assert status.keys() == status_dict(worker).keys()
    assert status["serving"]["fingerprint"] == release.fingerprint.hex()
    assert status["have"] == [release.fingerprint.hex()]
    assert status["evidence"] == "SERVING"
    assert 0 <= status["silence_s"] < 20
    assert status["received_total_bytes"] == release.payload_bytes


def test_the_metrics_can_be_parsed_and_name_one_worker_each(front: HttpFront, small_world: World) -> None:
    other = small_world.worker("w1")
    small_world.publisher().publish(checkpoint(1), version="one").wait(workers=2)
    text = get(front.url + "/metrics")[1]
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert all(name.startswith("refleet_worker_") for name in families)
    info = families["refleet_worker_info"].samples[0].labels
    assert (info["worker"], info["model"]) == ("w0", small_world.model)
    with HttpFront(other) as second:
        text = get(second.url + "/metrics")[1]
    assert 'worker="w1"' in text
    assert sample(text, "refleet_worker_switches_total") == 0, "it counts from when it was made"


def test_only_known_paths_and_only_reading(front: HttpFront) -> None:
    assert get(front.url + "/")[0] == 404
    code, facts = get(front.url + "/status/../livez")
    assert (code, facts["paths"]) == (404, ["/livez", "/readyz", "/status", "/metrics"])
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        assert get(front.url + "/livez", method=method)[0] == 405
    assert get(front.url + "/livez", method="BREW")[0] == 501
    for path, expected in (("/livez", 200), ("/readyz", 503), ("/nope", 404)):
        assert get(front.url + path, method="HEAD") == (expected, "")


def test_slow_clients_keep_nobody_out_and_do_not_hold_up_the_end(
    worker: Worker, small_world: World, until: Until
) -> None:
    with HttpFront(worker) as front:
        address = front._server.server_address
        slow = [socket.create_connection(address[:2]) for _ in range(3 * http.MAX_CONNECTIONS)]  # type: ignore[arg-type]
        for client in slow:
            client.sendall(b"GET /status HTTP/1.1\r\nX: ")
        for path in ("/livez", "/status", "/metrics"):
            assert get(front.url + path)[0] == 200
        until(lambda: len(front._server._open) <= http.MAX_CONNECTIONS, "the oldest ones are dropped", 6)
        small_world.publisher().publish(checkpoint(1), version="one").wait(workers=1)
    assert not front._server._open, "every connection is closed"
    for client in slow:
        client.close()


def test_a_client_that_sends_nonsense_or_goes_away_changes_nothing(front: HttpFront) -> None:
    address = front._server.server_address[:2]
    for sent in (b"", b"\0\xff" * 500 + b"\r\n\r\n", b"GET\r\n\r\n", b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\n\r\n"):
        with socket.create_connection(address) as client:  # type: ignore[arg-type]
            client.sendall(sent)
    assert get(front.url + "/livez")[0] == 200


def test_closing_leaves_nothing_open_and_may_be_repeated(worker: Worker) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        front = HttpFront(worker).start()
        url = front.url
        assert get(url + "/livez")[0] == 200
        front.close()
        front.close()
        never_started = HttpFront(worker)
        never_started.close()
        del front, never_started
        gc.collect()
    assert [str(warning.message) for warning in seen] == []
    with pytest.raises(OSError):
        get(url + "/livez")


def test_a_port_in_use_is_said_in_words(worker: Worker) -> None:
    with HttpFront(worker) as front:
        port = int(front.url.rpartition(":")[2])
        error = reason(lambda: HttpFront(worker, port=port))
    assert (error.code, error.exit_code) == ("UsageError", 2)
    assert f"127.0.0.1 port {port}: Address already in use" in error.what
    assert "can't listen on" in reason(lambda: HttpFront(worker, host="no.such.host.invalid")).what


def test_addresses_are_ports_or_hosts_with_ports() -> None:
    assert parse_address("8080") == ("127.0.0.1", 8080)
    assert parse_address("0.0.0.0:0") == ("0.0.0.0", 0)
    assert parse_address("[::1]:80") == ("::1", 80)
    for bad in ("", "x", "65536", "-1", ":80", "a:b", "::1:80", "host:", "1 2"):
        assert reason(lambda bad=bad: parse_address(bad)).code == "UsageError", bad  # type: ignore[misc]


def test_it_listens_on_ipv6_where_there_is_one(worker: Worker) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    with HttpFront(worker, host="::1") as front:
        assert front.url.startswith("http://[::1]:")
        assert get(front.url + "/livez")[0] == 200


def test_a_mistake_in_an_answer_is_a_500_and_not_a_dead_port(
    front: HttpFront, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(http, "status_dict", lambda _: 1 / 0)
    assert get(front.url + "/status")[0] == 500
    assert "ZeroDivisionError" in caplog.text
    assert get(front.url + "/livez")[0] == 200


def test_the_status_of_a_wanting_worker_names_what_it_asks_for(
    small_world: World, until: Until, tmp_path: Path
) -> None:
    publisher = small_world.publisher(answer=False)
    first = small_world.worker("first")
    release = publisher.publish({"w": torch.ones(4)}, version="one")
    release.wait(workers=1)
    publisher.close()  # its payload is not needed by anybody and may go
    stream = small_world.carrier.stream()
    stream.drop_payload(release.release.payload.payload_id)  # type: ignore[union-attr]
    late = small_world.worker("late")
    with HttpFront(late) as front:
        until(lambda: late.board.status.want, "it asks")
        status = json.loads(json.dumps(get(front.url + "/status")[1]))
    assert status["state"] == "WAITING"
    assert status["want"]["target"] == release.release.fingerprint.hex()
    assert status["have"] == []
    assert isinstance(first.gate.current, Serving)
