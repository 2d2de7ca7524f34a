"""Real TensorRT engines: both ways of refitting over model families, faults, and what the official feature covers.

pytest -n 6 tests/gpu/test_tensorrt.py        # needs a GPU, torch_tensorrt and TensorRT (or TensorRT-RTX)
"""

from __future__ import annotations

import importlib.util
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import Staged, version
from refleet.common.errors import NotRefittable, ProbeMismatch, RefitFailed
from refleet.common.store import Store
from refleet.common.tensors import spec_of, tensor_bytes
from refleet.common.types import TensorSpec
from refleet.worker import official, trt_live
from refleet.worker.apply import switch
from refleet.worker.gate import Gate
from refleet.worker.recipe import Recipe
from refleet.worker.tensorrt_engine import TensorRTEngine
from refleet.worker.torch_trt import compiled
from refleet.worker.trt_model import perturbed, same_bits
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "plan"))
if not torch.cuda.is_available() or importlib.util.find_spec("torch_tensorrt") is None:
    pytest.skip("needs a GPU and torch_tensorrt", allow_module_level=True)
from families import FAMILIES

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(400)]
NAMES = [
    "mlp", "batchnorm_eps_1e3", "batchnorm_without_affine", "tied", "lstm", "gru_used_twice", "weight_norm", "conv1d",
    "conv_transpose1d", "conv_transpose2d_grouped", "merged_lora", "fp16", "bf16", "bias_table", "scalars",
    "several_outputs_and_keywords", "parts_in_torch", "position_and_class_tokens", "dynamic_batch", "swin", "unet",
    "gpt2", "gpt2_fp16", "bert", "llama", "llama_bf16", "encoder_layer", "rope_buffers",
]  # fmt: skip


def staged(module: nn.Module, seed: int, *, name: str | None = None) -> Staged:
    """A version with other weights of the same kind as the module's; ties stay tied."""
    state = module.state_dict()
    by_place = {tensor.data_ptr(): key for key, tensor in state.items() if tensor.numel()}
    kept = {key: by_place.get(tensor.data_ptr(), key) for key, tensor in state.items()}
    values = {key: perturbed(f"{kept[key]} {seed}", state[key].cpu()) for key in state}
    specs = [spec_of(key, tensor) for key, tensor in values.items()]
    data = {key: bytes(tensor_bytes(tensor.contiguous())) for key, tensor in values.items()}
    return version(data, specs, name=name or f"v{seed}", seq=seed)


def put(engine: TensorRTEngine, version_: Staged, names: frozenset[str] | None = None) -> bytes:
    engine.prepare(version_, version_.names if names is None else names)
    engine.apply(version_, version_.names if names is None else names)
    return engine.probe()


@pytest.mark.parametrize("name", NAMES)
def test_both_ways_give_the_same_answers_and_the_way_back_is_exact(name: str) -> None:
    torch.manual_seed(0)
    made = FAMILIES[name]()
    one, two = staged(made.module, 1), staged(made.module, 2)
    fast = TensorRTEngine(made, apply="fast")
    seen = []
    for version_ in (one, two, one):
        probe = put(fast, version_)
        seen.append((probe, fast.content_digest(), fast.model.probe()))
        assert dict(fast.read_back(sorted(version_.names))) == version_.digests
        assert fast.applied.startswith("fast: ")
    assert seen[0][:2] == seen[2][:2] != seen[1][:2]
    put(fast, two)
    try:
        way = TensorRTEngine(fast.model, apply="reference")
        way.model.holds = None
        put(way, two)
    except (RefitFailed, ProbeMismatch) as error:
        print(f"{name}: the official way failed: {error.what}")  # and was not acknowledged
    else:
        assert way.applied == "reference: asked for"
        assert same_bits(way.model.probe(), seen[1][2])
        assert way.content_digest() == seen[1][1]


# ---------------------------------------------------------------------- faults


def switched(folder: Path, engine: TensorRTEngine, version_: Staged, previous: Staged | None, gate: Gate) -> None:
    switch(
        engine, gate, Store(folder), version_, holds=previous.manifest if previous else None, previous=previous,
        persist=lambda: None, drain_s=5, on_remnant=lambda: None,
    )  # fmt: skip
    engine.served(version_.serving)


def test_an_exception_between_two_engines_leaves_the_previous_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, gate = FAMILIES["parts_in_torch"](), Gate()
    one, two = staged(made.module, 1), staged(made.module, 2)
    engine = TensorRTEngine(made, apply="fast")
    switched(tmp_path, engine, one, None, gate)
    before, held = engine.model.probe(), engine.content_digest()
    first, second = engine.model.resident.engines.values()
    real, calls = second.refit, iter([False])
    monkeypatch.setattr(second, "refit", lambda: next(calls, True) and real())
    with pytest.raises(RefitFailed):
        switched(tmp_path, engine, two, one, gate)
    assert gate.current is not None
    assert gate.current.version == "v1"
    assert same_bits(engine.model.probe(), before)
    assert engine.content_digest() == held
    assert first is not second


def test_tensorrt_rejects_a_weight_of_another_size_or_type_and_says_so() -> None:
    engine = TensorRTEngine(FAMILIES["mlp"](), apply="fast")
    (live,) = engine.model.resident.engines.values()
    name = sorted(live.weights)[0]
    dtype, numel = live.prototype(name)
    assert not live.set(name, torch.zeros(numel + 1, dtype=dtype, device="cuda"))
    assert not live.set(name, torch.zeros(numel, dtype=torch.float16, device="cuda"))
    assert not live.set("no such weight", torch.zeros(numel, dtype=dtype, device="cuda"))


def test_a_plan_of_another_build_is_refused() -> None:
    built = compiled(
        Recipe(FAMILIES["mlp"]().module.cuda(), (FAMILIES["mlp"]().args[0].cuda(),), options={"min_block_size": 1})
    )
    (engine,) = built.values()
    with pytest.raises(NotRefittable, match="can't load"):
        trt_live.TensorRTLive(
            engine.plan[:4096] + bytes(len(engine.plan) - 4096), engine.inputs, engine.outputs, name="x"
        )


# ---------------------------------------------------------------------- what the official feature covers


def test_a_module_compiled_before_and_one_loaded_from_disk_are_taken_as_they_are(tmp_path: Path) -> None:
    import torch_tensorrt

    torch.manual_seed(1)
    made = FAMILIES["batchnorm_eps_1e3"]()
    made.module.cuda()
    inputs = (made.args[0].cuda(),)  # type: ignore[attr-defined]
    module = torch_tensorrt.dynamo.compile(
        torch.export.export(made.module, inputs), arg_inputs=inputs, immutable_weights=False, min_block_size=1
    )
    torch_tensorrt.save(module, str(tmp_path / "m.ep"), arg_inputs=inputs, retrace=False)
    loaded = torch_tensorrt.load(str(tmp_path / "m.ep"))
    one, answers = staged(made.module, 1), []
    for taken in (module, loaded):  # the second time `made.module` has other weights than what was compiled
        engine = TensorRTEngine(made, apply="fast", compiled_module=taken, build=_never)
        put(engine, one)
        answers.append(engine.model.probe())
    assert same_bits(*answers)


def _never(_recipe: Recipe) -> Any:
    raise AssertionError("nothing may be compiled here")


def test_a_refitted_engine_is_saved_by_torch_tensorrt_and_loads_again_refittable(tmp_path: Path) -> None:
    import torch_tensorrt
    from refleet.worker.torch_trt import Compiled

    made = FAMILIES["mlp"]()
    one, two = staged(made.module, 1), staged(made.module, 2)
    engine = TensorRTEngine(made, apply="fast")
    put(engine, one)
    model = engine.model
    assert model.lower is not None
    now = {n: Compiled(live.serialize(), model.engines[n].inputs, model.engines[n].outputs)
           for n, live in model.resident.engines.items()}  # fmt: skip
    official.save_program(model.lower(), now, tmp_path / "m.ep")
    loaded = torch_tensorrt.load(str(tmp_path / "m.ep"))
    assert same_bits(loaded.module()(*model.recipe.args), model.probe())
    again = TensorRTEngine(made, apply="fast", compiled_module=loaded, build=_never)
    put(again, two)
    put(engine, two)
    assert same_bits(again.model.probe(), engine.model.probe())


def test_mutable_torch_tensorrt_module_agrees() -> None:
    """A second opinion: torch_tensorrt's own module that refits itself when its weights change."""
    import torch_tensorrt

    torch.manual_seed(2)
    made = FAMILIES["mlp"]()
    one = staged(made.module, 1)
    import copy

    other = copy.deepcopy(made.module).cuda()
    mutable = torch_tensorrt.MutableTorchTensorRTModule(other, immutable_weights=False, min_block_size=1)
    inputs = tuple(value.cuda() for value in made.args)  # type: ignore[attr-defined]
    mutable(*inputs)
    engine = TensorRTEngine(made, apply="fast")
    put(engine, one)
    mutable.load_state_dict({n: t.clone() for n, t in engine.model.tensors().items()})
    assert torch.allclose(mutable(*inputs), engine(*inputs), rtol=2e-3, atol=2e-3)


class Wide(nn.Module):
    def __init__(self, hidden: int):
        super().__init__()
        self.up, self.down = nn.Linear(8, hidden), nn.Linear(hidden, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))  # type: ignore[no-any-return]


def wide(tensors: Mapping[str, TensorSpec] | None = None) -> Recipe:
    hidden = tensors["up.weight"].shape[0] if tensors else 16
    return Recipe(Wide(hidden).eval(), (torch.linspace(-1, 1, 32).view(4, 8),), options={"min_block_size": 1})


def test_another_structure_is_built_beside_the_old_engine_and_takes_over(tmp_path: Path) -> None:
    steps: list[str] = []
    engine, gate = TensorRTEngine(wide, on_step=steps.append), Gate()
    one, two = staged(Wide(16), 1), staged(Wide(24), 2)
    two.restructure = True
    switched(tmp_path, engine, one, None, gate)
    build = engine.build
    engine.check(two.manifest, restructure=True)
    with pytest.raises(NotRefittable):
        engine.check(two.manifest)
    steps.clear()
    switched(tmp_path, engine, two, one, gate)
    assert engine.applied == "rebuilt: the version has another structure"
    assert engine.build != build
    assert "building the TensorRT engine" in steps
    three = staged(Wide(24), 3)
    switched(tmp_path, engine, three, two, gate)
    assert engine.applied.startswith("fast: ")


# ---------------------------------------------------------------------- requests


def test_several_contexts_answer_at_once_while_versions_change(tmp_path: Path) -> None:
    made, gate = FAMILIES["mlp"](), Gate()
    engine = TensorRTEngine(made, apply="fast", contexts=3)
    versions = [staged(made.module, n) for n in (1, 2)]
    answers: dict[str, torch.Tensor] = {}
    previous: Staged | None = None
    for version_ in versions:
        switched(tmp_path, engine, version_, previous, gate)
        answers[version_.serving.version] = engine(*engine.model.recipe.args).cpu()
        previous = version_
    wrong, asked, stop = [0], [0], threading.Event()

    def ask() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            inputs = [value.clone() for value in engine.model.recipe.args]  # type: ignore[attr-defined]
            while not stop.is_set():
                with gate.serving() as serving:
                    answer = engine(*inputs).cpu()
                wrong[0] += not torch.equal(answer, answers[serving.version])
                asked[0] += 1

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for n in range(30):
        version_ = versions[n % 2]
        switched(tmp_path, engine, version_, previous, gate)
        previous = version_
    stop.set()
    for thread in threads:
        thread.join()
    assert asked[0] > 30
    assert wrong[0] == 0


def test_a_dynamic_batch_stays_dynamic_after_a_refit() -> None:
    made = FAMILIES["dynamic_batch"]()
    engine = TensorRTEngine(made, apply="fast")
    put(engine, staged(made.module, 1))
    for rows in (1, 7, 32):
        x = torch.randn(rows, 8, device="cuda")
        expected = engine.model.recipe.module(x)
        assert torch.allclose(engine(x), expected, rtol=5e-3, atol=5e-3)


def test_doubles_are_truncated_where_the_recipe_says_so() -> None:
    """Lowering such a module runs it on the GPU, so that no test without one covers it."""
    module = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).double().eval()
    options = {"min_block_size": 1, "truncate_double": True}
    engine = TensorRTEngine(Recipe(module, (torch.randn(4, 8, dtype=torch.float64),), options=options))
    version_ = staged(module, 1)
    put(engine, version_)
    assert dict(engine.read_back(sorted(version_.names))) == version_.digests
