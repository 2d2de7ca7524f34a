"""Wrong use, broken input, other publishers, no server, no workers: messages and exit codes of the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cli_runs import Cli
from refleet.common.types import TensorSpec
from refleet.publisher.cli import cli as commands
from refleet.worker.memory_engine import MemoryEngine
from servers import Server
from world import checkpoint

ALL = ["publish", "rollback", "status", "history", "show", "diff", "verify", "serve", "gc", "keys", "server"]


def test_help_lists_the_main_job_first_and_every_command_has_an_example(cli: Cli) -> None:
    overview = cli("--help")
    assert overview.code == 0
    assert list(commands.commands) == ALL
    assert overview.out.index("  publish ") < overview.out.index("  rollback ") < overview.out.index("  status ")
    for name in [*ALL, "keys new", "keys trust", "keys show"]:
        said = cli(*name.split(), "--help")
        assert said.code == 0 and f"Example:\n    refleet {name.split()[0]} " in said.out, name
        assert [line for line in said.out.splitlines() if len(line) > 80] == []


@pytest.mark.parametrize(
    "words", [("publish",), ("frobnicate",), ("status", "--modle", "m"), ("publish", "x", "--wait=soon")]
)
def test_a_command_line_that_makes_no_sense_is_exit_code_2(cli: Cli, words: tuple[str, ...]) -> None:
    plain, as_json = cli(*words), cli(*words, "--json")
    assert (plain.code, as_json.code) == (2, 2)
    assert "--help" in plain.err and plain.out == ""
    assert as_json.json["error"]["code"] == "UsageError"


def test_a_bad_configuration_is_named_but_leaves_the_help(cli: Cli) -> None:
    Path("refleet.toml").write_text("redis = ")
    code, error = cli.fails("status")
    assert code == 2 and "not TOML" in error["what"] and error["about"] == "refleet.toml"
    assert cli("publish", "--help").code == 0


def test_a_missing_store_is_named_with_the_way_to_give_one(cli: Cli) -> None:
    (first,) = cli.steps(1)
    del cli.environ["REFLEET_STORE"]
    for words in (["publish", first], ["diff", first], ["rollback", "--to", "v1"], ["gc"], ["serve"]):
        code, error = cli.fails(*words)
        assert code == 2 and "REFLEET_STORE" in error["next"], words


@pytest.mark.parametrize("words", [["rollback", "--to", "v1"], ["gc"]])
def test_a_mistyped_store_does_not_become_a_second_publisher(cli: Cli, words: list[str]) -> None:
    (first,) = cli.steps(1)
    cli.ok("publish", first)
    code, error = cli.fails(*words, "--store", "stroe")
    assert code == 2 and "no store of model" in error["what"]
    assert not (cli.here / "stroe").exists()


def test_checkpoints_that_can_not_be_published_say_what_is_still_served(cli: Cli) -> None:
    base = checkpoint(1)
    cli.ok("publish", cli.save("a.safetensors", base), "--version", "a")
    broken = cli.here / "broken.safetensors"
    broken.write_bytes((cli.here / "a.safetensors").read_bytes()[:-50])
    wide = cli.save("wide.safetensors", base | {"layer.0.bias": torch.zeros(257, dtype=torch.float16)})
    for path, named in [("nope.safetensors", "does not exist"), (broken, "cut off"), (wide, "F16[257]")]:
        code, error = cli.fails("publish", path)
        assert code == 1 and named in error["what"] and error["serving"] == "the fleet's target is still a", error
    assert "F16[256]" in error["what"] and error["tensor"] == "layer.0.bias"
    code, error = cli.fails("diff", wide)
    assert (code, error["code"]) == (1, "IncompatibleCheckpoint")
    assert [release["version"] for release in cli.ok("history")] == ["a"]


def test_a_version_id_never_gets_other_content(cli: Cli) -> None:
    first, second = cli.steps(2)
    cli.ok("publish", first, "--version", "a")
    code, error = cli.fails("publish", second, "--version", "a")
    assert (code, error["code"]) == (1, "VersionExists")
    assert cli.ok("publish", first, "--version", "a")["already"] is True
    code, error = cli.fails("publish", second, "--version", "../a")
    assert (code, error["code"]) == (2, "UsageError")


def test_unknown_versions_name_the_known_ones(cli: Cli) -> None:
    (first,) = cli.steps(1)
    cli.ok("publish", first, "--version", "a")
    for words in (["rollback", "--to", "b"], ["show", "b"], ["show", "b", "--store", "nowhere"]):
        code, error = cli.fails(*words)
        assert (code, error["code"]) == (1, "UnknownVersion") and error["next"].endswith(": a"), error


def test_a_second_store_is_refused_with_the_holder_named_until_it_takes_over(cli: Cli) -> None:
    first, second = cli.steps(2)
    cli.ok("publish", first, "--version", "a")
    code, error = cli.fails("publish", second, "--store", "other")
    assert (code, error["code"]) == (1, "PublisherBusy")
    assert str(cli.here / "store" / cli.model) in error["what"] and "--take-over" in error["next"]
    assert error["serving"] == "the fleet's target is still a"
    taken = cli.ok("publish", second, "--version", "b", "--store", "other", "--take-over")
    assert taken["epoch"] == 2
    code, error = cli.fails("publish", first, "--version", "a2")
    assert (code, error["code"]) == (1, "PublisherBusy") and error["serving"].endswith("still b")


def test_a_failing_worker_is_exit_code_3_with_its_reason(cli: Cli) -> None:
    (first,) = cli.steps(1)
    engine = MemoryEngine([TensorSpec("another.weight", "F32", (2,))])
    with cli.worker("w0", engine):
        ran = cli.on("publish", first, "--version", "a", "--wait")
        assert ran.code == 3
        assert "worker w0 failed 'a': NotRefittable" in ran.err and "serving now: worker w0 serves nothing" in ran.err
        status = cli.on("status")
    assert status.code == 0 and "w0: NotRefittable: " in status.out


def test_time_out_names_who_is_missing_and_keeps_the_release(cli: Cli) -> None:
    (first,) = cli.steps(1)
    nobody = cli.on("publish", first, "--version", "a", "--wait", "--timeout", "0.1", "--json")
    assert (nobody.code, nobody.json["error"]["code"]) == (3, "DeadlineExceeded")
    assert nobody.json["error"]["about"] == "no worker of this model has a heartbeat"
    assert nobody.json["release"]["version"] == "a", "it was announced all the same"
    with cli.worker("w0") as worker:
        cli.ok("publish", first, "--version", "a", "--wait")  # the late worker is answered while it waits
        assert worker.wait().version == "a"
        code, error = cli.fails("publish", first, "--wait", "--workers", "2", "--timeout", "0.3", "--version", "a")
        assert (
            code == 3 and error["what"].startswith("1 of 2 workers") and error["about"] == "no further worker is there"
        )
    code, error = cli.fails("publish", first, "--workers", "2")
    assert code == 2 and "--wait" in error["next"]


def test_a_dead_server_is_exit_code_4_and_its_password_is_not_shown(cli: Cli) -> None:
    (first,) = cli.steps(1)
    cli.ok("publish", first, "--version", "a")
    dead = "redis://user:geheim@127.0.0.1:1/0"
    for words in (["status"], ["publish", first], ["rollback", "--to", "a"], ["verify"], ["serve"], ["gc"]):
        ran = cli.on(*words, "--redis", dead)
        assert ran.code == 4 and "127.0.0.1:1" in ran.err and "geheim" not in ran.err + ran.out, ran
    assert "this store's last release is a" in ran.err
    assert [r["version"] for r in cli.ok("history", "--redis", dead)] == ["a"], "the store is enough"
    typed_wrong = cli("status", dead, "--model", cli.model)
    assert typed_wrong.code == 2 and "geheim" not in typed_wrong.err


def test_an_evicting_server_is_refused(cli: Cli) -> None:
    (first,) = cli.steps(1)
    server = Server("valkey", settings={"maxmemory": "50mb", "maxmemory-policy": "allkeys-lru"}).start()
    try:
        code, error = cli.fails("publish", first, "--redis", server.url)
    finally:
        server.stop()
    assert (code, error["code"]) == (4, "NotDurable") and "noeviction" in error["next"]


def test_keys_are_never_overwritten_and_bad_ones_are_named(cli: Cli) -> None:
    assert cli("keys", "new", "k.pem").code == 0
    before = Path("k.pem").read_bytes()
    again = cli("keys", "new", "k.pem")
    assert again.code == 2 and "exists" in again.err and Path("k.pem").read_bytes() == before
    assert cli("keys", "trust", "t.txt", "not", "a", "key").code == 2 and not Path("t.txt").exists()
    assert cli("keys", "show", "nope.pem").code == 2
    (first,) = cli.steps(1)
    code, error = cli.fails("publish", first, "--key", "nope.pem")
    assert code == 2 and error["about"] == "nope.pem"
