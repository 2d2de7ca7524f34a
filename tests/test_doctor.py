"""`refleet-worker doctor`: its verdict over facts given by hand, and the command on this machine."""

from __future__ import annotations

import dataclasses
import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from refleet.common.stream import ServerFacts
from refleet.publisher import Publisher
from refleet.worker import doctor_facts
from refleet.worker.cli import execute
from refleet.worker.doctor import FAIL, KNOWN, OK, WARN, Check, checks, duration
from refleet.worker.doctor_cli import as_object, summary, table
from refleet.worker.machine import Facts, Gpu, Loaded, Package, Server, Trial
from servers import Server as Running
from servers import free_port

GIB = 1 << 30
REAL_RUN = subprocess.run
FINE = Facts(
    python="Python 3.12.3, Linux x86_64", refleet=Package("refleet", "0.1.0"), torch=Package("torch", "2.14.1+cu130"),
    torch_build="CUDA 13.0", torch_tensorrt=Package("torch_tensorrt", "2.14.0"),
    tensorrt=Package("tensorrt", "10.16.0.1"), safetensors=Package("safetensors", "0.8.0"),
    redis=Package("redis", "8.1.0"), gpus=(Gpu("NVIDIA H200", (9, 0), 139 * GIB, 140 * GIB),), driver="580.65.06",
    server=Server(
        "redis://here:6379", ServerFacts("Redis 6.2.0", 0, 0, "noeviction", True, "r"), model="m", releases=True
    ),
    tested=Trial(applied=("fast: 5 of 5",) * 3, seconds=(("compile", 12.34), ("first refit", 0.0412))),
    loaded=Loaded("tensorrt:m:make", "TensorRT 10.16, H200 abc", "fast path: 5 engine weights covered", 65.0),
)  # fmt: skip


def judged(**changes: object) -> dict[str, Check]:
    """The verdict over a fine machine with these changes, by name; every check that is not ok says what to do."""
    found = checks(dataclasses.replace(FINE, **changes))  # type: ignore[arg-type]
    by_name = {check.name: check for check in found}
    assert len(by_name) == len(found), "two checks have one name"
    assert all(check.text and (check.status == OK or check.next) for check in found)
    return by_name


def bad(found: dict[str, Check]) -> dict[str, str]:
    return {name: check.status for name, check in found.items() if check.status != OK}


def with_server(**changes: object) -> dict[str, Check]:
    assert FINE.server is not None
    assert FINE.server.facts is not None
    return judged(server=dataclasses.replace(FINE.server, facts=dataclasses.replace(FINE.server.facts, **changes)))


# ---------------------------------------------------------------------- the verdict


def test_a_machine_where_all_is_fine() -> None:
    found = judged()
    assert bad(found) == {}
    assert list(found) == [
        "python", "refleet", "torch", "torch_tensorrt", "tensorrt", "safetensors", "redis", "gpu 0", "server",
        "eviction", "AOF", "model", "self-test", "engine",
    ]  # fmt: skip
    for part in ("NVIDIA H200", "9.0", "139.0 of 140.0 GiB", "580.65.06"):
        assert part in found["gpu 0"].text
    assert "compile 12.3 s, first refit 41 ms" in found["self-test"].text
    assert "abc; fast path: 5 engine weights covered (loaded in 65.0 s)" in found["engine"].text


def test_what_was_not_asked_for_is_not_judged() -> None:
    found = judged(server=None, tested=None, loaded=None)
    assert not {"server", "eviction", "AOF", "model", "self-test", "engine"} & found.keys()


def test_a_cpu_build_of_torch_and_a_machine_without_a_device_get_different_sentences() -> None:
    cpu = judged(torch=Package("torch", "2.13.0+cpu"), torch_build="", gpus=())["gpu"]
    none = judged(gpus=(), driver="", no_gpu="Found no NVIDIA driver on your system")["gpu"]
    hidden = judged(gpus=())["gpu"]
    assert (cpu.status, none.status, hidden.status) == (FAIL, FAIL, FAIL)
    assert "torch 2.13.0+cpu is a CPU build" in cpu.text
    assert "no GPU is visible: Found no NVIDIA driver" in none.text
    assert "driver" in none.next
    assert "CUDA_VISIBLE_DEVICES" in hidden.next
    assert len({cpu.text, none.text, hidden.text}) == len({cpu.next, none.next, hidden.next}) == 3


def test_without_torch_the_gpu_check_says_that_it_could_not_look() -> None:
    found = judged(torch=Package("torch", None), torch_build="", gpus=())
    assert bad(found) == {"torch": FAIL, "gpu": FAIL}
    assert "without torch" in found["gpu"].text


def test_a_gpu_that_can_not_be_used_fails_and_a_full_one_warns() -> None:
    fine, broken = FINE.gpus[0], Gpu("NVIDIA T4", (7, 5), problem="CUDA error: no kernel image")
    full = dataclasses.replace(fine, free=GIB // 2)
    found = judged(gpus=(fine, broken, full))
    assert bad(found) == {"gpu 1": FAIL, "gpu 2": WARN}
    assert "no kernel image" in found["gpu 1"].text


def test_no_torch_tensorrt_or_one_that_does_not_import() -> None:
    gone = judged(torch_tensorrt=Package("torch_tensorrt", None), tensorrt=Package("tensorrt", None))
    assert bad(gone) == {"torch_tensorrt": FAIL, "tensorrt": FAIL}
    assert "refleet[tensorrt]" in gone["torch_tensorrt"].next
    reason = "RuntimeError: Found no NVIDIA driver on your system"
    broken = judged(torch_tensorrt=Package("torch_tensorrt", "2.14.0", reason), gpus=(), driver="")
    assert bad(broken) == {"torch_tensorrt": FAIL, "gpu": FAIL}
    assert reason in broken["torch_tensorrt"].text
    assert "named gpu" in broken["torch_tensorrt"].next
    odd = judged(torch_tensorrt=Package("torch_tensorrt", "2.14.0", "OSError: libnvinfer.so"))
    assert "named gpu" not in odd["torch_tensorrt"].next


@pytest.mark.parametrize("engine", ["torch:m:make", "file:./x.safetensors"])
def test_a_worker_with_another_kind_of_engine_needs_no_gpu_and_no_tensorrt(engine: str) -> None:
    found = judged(
        engine=engine, torch_build="", gpus=(), torch_tensorrt=Package("torch_tensorrt", None),
        tensorrt=Package("tensorrt", None),
    )  # fmt: skip
    assert bad(found) == {"gpu": WARN}
    assert "engines work without" in found["gpu"].text


def test_versions_that_do_not_fit_warn_and_too_old_ones_fail() -> None:
    assert bad(judged(torch=Package("torch", "2.13.0"))) == {"versions": WARN}
    assert bad(judged(torch=Package("torch", "2.14.9"))) == {}
    old = judged(torch=Package("torch", "2.10.1"), torch_tensorrt=Package("torch_tensorrt", "2.10.0"))
    assert bad(old) == {"torch_tensorrt age": FAIL}
    # also known of a version that can't be imported
    broken = judged(torch_tensorrt=Package("torch_tensorrt", "2.10.0", "OSError: no"))
    assert {"versions", "torch_tensorrt age"} <= bad(broken).keys()


def test_known_defects_are_told_where_they_are() -> None:
    for minor in (11, 12):
        found = judged(torch=Package("torch", f"2.{minor}.0"), torch_tensorrt=Package("torch_tensorrt", f"2.{minor}.0"))
        assert bad(found) == {}
        assert "switches it off" in found["weight map"].text
        assert "eps 1e-5" in found["batch norm"].text
    assert not {"weight map", "batch norm", "bias"} & judged().keys()
    found = judged(tensorrt=Package("tensorrt", "11.3.0.14"))
    assert bad(found) == {"bias": WARN}
    assert "11.3.0.14" in found["bias"].text
    assert "bias" not in judged(tensorrt=Package("tensorrt_rtx", "11.3.0.14"))
    nothing = {name: Package(name, None) for name in ("torch", "torch_tensorrt", "tensorrt")}
    assert not {known.name for known in KNOWN} & judged(**nothing).keys()


def test_the_server_is_judged_by_what_it_says() -> None:
    assert bad(with_server(server="Redis 6.0.16")) == {"server": FAIL}
    assert bad(with_server(server="Redis 10.0.0")) == {}
    assert bad(with_server(server="Valkey 9.1.2")) == {}
    assert bad(with_server(policy="allkeys-lru")) == {"eviction": FAIL}
    assert "allkeys-lru" in with_server(policy="allkeys-lru")["eviction"].text
    assert bad(with_server(aof=False)) == {"AOF": WARN}
    silent = with_server(server="unknown (INFO is not permitted)", policy=None, aof=None)
    assert bad(silent) == {"server": WARN, "eviction": WARN, "AOF": WARN}
    down = judged(server=Server("redis://here:1", problem="Redis at redis://here:1 can't be reached", next="start it"))
    assert bad(down) == {"server": FAIL}
    assert not {"eviction", "AOF", "model"} & down.keys()
    assert FINE.server is not None
    assert bad(judged(server=dataclasses.replace(FINE.server, releases=False))) == {"model": WARN}
    assert "model" not in judged(server=dataclasses.replace(FINE.server, releases=None))


def test_a_replica_and_a_server_of_payloads_are_judged_by_what_they_are_for() -> None:
    assert FINE.server is not None and FINE.server.facts is not None
    evicts = dataclasses.replace(
        FINE.server, facts=dataclasses.replace(FINE.server.facts, policy="allkeys-lru", aof=False)
    )
    empty = dataclasses.replace(FINE.server, releases=False)
    assert bad(judged(payload_server=evicts)) == {"payload eviction": FAIL}, "payloads can be written again: no AOF"
    assert bad(judged(replica=empty)) == {"replica model": WARN}
    assert bad(judged(replica=evicts)) == {}, "what a replica evicts is its primary's business"
    down = Server("redis://there:1", problem="can't be reached", next="start it")
    assert bad(judged(replica=down, payload_server=down)) == {"replica": FAIL, "payload server": FAIL}


def test_the_self_test_and_the_engine_are_judged() -> None:
    assert bad(judged(tested=Trial(skipped="torch is a CPU build"))) == {"self-test": WARN}
    wrong = judged(tested=Trial(problem="it answers differently", applied=("fast: 1",), seconds=(("compile", 3.0),)))
    assert bad(wrong) == {"self-test": FAIL}
    assert "it answers differently (compile 3.0 s)" in wrong["self-test"].text
    slow = judged(tested=Trial(applied=("fast: 5 of 5", "reference: no plan", "fast: 5 of 5")))
    assert bad(slow) == {"self-test": WARN}
    assert "reference: no plan" in slow["self-test"].text
    assert bad(judged(tested=Trial())) == {"self-test": WARN}, "nothing was applied, so nothing was fast"
    assert bad(judged(loaded=Loaded("torch:m:f", problem="there is no module 'm'"))) == {"engine": FAIL}


def test_times_are_told_for_people() -> None:
    assert [duration(s) for s in (0.0, 0.041, 3.21, 125.0)] == ["<1 ms", "41 ms", "3.2 s", "2 min 5 s"]


def test_the_table_says_what_to_do_next_only_where_something_is_to_be_done() -> None:
    lines = table([Check("a", OK, "fine", "nothing"), Check("longer", FAIL, "broken", "repair it")])
    assert [click_free(line) for line in lines] == [
        "ok    a       fine", "fail  longer  broken", "              next: repair it"
    ]  # fmt: skip
    assert summary(checks(FINE)) == "nothing failed: this machine can serve"
    assert summary([Check("a", FAIL, "x"), Check("b", WARN, "x")]) == "1 of 2 checks failed, 1 warning"
    assert json.loads(as_object([Check("a", WARN, "x", "y")])) == {
        "ok": True, "checks": [{"name": "a", "status": "warn", "text": "x", "next": "y"}]
    }  # fmt: skip


def click_free(line: str) -> str:
    from click import unstyle

    return unstyle(line)


# ---------------------------------------------------------------------- gathering


def ran_child(code: str, monkeypatch: pytest.MonkeyPatch, *, limit_s: float = 60) -> dict[str, object]:
    """What `child` makes of a process that runs `code`."""

    def run(_command: list[str], **how: object) -> object:
        return REAL_RUN([sys.executable, "-c", code], **how)  # type: ignore[call-overload]

    monkeypatch.setattr(doctor_facts.subprocess, "run", run)
    return doctor_facts.child("torch", limit_s=limit_s)


def test_a_child_that_crashes_hangs_or_babbles_costs_only_its_own_check(monkeypatch: pytest.MonkeyPatch) -> None:
    crashed = ran_child("import os, sys; print('step 3', file=sys.stderr, flush=True); os.abort()", monkeypatch)
    assert "SIGABRT" in str(crashed["problem"])
    assert "step 3" in str(crashed["problem"])
    hung = ran_child("import time; time.sleep(60)", monkeypatch, limit_s=0.5)
    assert "no answer within" in str(hung["problem"])
    monkeypatch.undo()
    result = f"print('some noise', end=''); print('\\n{doctor_facts.MARK}{{\"a\": 1}}'); print('more', flush=True);"
    assert ran_child(result + "import os; os.abort()", monkeypatch) == {"a": 1}, "the result had been said before"


def test_packages_that_are_missing_or_do_not_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "breaks_here.py").write_text("raise OSError('libsomething.so: no such file\\nand more')\n")
    (tmp_path / "lacks_here.py").write_text("import not_there_either\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def looked(name: str, version: str | None) -> Package:
        return doctor_facts._package(name, doctor_facts.child("import", name, limit_s=60), version)

    assert looked("not_there", None) == Package("not_there", None)
    assert looked("breaks_here", "1.0") == Package("breaks_here", "1.0", "OSError: libsomething.so: no such file")
    lacks = looked("lacks_here", None)
    assert (lacks.version, "not_there_either" in lacks.problem) == ("of unknown version", True)
    assert looked("numpy", "1").works
    assert doctor_facts.installed("no-such-distribution", "numpy") is not None


def test_the_server_is_asked_and_its_password_is_not_told(valkey: Running, model: str, tmp_path: Path) -> None:
    facts = doctor_facts.server_facts(valkey.url, model)
    assert facts.releases is False
    assert facts.facts is not None
    assert facts.facts.policy == "noeviction"
    with Publisher(valkey.url, model=model, store=tmp_path / "store") as publisher:
        publisher.publish({"w": torch.zeros(3)}, version="one")
    assert doctor_facts.server_facts(valkey.url, model).releases is True
    assert doctor_facts.server_facts(valkey.url, "").releases is None
    refused = doctor_facts.server_facts(valkey.url_for("me", "hunter2"), model)
    assert refused.problem
    nobody = doctor_facts.server_facts(f"redis://me:hunter2@127.0.0.1:{free_port()}", model)
    assert "can't be reached" in nobody.problem
    bad_url = doctor_facts.server_facts("http://me:hunter2@here", model)
    assert bad_url.problem
    bad_name = doctor_facts.server_facts(valkey.url, "Not A Name")
    assert "model name" in bad_name.problem
    assert "hunter2" not in repr((refused, nobody, bad_url))


def test_a_server_that_evicts_fails(new_server: Callable[..., Running]) -> None:
    server = new_server(settings={"maxmemory": "50mb", "maxmemory-policy": "allkeys-lru"})
    assert bad(judged(server=doctor_facts.server_facts(server.url, ""))) == {"eviction": FAIL, "AOF": WARN}


# ---------------------------------------------------------------------- the command


def test_the_command_on_this_machine_says_what_is_there(capfd: pytest.CaptureFixture[str], valkey: Running) -> None:
    code = execute(["doctor", "--json", "--engine", "tensorrt:nowhere:make"], {"REFLEET_REDIS": valkey.url})
    said = capfd.readouterr()
    found = json.loads(said.out)
    checked = {check["name"]: check for check in found["checks"]}
    assert said.err == ""
    assert all(check.keys() == {"name", "status", "text", "next"} for check in found["checks"])
    assert torch.__version__ in checked["torch"]["text"]
    assert checked["server"]["status"] == OK
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert (code, found["ok"], checked["gpu"]["status"]) == (1, False, FAIL)
    assert ("a CPU build" in checked["gpu"]["text"]) == (torch.version.cuda is None)
    assert checked["self-test"]["text"].startswith("skipped: ")
    assert checked["engine"]["status"] == FAIL


def test_a_file_engine_is_looked_at_without_being_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    temp = tmp_path / ".served.safetensors.1.tmp"  # as a worker that runs writes it
    temp.write_bytes(b"half")
    assert execute(["doctor", "--no-self-test", "--engine", "file:./served.safetensors"], {}) == 0
    said = capfd.readouterr()
    assert "file:./served.safetensors: file safetensors" in said.out
    assert "this machine can serve" in said.out
    assert "self-test" not in said.out
    assert temp.exists()
    assert execute(["doctor", "--no-self-test", "--engine", "file:./no/folder"], {}) == 1
    assert "mkdir -p" in capfd.readouterr().out


def test_a_torch_engine_is_loaded_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = "import torch\nprint('hello')\ndef make():\n    return torch.nn.Linear(2, 1)\n"
    (tmp_path / "mine.py").write_text(code + "def breaks():\n    raise OSError('no')\n")
    assert execute(["doctor", "--no-self-test", "--engine", "torch:mine:make"], {}) == 0
    assert "torch:mine:make: " in capfd.readouterr().out
    assert execute(["doctor", "--no-self-test", "--engine", "torch:mine:breaks"], {}) == 1
    assert "the factory raised OSError: no" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "environ", "asked"),
    [
        ([], {}, None),
        ([], {"REFLEET_REDIS": "redis://there"}, "redis://there"),
        (["--redis", "redis://here"], {"REFLEET_REDIS": "redis://there"}, "redis://here"),
        (["--model", "m"], {}, "redis://127.0.0.1:6379"),
    ],
)
def test_which_server_is_asked(
    arguments: list[str], environ: dict[str, str], asked: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []

    def gather(*, redis: str | None, **_rest: object) -> Facts:
        seen.append(redis)
        return FINE

    monkeypatch.setattr(doctor_facts, "gather", gather)
    assert execute(["doctor", *arguments], environ) == 0
    assert seen == [asked]


def test_replica_and_payload_server_are_asked_too(valkey: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = doctor_facts.gather, []

    def gather(**options: object) -> Facts:
        seen.append(options)
        replica = doctor_facts.server_facts(str(options["read_from"]), "")
        return dataclasses.replace(FINE, replica=replica)

    monkeypatch.setattr(doctor_facts, "gather", gather)
    there = {"REFLEET_READ_FROM": valkey.url, "REFLEET_PAYLOAD_REDIS": "redis://elsewhere"}
    assert execute(["doctor", "--payload-redis", "redis://here"], there) == 0
    assert [(o["read_from"], o["payload_redis"]) for o in seen] == [(valkey.url, "redis://here")]
    assert inspect.signature(real).parameters.keys() == seen[0].keys()


def test_the_help_needs_no_torch() -> None:
    code = "import sys, refleet.worker.cli as c; c.execute(['doctor', '-h'], {}); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "refleet-worker doctor --redis" in done.stdout
