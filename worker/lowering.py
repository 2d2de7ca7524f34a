"""What torch_tensorrt makes of a module: its lowered graph, its partitions, and the weights of its engines."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ..common.errors import NotRefittable, RefleetError
from .engine import named_few
from .graph_capture import Fold, Norm, captured_folds, captured_norms, own_metadata, put_attribute, without_guards
from .recipe import Recipe
from .torch_trt import (
    LOCK,
    Compiler,
    call,
    cpu_tensor,
    exported,
    graph_of,
    layer_weights,
    settings_of,
    short,
    torch_tensorrt,
)  # fmt: skip

ENGINE = "_run_on_acc"


@dataclass(slots=True)
class Network:
    """One lowering with one set of weights.

    `weights`: engine -> weight name -> value, on the CPU; `attributes`: part executed by torch -> attribute -> value.
    """

    graph: fx.GraphModule
    folds: dict[str, Fold] = field(default_factory=dict)
    norms: list[Norm] = field(default_factory=list)
    weights: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    attributes: dict[str, dict[str, Tensor]] = field(default_factory=dict)


class Lowering:
    """A recipe's module, exported and decomposed once; `network` finishes the lowering for one set of weights.

    Args: `recipe`, its module on the device where constants are to be folded. Raises: NotRefittable when the module
    can't be exported, or writes to its own buffers when it runs; UsageError for a compile option that doesn't exist.
    """

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        with LOCK:
            tt = torch_tensorrt()
            self.settings = settings_of(tt, recipe.options)
            try:
                program = exported(recipe)
                self.call_spec = program.call_spec
                program = tt.lowering.pre_export_lowering(program, self.settings)
                offered = {
                    "enable_experimental_decompositions": self.settings.enable_experimental_decompositions,
                    "decompose_attention": getattr(self.settings, "decompose_attention", False),
                    "use_distributed_mode_trace": getattr(self.settings, "use_distributed_mode_trace", False),
                    "use_fp32_acc": self.settings.use_fp32_acc,
                }
                self._program = program.run_decompositions(call(tt.lowering.get_decompositions, offered))
            except RefleetError:
                raise
            except Exception as error:  # export raises what it likes
                raise NotRefittable(
                    f"the module can't be exported for TensorRT: {type(error).__name__}: {short(error)}",
                    next="torch.export.export(module, args, kwargs) in a Python shell shows the whole reason",
                ) from error
            written = self._program.graph_signature.buffers_to_mutate
            if written:
                raise NotRefittable(
                    f"running the module changes its own buffers {named_few(written.values())}: an engine can't",
                    next="return the module with caches and statistics switched off",
                )

    def reference(self) -> fx.GraphModule:
        """The decomposed graph before any lowering: what PyTorch computes, with flat inputs and outputs."""
        module: fx.GraphModule = self._program.module()
        module.graph.set_codegen(fx.graph.CodeGen())
        without_guards(module)
        module.recompile()
        return module

    def used(self) -> set[str]:
        """Attributes that the decomposed graph reads."""
        graph = self._program.module().graph
        return {str(node.target) for node in graph.nodes if node.op == "get_attr" and node.users}

    def network(self, values: Mapping[str, Tensor] | None = None, *, interpret: bool = True) -> Network:
        """Lower and partition with `values` in place of the module's tensors of these names.

        `interpret=False`: without the weights of engines. Raises: NotRefittable with torch_tensorrt's own reason.
        """
        with LOCK, ExitStack() as hooks:
            tt = torch_tensorrt()
            folds: dict[str, Fold] = {}
            norms: list[Norm] = []
            hooks.enter_context(captured_folds(tt, folds))
            hooks.enter_context(captured_norms(tt, norms))
            try:
                module = self._program.module()
                without_guards(module)
                own_metadata(module.graph)
                for name, value in (values or {}).items():
                    put_attribute(module, name, value)
                graph = self._partitioned(tt, tt.lowering.post_lowering(module, self.settings))
                found = Network(graph, folds, norms)
                for part, child in parts_of(graph).items():
                    if not part.startswith(ENGINE):
                        found.attributes[part] = {n: t.detach() for n, t in child.state_dict(keep_vars=True).items()}
                        continue
                    inputs = self._inputs(tt, graph, part)
                    if interpret:
                        found.weights[part] = self._interpreted(tt, child, inputs)
            except RefleetError:
                raise
            except Exception as error:
                raise NotRefittable(
                    f"torch_tensorrt can't lower the module: {type(error).__name__}: {short(error)}"
                ) from error
            return found

    def _partitioned(self, tt: Compiler, module: fx.GraphModule) -> fx.GraphModule:
        """Partitioned as `torch_tensorrt.dynamo.compile` does. Raises: NotRefittable for tensors outside of parts."""
        graph = self._parts(tt, module)
        for name in ("_in_spec", "_out_spec"):
            if hasattr(module, name):
                setattr(graph, name, getattr(module, name))
        outside = [str(node.target) for node in graph.graph.nodes if node.op == "get_attr"]
        if outside:
            raise NotRefittable(
                f"the partitioned graph reads {named_few(outside)} outside of its parts: nothing would update them",
                next="set options={'use_fast_partitioner': True} in the recipe",
            )
        return graph

    def _parts(self, tt: Compiler, module: fx.GraphModule) -> fx.GraphModule:
        """With the fall-back that compile has."""
        settings = self.settings
        tt.converters.set_compilation_settings(settings)
        supported, total = tt.partitioning.get_graph_converter_support(module, settings.torch_executed_ops)
        if supported == 0 or supported < settings.min_block_size:
            raise NotRefittable(
                f"TensorRT could run {supported} of the module's {total} operations, fewer than min_block_size "
                f"{settings.min_block_size}: there would be no engine",
                next="set options={'min_block_size': 1} in the recipe, or serve the module with --engine torch:",
            )
        arguments = {
            "min_block_size": settings.min_block_size,
            "torch_executed_ops": settings.torch_executed_ops,
            "require_full_compilation": settings.require_full_compilation,
        }
        if settings.use_fast_partitioner:
            try:
                return graph_of(tt.partitioning.fast_partition(module, skip_fusion=supported == total, **arguments))
            except torch.fx.passes.splitter_base.FxNetSplitterInternalError:
                pass  # as compile does
        return graph_of(tt.partitioning.global_partition(module, **arguments))

    def _inputs(self, tt: Compiler, graph: fx.GraphModule, part: str) -> Any:
        """The inputs that the engine is built for. Where doubles are truncated, `graph` gets casts around the part."""
        module = graph.get_submodule(part)
        inputs = tt.partitioning.construct_submodule_inputs(module)
        if self.settings.truncate_double:
            inputs = tt.repair_double_inputs(graph, module, inputs, tt.to_torch_device(self.settings.device), part)
            graph.recompile()
        return inputs

    def _interpreted(self, tt: Compiler, module: fx.GraphModule, inputs: Any) -> dict[str, Tensor]:
        """The engine's weights by name: what building it from this network would make refittable."""
        interpreter = tt.interpreter(
            module,
            inputs,
            output_dtypes=tt.output_dtypes(module, truncate_double=self.settings.truncate_double),
            compilation_settings=self.settings,
        )
        interpreter._construct_trt_network_def()
        recorded = interpreter.ctx.weight_refit_map
        found = layer_weights(tt.trt, interpreter.ctx.net, recorded)
        return {name: cpu_tensor(value) for name, value in found.items()}


def parts_of(graph: fx.GraphModule) -> dict[str, fx.GraphModule]:
    """The partitions that the graph calls, engines and torch-executed ones, in the order of their calls."""
    return {
        str(node.target): graph.get_submodule(str(node.target))  # type: ignore[misc]
        for node in graph.graph.nodes
        if node.op == "call_module"
    }
