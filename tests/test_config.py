"""Where settings come from, and what a configuration file must not say."""

from __future__ import annotations

from pathlib import Path

import pytest
from refleet.common.config import Settings, redacted, settings
from refleet.common.errors import UsageError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_without_file_and_environment_there_are_defaults() -> None:
    assert settings({}) == Settings("redis://127.0.0.1:6379", None, None, None, "", "", "", "auto")


def test_the_environment_sets_everything() -> None:
    environ = {
        "REFLEET_REDIS": "rediss://r",
        "REFLEET_STORE": "s",
        "REFLEET_KEY": "/k",
        "REFLEET_TRUST": "t",
        "REFLEET_CRASH_AT": "commit",
        "REFLEET_PAYLOAD_REDIS": "redis://p",
        "REFLEET_READ_FROM": "redis://replica",
        "REFLEET_CARRIER": "blobs",
    }
    assert settings(environ) == Settings(
        "rediss://r", Path("s"), Path("/k"), Path("t"), "commit", "redis://p", "redis://replica", "blobs"
    )


def test_the_environment_wins_over_the_file(folder: Path) -> None:
    (folder / "refleet.toml").write_text('redis = "redis://file"\nstore = "file"\n')
    found = settings({"REFLEET_REDIS": "redis://environment"})
    assert (found.redis, found.store) == ("redis://environment", Path("file"))


def test_an_empty_variable_counts_as_unset(folder: Path) -> None:
    (folder / "refleet.toml").write_text('trust = "trust"\n')
    assert settings({"REFLEET_TRUST": "", "REFLEET_CONFIG": ""}).trust == Path("trust")


def test_a_named_file_is_read_instead_and_its_paths_start_beside_it(folder: Path) -> None:
    (folder / "refleet.toml").write_text('redis = "redis://here"\n')
    (folder / "etc").mkdir()
    (folder / "etc" / "other.toml").write_text('store = "data"\nkey = "/abs/key"\ntrust = "~/trust"\n')
    found = settings({"REFLEET_CONFIG": "etc/other.toml", "HOME": "/home/me"})
    wanted = Settings(store=Path("etc/data"), key=Path("/abs/key"), trust=Path("/home/me/trust"))
    assert found == wanted
    assert found.redis == "redis://127.0.0.1:6379"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('reddis = "x"', "unknown key 'reddis'"),
        ("[redis]\nurl = 'x'", "value of redis must be a text, not dict"),
        ("store = 7", "value of store must be a text, not int"),
        ("key = true", "value of key must be a text, not bool"),
        ('trust = ""', "value of trust must be a text, not an empty one"),
        ("redis", "not TOML"),
        ("a = " + "[" * 100_000, "not TOML"),
        ("#" * ((1 << 20) + 1), "larger than"),
    ],
)
def test_a_file_with_mistakes_is_refused_by_name(folder: Path, text: str, match: str) -> None:
    (folder / "refleet.toml").write_text(text)
    with pytest.raises(UsageError, match=match) as caught:
        settings({})
    assert caught.value.about == "refleet.toml"
    if "key " in match or "value" in match:
        assert "redis, store, key, trust, crash_at" in caught.value.next


def test_a_file_that_is_not_utf8_or_missing_is_refused(folder: Path) -> None:
    (folder / "refleet.toml").write_bytes(b"redis = '\xff'")
    with pytest.raises(UsageError, match="not TOML"):
        settings({})
    with pytest.raises(UsageError, match="No such file") as caught:
        settings({"REFLEET_CONFIG": "missing.toml"})
    assert caught.value.about == "missing.toml"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://127.0.0.1:6379/0", "redis://127.0.0.1:6379/0"),
        ("redis://:secret@host:6379", "redis://:***@host:6379"),
        ("rediss://me:secret@host:6379/1?ssl=x", "rediss://me:***@host:6379/1?ssl=x"),
        ("redis://me:sec:r@e/t@host", "redis://me:***@host"),
        ("redis://secret@host", "redis://***@host"),
        ("redis://me:sec://ret@host", "redis:***@host"),
        ("me:secret@host:6379", "me:***@host:6379"),
        ("redis://host?password=secret&db=1", "redis://host?password=***&db=1"),
        ("unix:///run/redis.sock?db=1&Password=s@cret", "unix:///run/redis.sock?db=1&Password=***"),
        ("redis://host?ssl_keyfile_password=secret#x", "redis://host?ssl_keyfile_password=***#x"),
        ("host:6379", "host:6379"),
        ("", ""),
    ],
)
def test_a_url_is_shown_without_its_password(url: str, shown: str) -> None:
    assert redacted(url) == shown


def test_settings_do_not_show_the_url_by_accident() -> None:
    assert "secret" not in repr(settings({"REFLEET_REDIS": "redis://:secret@host"}))
