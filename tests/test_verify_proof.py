"""`refleet verify --deep` proves by BLAKE3 that engines hold the bytes of the publisher's store."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import pytest
from cli_runs import Cli
from refleet.common.digest import blake3_of, digest_of, proof_of, tensor_digest, tensor_digest_of
from refleet.common.types import TensorSpec
from refleet.publisher.verify import NO_STORE, Verification, verify
from refleet.worker.engine import Digest
from refleet.worker.memory_engine import MemoryEngine
from world import World, checkpoint


def proof(found: Verification) -> bytes | None:
    verified = found.answers["w0"].verified
    assert verified is not None
    return verified.proof


class Forged(MemoryEngine):
    """Holds another last byte in "steps" than it was given, made to have the right tensor digest."""

    forged = False

    def read_back(self, names: Iterable[str], digest: Digest = tensor_digest_of) -> Iterator[tuple[str, bytes]]:
        for name, found in super().read_back(names, digest):
            forge = self.forged and name == "steps" and digest is not tensor_digest_of
            yield name, digest([self.tensors[name][:-1] + b"\x7f"]) if forge else found


def test_other_bytes_under_equal_tensor_digests_are_found_by_a_deep_verification_alone(world: World) -> None:
    engine, publisher = Forged(), world.publisher()
    world.worker(engine=engine)
    world.worker("w1")
    publisher.publish(checkpoint(1), version="v1").wait(workers=2)
    stream, store = world.carrier.stream(), publisher.store
    good = verify(stream, deep=True, timeout_s=20, store=store)
    assert (good.ok, good.proven, good.unproven, good.not_compared) == (True, {"w0", "w1"}, {}, {})
    engine.forged = True
    assert verify(stream, timeout_s=20, store=store).ok, "an ordinary one does not show it"
    found = verify(stream, deep=True, timeout_s=20, store=store)
    assert (found.ok, found.proven, set(found.unproven)) == (False, {"w1"}, {"w0"})
    assert "other bytes than version 'v1'" in found.unproven["w0"]


def test_a_proof_is_of_what_is_served_and_a_version_past_retention_is_not_compared(small_world: World) -> None:
    small_world.worker(engine=Forged())
    publisher = small_world.publisher()
    publisher.publish(checkpoint(1), version="v1").wait(workers=1)
    stream, store = small_world.carrier.stream(), publisher.store
    first = proof(verify(stream, deep=True, timeout_s=20, store=store))
    publisher.publish(checkpoint(2), version="v2").wait(workers=1)
    second = verify(stream, deep=True, timeout_s=20, store=store)
    assert second.proven == {"w0"}
    assert proof(second) not in (first, None)
    assert proof(verify(stream, timeout_s=20, store=store)) is None
    blind = verify(stream, deep=True, timeout_s=20)
    assert (blind.ok, blind.proven, blind.not_compared) == (True, frozenset(), {"w0": NO_STORE})
    with small_world.publisher("elsewhere") as other:  # a store that never had it
        lacking = verify(stream, deep=True, timeout_s=20, store=other.store)
    assert (lacking.ok, lacking.proven, set(lacking.not_compared)) == (True, frozenset(), {"w0"})


def test_a_deep_answer_without_a_proof_is_a_failure(small_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    small_world.worker()
    publisher = small_world.publisher()
    publisher.publish(checkpoint(1), version="v1").wait(workers=1)
    monkeypatch.setattr("refleet.worker.prove._proof", lambda engine, holds: None)
    found = verify(small_world.carrier.stream(), deep=True, timeout_s=20, store=publisher.store)
    assert (found.ok, set(found.unproven)) == (False, {"w0"})


def test_a_proof_depends_on_every_name_dtype_shape_and_byte() -> None:
    spec, other = TensorSpec("a", "F32", (2, 3)), TensorSpec("b", "F32", ())
    tensors = [(spec, blake3_of([b"x" * 24])), (other, blake3_of([b"y" * 4]))]
    proofs = [proof_of(tensors), proof_of(tensors[:1]), proof_of(tensors[::-1]), proof_of([])]
    proofs += [proof_of([(replace(spec, **change), tensors[0][1]), tensors[1]]) for change in (
        {"name": "c"}, {"dtype": "I32"}, {"shape": (3, 2)},
    )]  # fmt: skip
    proofs.append(proof_of([tensors[0], (other, blake3_of([b"y" * 3, b"z"]))]))
    assert len(set(proofs)) == len(proofs)
    assert blake3_of([b"ab", b"", b"c"]) == digest_of(b"abc") != tensor_digest(b"abc")


def test_the_command_names_the_worker_whose_content_is_not_proven_and_fails_with_3(cli: Cli) -> None:
    engine = Forged()
    with cli.worker("w0", engine), cli.worker("w1"):
        cli.ok("publish", *cli.steps(1), "--version", "v1", "--wait", "--workers", "2")
        good = cli.ok("verify", "--deep")
        assert [worker["content"] for worker in good["workers"]] == ["proven", "proven"]
        assert len({worker["proof"] for worker in good["workers"]}) == 1
        plain = cli.ok("verify")["workers"][0]
        assert (plain["proof"], plain["content"]) == (None, None)
        engine.forged = True
        ran = cli.on("verify", "--deep", "--json")
        assert (ran.code, ran.json["ok"]) == (3, False)
        lying, honest = ran.json["workers"]
        assert (lying["ok"], lying["content"], lying["error"]["code"]) == (False, "differs", "DigestMismatch")
        assert (honest["ok"], honest["content"], honest["error"]) == (True, "proven", None)
        said = cli.on("verify", "--deep")
        assert said.code == 3
        assert "content differs" in said.out and "w0: its engine holds other bytes" in said.out
        assert "NOT verified: 1 of 2 workers" in said.out
        elsewhere = cli.on("verify", "--deep", "--store", cli.here / "none")
        assert elsewhere.code == 0
        assert f"w0, w1: content not compared: {NO_STORE}" in elsewhere.out
        unknown = cli.ok("verify", "--deep", "--store", cli.here / "none")
        assert {worker["content"] for worker in unknown["workers"]} == {f"not compared: {NO_STORE}"}
