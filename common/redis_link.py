"""One Redis server as refleet speaks to it: connections, time limits, and the server's errors in refleet's words."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar
from urllib.parse import urlsplit

import redis
import redis.connection
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, BusyLoadingError, RedisError, ResponseError
from redis.exceptions import ConnectionError as LinkError
from redis.exceptions import TimeoutError as LinkTimeout
from redis.retry import Retry

from .errors import OverBudget, RefleetError, StreamError, StreamUnavailable, UsageError
from .limits import KIB
from .redis_wire import Wire

T = TypeVar("T")

CONNECT_TIMEOUT_S = 5.0
HEALTH_CHECK_S = 30  # a connection idle for longer is pinged before use, so that a dead one costs no request
IDLE_WIRES = 4  # raw connections kept for the next payload
JOIN_BYTES = 16 * KIB  # arguments up to this size are joined into one send; larger ones are sent as they are

#: no CLIENT SETINFO on connect: unknown before 7.2, and it needs a right of its own; renamed in redis-py 7
_OPTIONS = inspect.signature(redis.connection.AbstractConnection.__init__).parameters
_NO_SETINFO: dict[str, Any] = dict.fromkeys({"driver_info"} & set(_OPTIONS) or {"lib_name", "lib_version"})

#: what the server said (first word or class) -> what to do about it
_NEXT = {
    "READONLY": "connect to the primary: this server is a read-only replica",
    "MISCONF": "the server can't save its data: look at its log and its disk",
    "NOREPLICAS": "the server waits for replicas: look at min-replicas-to-write",
    "NOPERM": "grant this user what its role needs: deploy/users.acl",
    "MASTERDOWN": "the replica lost its primary: connect to the primary",
    "CLUSTERDOWN": "wait until the cluster has recovered, or repair it",
    "MOVED": "connect to the server that holds this model's keys: a Cluster needs one url per model",
    "BUSY": "a script of somebody else blocks the server: SCRIPT KILL",
}
_REACH = "check that the server runs and that this host reaches it: redis-cli -u {address} ping"
_LOADING = "wait until the server has loaded its data"
_SIGN_IN = "check user name and password in the Redis url"


class Packer:
    """Commands as bytes to send. Large arguments stay separate, uncopied items; hiredis would copy them four times."""

    def pack(self, *args: object) -> list[bytes | memoryview]:
        """RESP of one command; its name may hold several words ("XINFO STREAM")."""
        words = [*str(args[0]).split(), *args[1:]]
        pieces: list[bytes | memoryview] = []
        head = bytearray(b"*%d\r\n" % len(words))
        for word in words:
            data = word if isinstance(word, (bytes, memoryview)) else str(word).encode()
            head += b"$%d\r\n" % len(data)
            if len(data) > JOIN_BYTES:
                pieces += [bytes(head), data]
                head = bytearray()
            else:
                head += data
            head += b"\r\n"
        pieces.append(bytes(head))
        return pieces


def address_of(url: str, *, given: str = "") -> str:
    """`url` without user, password and options, for messages. Raises UsageError for what is no Redis url; `given` says
    what it was given as.
    """
    try:
        parts = urlsplit(url)
        if parts.scheme == "unix":
            return f"unix://{parts.path}"
        if parts.scheme in ("redis", "rediss"):
            return f"{parts.scheme}://{parts.hostname or 'localhost'}:{parts.port or 6379}{parts.path.rstrip('/')}"
    except ValueError:
        pass
    raise UsageError(
        "the Redis url can't be read", about=given, next="write it as redis://user:password@host:6379/0 (rediss: TLS)"
    )


def _greet(connection: Any) -> None:
    """One reply read at the start takes in what TLS sends after its handshake by itself: redis-py would see bytes that
    nobody asked for, and give the connection up.
    """
    connection.on_connect()
    connection.send_command("PING", check_health=False)
    with suppress(ResponseError):  # a user who may not ask got a reply all the same
        connection.read_response()


class Link:
    """A pool of connections to one server; used from any thread. Nothing is retried unless a method says so."""

    def __init__(self, url: str, *, model: str, timeout_s: float, given: str):
        """`timeout_s` bounds every wait for a reply; `given`: the option that names it. Connects on first use."""
        self.address = address_of(url, given=given)
        self._model = model
        self.timeout_s = timeout_s
        self._closed = False
        self._lock = threading.Lock()
        self._wires: set[Wire] = set()
        self._idle: list[Wire] = []
        try:
            self._pool = redis.ConnectionPool.from_url(
                url,
                protocol=2,  # one handshake and one shape of replies on every server
                socket_timeout=timeout_s,
                socket_connect_timeout=min(CONNECT_TIMEOUT_S, timeout_s),
                health_check_interval=HEALTH_CHECK_S,
                retry=Retry(NoBackoff(), 0),  # redis-py would repeat XADD * after a lost reply
                command_packer=Packer(),
                **({} if url.startswith("unix:") else {"socket_keepalive": True}),
                **({"redis_connect_func": _greet} if url.startswith("rediss:") else {}),
                **_NO_SETINFO,
            )
            self._client: Any = redis.Redis(connection_pool=self._pool)
        except (ValueError, RedisError) as error:
            raise UsageError(f"the Redis url {self.address} can't be used: {error}") from None

    @contextmanager
    def use(self, doing: str) -> Iterator[Any]:
        """The redis-py client; whatever it raises leaves as an error of refleet that says what it was `doing`.

        Replies are taken apart inside the block, too: a link that flips bits may bring one of any shape.
        """
        about = f"model {self._model}, {doing}"
        if self._closed:
            raise self._gone(about)
        try:
            yield self._client
        except (RedisError, OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            if self._closed:  # closing pulls sockets from under waiting calls, with errors of all kinds
                raise self._gone(about) from None
            if not isinstance(error, (RedisError, OSError)):
                self._pool.disconnect(inuse_connections=False)  # who knows what comes next on the one that was used
                raise StreamError(
                    f"Redis at {self.address} gave an answer that can't be read: {type(error).__name__}: {error}",
                    about=about,
                ) from error
            raise _translated(error, self.address, about) from error

    def run(self, doing: str, command: Callable[[Any], T], *, tries: int = 1) -> T:
        """The command's result. `tries` above 1 repeats it after a lost reply: only for writes that compare."""
        with self.use(doing) as client:
            for _ in range(tries - 1):
                try:
                    return command(client)
                except (LinkError, LinkTimeout):
                    if self._closed:
                        raise
            return command(client)

    def refuse(self, error: Exception, doing: str) -> RefleetError:
        """An error found among a pipeline's replies, in refleet's words."""
        return _translated(error, self.address, f"model {self._model}, {doing}")

    def take_wire(self) -> Wire:
        """A raw connection, to be used inside `use` and given back. Raises what redis-py raises while connecting."""
        with self._lock:
            while self._idle:
                wire = self._idle.pop()
                if wire.quiet and time.monotonic() - wire.idle_since < HEALTH_CHECK_S:
                    return wire
                self._wires.discard(wire)
                wire.close()
        connection = self._pool.connection_class(**self._pool.connection_kwargs)
        wire = Wire(connection, timeout_s=self.timeout_s)
        with self._lock:
            self._wires.add(wire)
            if self._closed:  # in the meantime, by another thread
                wire.shut()
        return wire

    def give_wire(self, wire: Wire, *, again: bool) -> None:
        """`again`: the connection may be used again: every reply was read to its end."""
        with self._lock:
            if again and not self._closed and len(self._idle) < IDLE_WIRES:
                wire.idle_since = time.monotonic()
                self._idle.append(wire)
                return
            self._wires.discard(wire)
        wire.close()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for wire in self._wires:
                wire.shut()  # closed by whoever uses it
            for wire in self._idle:
                wire.close()
            self._idle.clear()
        self._pool.disconnect(inuse_connections=True)

    def _gone(self, about: str) -> StreamUnavailable:
        return StreamUnavailable(f"the stream to {self.address} was closed", about=about)


def send_all(client: Any, fill: Callable[[Any], object]) -> list[Any]:
    """One round trip without MULTI, which would hold all chunks in the server a second time."""
    with client.pipeline(transaction=False) as pipe:
        fill(pipe)
        replies: list[Any] = pipe.execute(raise_on_error=False)
        return replies


def _translated(error: Exception, address: str, about: str) -> RefleetError:
    said = str(error) or type(error).__name__
    if "command not allowed when used memory" in said:  # OOM, also from inside scripts
        return OverBudget(
            f"Redis at {address} is full: {said}",
            about=about,
            next="drop old payloads (refleet gc), lower the payload budget, or raise maxmemory",
        )
    if isinstance(error, ResponseError) and not isinstance(error, AuthenticationError):
        code = getattr(error, "status_code", None) or said.split(" ", 1)[0]
        if "permissions" in said or "can't run this command" in said or "can't access" in said:
            code = "NOPERM"  # inside scripts it arrives as a plain ERR
        if code in _NEXT:
            return StreamUnavailable(f"Redis at {address} refuses: {said}", about=about, next=_NEXT[code])
        return StreamError(f"Redis at {address} refuses: {said}", about=about)
    if isinstance(error, AuthenticationError):
        return StreamUnavailable(f"Redis at {address} refuses the sign-in: {said}", about=about, next=_SIGN_IN)
    if isinstance(error, BusyLoadingError):
        return StreamUnavailable(f"Redis at {address} is starting: {said}", about=about, next=_LOADING)
    if isinstance(error, LinkTimeout):
        said = f"no answer in time ({said})"
    return StreamUnavailable(
        f"Redis at {address} can't be reached: {said}", about=about, next=_REACH.format(address=address)
    )
