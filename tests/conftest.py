"""Shared by all tests: a deadline-bound wait instead of sleeping, and real servers."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bundle_twin import own_bundle, saved_bundle  # noqa: F401 - fixtures
from carriers import Carrier, InMemory, OnServer
from cli_runs import cli  # noqa: F401 - a fixture
from early_scene import slow, small_chunks  # noqa: F401 - fixtures
from engine_cases import case, follower  # noqa: F401 - fixtures
from refleet.common.redis_stream import RedisStream
from refleet.common.types import BLOBS, STREAM
from servers import KINDS, Server, needed
from worker_runs import runs  # noqa: F401 - a fixture
from world import World


@pytest.fixture
def until() -> Callable[..., None]:
    """`until(condition, "what should become true")`: polls, and fails with the description after 20 s."""

    def wait(condition: Callable[[], object], what: str, timeout_s: float = 20.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s: {what}"
            time.sleep(0.01)

    return wait


@pytest.fixture(scope="session")
def shared_servers() -> Iterator[dict[str, Server]]:
    """Servers by kind, started when first asked for, one set for each xdist worker."""
    running: dict[str, Server] = {}
    yield running
    for server in running.values():
        server.stop()


def _shared(servers: dict[str, Server], kind: str) -> Server:
    if needed(kind) not in servers:
        servers[kind] = Server(kind).start()
    return servers[kind]


@pytest.fixture
def valkey(shared_servers: dict[str, Server]) -> Server:
    """A running Valkey that other tests use too: work under a model name of your own, and don't break it."""
    return _shared(shared_servers, "valkey")


@pytest.fixture
def redis_server(shared_servers: dict[str, Server]) -> Server:
    """A running redis-server that other tests use too."""
    return _shared(shared_servers, "redis")


@pytest.fixture(params=KINDS)
def server(request: pytest.FixtureRequest, shared_servers: dict[str, Server]) -> Server:
    """Each shared server in turn."""
    return _shared(shared_servers, request.param)


@pytest.fixture(params=KINDS)
def new_server(request: pytest.FixtureRequest) -> Iterator[Callable[..., Server]]:
    """`new_server(aof=True, settings={...})` starts a server that this test may break; each kind in turn."""
    kind = needed(request.param)
    made: list[Server] = []

    def make(*, aof: bool = False, settings: dict[str, str] | None = None) -> Server:
        made.append(Server(kind, aof=aof, settings=settings))
        return made[-1].start()

    yield make
    for each in made:
        each.stop()


@pytest.fixture
def model() -> str:
    """A model name that no other test uses."""
    return f"m-{uuid.uuid4().hex[:12]}"


@pytest.fixture(params=["memory", "valkey", "redis_server"])
def carrier(request: pytest.FixtureRequest, model: str) -> Iterator[Carrier]:
    """Each form of `Stream` in turn, under a model name of its own."""
    place: Carrier = InMemory(model)
    if request.param != "memory":
        place = OnServer(request.getfixturevalue(request.param), model)
    yield place
    place.close()


@pytest.fixture(params=[STREAM, BLOBS])
def kind(request: pytest.FixtureRequest) -> str:
    """Each way in which a payload may lie in a server."""
    return str(request.param)


@pytest.fixture
def connect() -> Iterator[Callable[..., RedisStream]]:
    """`connect(url)`: a stream that is closed after the test."""
    streams: list[RedisStream] = []

    def make(url: str, model: str = "m", *, timeout_s: float = 20.0) -> RedisStream:
        streams.append(RedisStream(url, model, timeout_s=timeout_s))
        return streams[-1]

    yield make
    for stream in streams:
        stream.close()


@pytest.fixture
def world(carrier: Carrier, tmp_path: Path, model: str) -> Iterator[World]:
    """A fleet over each carrier in turn."""
    made = World(carrier, tmp_path, model)
    yield made
    made.close()


@pytest.fixture
def small_world(tmp_path: Path, model: str) -> Iterator[World]:
    """A fleet over the memory carrier: for what does not depend on the server."""
    made = World(InMemory(model), tmp_path, model)
    yield made
    made.close()
