"""The main job by the command line: publish, wait, look, roll back, verify, collect."""

from __future__ import annotations

import re

from cli_runs import Cli
from refleet.common.signing import SigningKey
from refleet.common.store import Store
from refleet.publisher.book import Book
from refleet.worker.memory_engine import MemoryEngine
from world import checkpoint

RELEASE_KEYS = [
    "version", "epoch", "seq", "kind", "fingerprint", "base", "changed_tensors", "total_tensors", "payload_bytes",
    "full_bytes", "created_at", "message", "restructure",
]  # fmt: skip


def test_publish_wait_status_rollback_by_version_id(cli: Cli) -> None:
    first, second = cli.steps(2)
    with cli.worker("w0"), cli.worker("w1"):
        published = cli.ok("publish", first, "--version", "step-1", "--message", "the first", "--wait")
        assert list(published) == [*RELEASE_KEYS, "already", "live_workers", "waited"]
        assert [w["id"] for w in published["waited"]["workers"]] == ["w0", "w1"]
        assert {w["fingerprint"] for w in published["waited"]["workers"]} == {published["fingerprint"]}
        cli.ok("publish", second, "--version", "step-2", "--wait", "--workers", "2")
        back = cli.ok("rollback", "--to", "step-1", "--wait", "serving")
        assert (back["kind"], back["fingerprint"], back["payload_bytes"]) == ("rollback", published["fingerprint"], 0)
        status = cli.ok("status")
    assert list(status) == ["model", "target", "workers"] and status["model"] == cli.model
    target = {"version": "step-1", "epoch": back["epoch"], "seq": back["seq"], "fingerprint": back["fingerprint"]}
    assert status["target"] == target
    keys = ["id", "state", "serving", "fingerprint", "evidence", "lag", "error", "seen_s"]
    for worker in status["workers"]:
        assert list(worker)[: len(keys)] == keys
        assert (worker["state"], worker["serving"], worker["fingerprint"], worker["evidence"], worker["lag"]) == (
            "SERVING", "step-1", back["fingerprint"], "SERVING", 0,
        )  # fmt: skip


def test_history_is_the_same_from_the_store_and_from_the_log(cli: Cli) -> None:
    first, second = cli.steps(2)
    cli.ok("publish", first, "--version", "step-1", "--message", "the first")
    cli.ok("publish", second, "--version", "step-2")
    cli.ok("rollback", "--to", "step-1")
    from_store = cli.ok("history")
    assert [list(release) for release in from_store] == [RELEASE_KEYS] * 3
    assert [(r["version"], r["kind"]) for r in from_store] == [
        ("step-1", "publish"), ("step-2", "publish"), ("step-1", "rollback"),
    ]  # fmt: skip
    assert from_store[0]["message"] == "the first" and from_store[0]["base"] is None
    assert from_store[1]["base"] == from_store[0]["fingerprint"]
    assert all(re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", r["created_at"]) for r in from_store)
    assert cli.ok("history", "--store", "nowhere") == from_store
    assert not (cli.here / "nowhere").exists()
    assert cli.ok("history", "--last", "1") == from_store[-1:]


def test_what_a_person_reads_fits_80_columns(cli: Cli) -> None:
    first, second = cli.steps(2)
    with cli.worker("w0"):
        said = [
            cli.on("publish", first, "--version", "step-1", "--wait"),
            cli.on("publish", second, "--version", "step-2", "--message", "a second version, with a longer message"),
            *(cli.on(command) for command in ("status", "history", "verify")),
            cli.on("show", "step-2"),
            cli.on("diff", first),
            cli.on("gc", "--dry-run"),
        ]
    assert [ran.code for ran in said] == [0] * len(said)
    lines = [line for ran in said for line in ran.out.replace(str(cli.here), "/srv").splitlines()]
    assert [line for line in lines if len(line) > 80 or line != line.rstrip()] == []
    text = said[0].out
    assert "published step-1" in text and "1 reached SERVING: w0" in text and "6 of 6 tensors" in text


def test_publishing_without_waiting_says_so_and_names_the_daemon(cli: Cli) -> None:
    (first,) = cli.steps(1)
    with cli.worker("w0"):
        ran = cli.on("publish", first)
    assert ran.code == 0
    assert "1 live, not waited for" in ran.out and f"refleet serve --model {cli.model} --store" in ran.out
    with Store(cli.here / "store" / cli.model) as store, store.lock("serve", holder="refleet serve"):
        ran = cli.on("rollback", "--to", "v1")
    assert ran.code == 0 and "v1 is the target already" in ran.out
    assert "refleet serve" not in ran.out, "a daemon runs already"


def test_wait_takes_a_value_or_none(cli: Cli) -> None:
    (first,) = cli.steps(1)
    with cli.worker("w0"):
        published = cli.on("publish", "--json", "--wait", first)  # the path is no evidence
        assert published.code == 0 and published.json["waited"]["evidence"] == "SERVING"
        assert cli.ok("publish", first, "--wait", "staged")["waited"]["evidence"] == "STAGED"
        assert cli.ok("publish", first, "--version", "again", "--wait=SERVING")["waited"]["evidence"] == "SERVING"


def test_show_names_the_tensors_that_a_version_changed(cli: Cli) -> None:
    base = checkpoint(1)
    cli.ok("publish", cli.save("a.safetensors", base), "--version", "a")
    cli.ok("publish", cli.save("b.safetensors", base | {"scale": base["scale"] + 1}), "--version", "b")
    shown = cli.ok("show", "b")
    assert [tensor["name"] for tensor in shown["tensors"] if tensor["changed"]] == ["scale"]
    scale = next(tensor for tensor in shown["tensors"] if tensor["name"] == "scale")
    assert (scale["dtype"], scale["shape"], scale["bytes"]) == ("F32", [], 4)
    assert shown["held"] is True and shown["source"].endswith("b.safetensors")
    from_log = cli.ok("show", "b", "--store", "nowhere")
    assert (from_log["fingerprint"], from_log["tensors"]) == (shown["fingerprint"], None)
    assert from_log["releases"] == shown["releases"]


def test_diff_says_what_publish_then_does_and_writes_nothing(cli: Cli) -> None:
    base = checkpoint(1)
    bias = base["layer.0.bias"].clone()
    bias[7] += 1
    first, second = cli.save("a.safetensors", base), cli.save("b.safetensors", base | {"layer.0.bias": bias})
    assert cli.ok("diff", first)["base"] is None
    assert not (cli.here / "store").exists()
    cli.ok("publish", first, "--version", "a")
    before = sorted(path for path in (cli.here / "store").rglob("*"))
    found = cli.ok("diff", second)
    assert sorted(path for path in (cli.here / "store").rglob("*")) == before
    assert (found["base"], found["changed_tensors"], found["changed_elements"]) == ("a", 1, 1)
    assert found["tensors"] == [
        {
            "name": "layer.0.bias",
            "elements": 256,
            "changed_elements": 1,
            "payload_bytes": found["tensors"][0]["payload_bytes"],
        }
    ]
    published = cli.ok("publish", second, "--version", "b")
    assert (published["fingerprint"], published["payload_bytes"]) == (found["fingerprint"], found["payload_bytes"])
    again = cli.ok("diff", second)
    assert (again["changed_tensors"], again["payload_bytes"], again["tensors"]) == (0, 0, [])


def test_verify_names_the_first_differing_tensor_and_fails_without_workers(cli: Cli) -> None:
    (first,) = cli.steps(1)
    cli.ok("publish", first)
    empty = cli.on("verify", "--json")
    assert (empty.code, empty.json["ok"], empty.json["workers"]) == (3, False, [])
    engine = MemoryEngine()
    with cli.worker("w0", engine) as worker, cli.worker("w1") as other:
        worker.wait(), other.wait()
        assert cli.ok("verify")["ok"] is True
        engine.tensors["layer.0.bias"] = bytes(512)
        damaged = cli.on("verify", "--json")
        assert damaged.code == 3 and damaged.json["ok"] is False
        assert {w["id"]: (w["ok"], w["first_bad"]) for w in damaged.json["workers"]} == {
            "w0": (False, "layer.0.bias"), "w1": (True, None),
        }  # fmt: skip


def test_verify_fails_when_a_live_worker_is_silent(cli: Cli) -> None:
    (first,) = cli.steps(1)
    cli.ok("publish", first)
    with cli.worker("w0") as worker:
        worker.wait()
        late = cli.on("verify", "--timeout", "0", "--json")
    assert (late.code, late.json["ok"], late.json["silent"]) == (3, False, ["w0"])


def test_gc_says_why_each_version_stays(cli: Cli) -> None:
    for number, path in enumerate(cli.steps(3), start=1):
        cli.ok("publish", path, "--version", f"step-{number}")
    planned = cli.ok("gc", "--keep", "1", "--dry-run")
    reasons = {kept["version"]: kept["reason"] for kept in planned["kept"]}
    assert "step-1" in planned["dropped"] and reasons.pop("step-3") == "the target"
    assert set(reasons.items()) <= {("step-2", "a payload towards it is in the server")}, "as long as it is there"
    with Store(cli.here / "store" / cli.model) as store:
        assert len(store.manifests()) == 3, "a dry run drops nothing"
    done = cli.ok("gc", "--keep", "1")
    assert (done["dropped"], done["kept"]) == (planned["dropped"], planned["kept"])
    with Store(cli.here / "store" / cli.model) as store:
        held = {v.version for v in Book(store).versions() if v.fingerprint in set(store.manifests())}
    assert held == {kept["version"] for kept in done["kept"]}


def test_a_signed_release_is_served_and_an_unsigned_one_is_refused(cli: Cli) -> None:
    first, second = cli.steps(2)
    made = cli("keys", "new", "publisher.pem", "--json").json
    assert SigningKey.load("publisher.pem").key_id.hex() == made["key_id"]
    shown = cli("keys", "show", "publisher.pem")
    assert shown.out == made["public"] + "\n", "it can be piped into `keys trust`"
    added = cli("keys", "trust", "trusted.txt", *shown.out.split(), "--json").json
    assert added["added"] is True and [key["key_id"] for key in added["keys"]] == [made["key_id"]]
    assert cli("keys", "trust", "trusted.txt", made["public"], "--json").json["added"] is False
    with cli.worker("w0", trust="trusted.txt") as worker:
        cli.ok("publish", first, "--version", "signed", "--key", "publisher.pem", "--wait")
        assert cli.ok("verify", "--key", "publisher.pem")["ok"] is True
        refused = cli.on("publish", second, "--version", "unsigned", "--wait", "--timeout", "1")
        assert refused.code == 3 and "this release is unsigned (no --key): w0 will refuse it" in refused.err
        assert worker.wait().version == "signed"
        status = cli.on("status")
    assert "w0 refused 2 records: BadSignature" in status.out, "the announcement of its payload, and the release"
    assert cli.ok("status", "--trust", "trusted.txt")["target"]["version"] == "signed"
    assert cli.ok("status")["target"]["version"] == "unsigned"
    assert [r["version"] for r in cli.ok("history", "--store", "no", "--trust", "trusted.txt")] == ["signed"]
