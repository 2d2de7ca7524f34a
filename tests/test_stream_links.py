"""What reading and writing chunks costs, and every kind of connection: unix socket, TLS, a user, another database."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from carriers import PAYLOAD, TTL_S
from refleet.common.errors import StreamUnavailable
from refleet.common.limits import KIB, LIMITS
from refleet.common.redis_stream import RedisStream
from refleet.common.stream import Keys
from refleet.common.types import BLOBS, STREAM
from scripted_server import ScriptedServer, honest, read
from servers import Server, binary, free_port, self_signed

Connect = Callable[..., RedisStream]
SIZE = LIMITS.chunk_bytes


def test_reading_and_writing_allocate_nothing_like_a_chunk(
    server: Server, connect: Connect, model: str, kind: str
) -> None:
    stream = connect(server.url, model)
    data, buffer = memoryview(bytearray(SIZE)), memoryview(bytearray(SIZE))
    stream.put_chunk(PAYLOAD, 0, b"warm", ttl_s=TTL_S, carrier=kind)
    tracemalloc.start()
    for number in range(1, 4):
        stream.put_chunk(PAYLOAD, number, data, ttl_s=TTL_S, carrier=kind)
    with stream.payload_reader(PAYLOAD, range(1, 4), carrier=kind) as reader:
        for number in range(1, 4):
            assert reader.read(number, buffer) == SIZE
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 256 * KIB
    stream.drop_payload(PAYLOAD)


def test_the_next_chunk_is_asked_for_before_this_one_has_come(connect: Connect, kind: str) -> None:
    with ScriptedServer(honest(kind, 0, b"zero"), hold=True) as server:
        stream = connect(server.url, timeout_s=1)
        buffer = memoryview(bytearray(100))
        with stream.payload_reader(PAYLOAD, [0, 7], carrier=kind) as reader:
            assert reader.read(0, buffer) == 4
        keys = Keys("m")
        wanted = keys.blob(PAYLOAD, 7).encode() if kind == BLOBS else b"$3\r\n8-0\r\n"
        assert wanted in server.asked[0]


def test_it_reads_and_writes_over_a_unix_socket(
    new_server: Callable[..., Server], connect: Connect, tmp_path: Path, kind: str
) -> None:
    new_server(settings={"unixsocket": str(tmp_path / "s")})
    stream = connect(f"unix://{tmp_path / 's'}")
    data = bytes(range(256)) * (SIZE // 256)
    stream.put_chunk(PAYLOAD, 0, data, ttl_s=TTL_S, carrier=kind)
    assert read(stream, kind, room=SIZE) == data


def test_it_reads_and_writes_as_a_user_in_another_database(new_server: Callable[..., Server], connect: Connect) -> None:
    server = new_server(settings={"requirepass": "s3cret"})
    stream = connect(server.url_for("default", "s3cret")[:-1] + "3")
    stream.put_chunk(PAYLOAD, 0, b"data", ttl_s=TTL_S)
    assert read(stream, STREAM) == b"data"
    with server.client(password="s3cret", db=3) as client:
        assert client.exists(Keys("m").chunks(PAYLOAD))
    with pytest.raises(StreamUnavailable, match="refuses the sign-in"):
        read(connect(server.url), STREAM)


@pytest.mark.skipif(binary("redis") is None, reason="redis-server is not installed")
def test_it_reads_and_writes_over_tls(connect: Connect, tmp_path: Path, kind: str) -> None:
    certificate, key = self_signed(tmp_path)
    port = free_port()
    settings = {"tls-cert-file": certificate, "tls-key-file": key, "tls-auth-clients": "no", "tls-port": str(port)}
    server = Server("redis", settings=settings).start()
    try:
        stream = connect(f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={certificate}", timeout_s=5)
        data = bytes(range(256)) * (SIZE // 256)
        for number in range(3):
            stream.put_chunk(PAYLOAD, number, data, ttl_s=TTL_S, carrier=kind)
        buffer = bytearray(SIZE)
        with stream.payload_reader(PAYLOAD, range(3), carrier=kind) as reader:
            for number in range(3):
                assert reader.read(number, memoryview(buffer)) == SIZE and buffer == data
        server.kill()
        with pytest.raises(StreamUnavailable, match="can't be reached"):
            read(stream, kind, room=SIZE)
    finally:
        server.stop()


@pytest.mark.skipif(binary("redis") is None, reason="redis-server is not installed")
def test_every_connection_over_tls_can_be_used_at_once(connect: Connect, tmp_path: Path) -> None:
    """TLS 1.3 sends tickets after its handshake: redis-py took them for bytes out of place, one time in seven."""
    certificate, key = self_signed(tmp_path)
    port = free_port()
    settings = {"tls-cert-file": certificate, "tls-key-file": key, "tls-auth-clients": "no", "tls-port": str(port)}
    server = Server("redis", settings=settings).start()
    try:
        for _ in range(40):
            assert connect(f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={certificate}").facts().server
    finally:
        server.stop()
