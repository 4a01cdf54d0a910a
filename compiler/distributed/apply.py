"""A Plan applied to torch modules for training: where each parameter lies on the mesh, and its values.

The order is tensor parallelism (in the Program already), activation checkpointing, compilation of each layer, FSDP.
Where more than one rank shares a model every parameter is a DTensor on all axes that cut it, norms replicated: plain
tensors and DTensors side by side break optimizers that work on lists. On one rank every parameter is plain.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from archwright.compiler.blocks import MixtureOfExperts
from archwright.compiler.distributed.checkpointing import Checkpointing
from archwright.compiler.distributed.layout import Layout, local_of
from archwright.compiler.distributed.mesh import Mesh
from archwright.compiler.interpreters.torch_module import BlockModule, TorchProgram
from archwright.compiler.interpreters.torch_ops import TorchOps
from archwright.compiler.ir import Plan
from archwright.compiler.weights.streaming import Weights


@dataclass(frozen=True, kw_only=True)
class Options:
    """How modules compute. dtype: of the parameters; compute_dtype: of the computation.

    compile_layers: None, or options for torch.compile. reshard: whether FSDP frees a layer's weights between its
    forward and its backward, and gathers them twice. token_dim: see `TorchOps`.
    """

    dtype: torch.dtype
    compute_dtype: torch.dtype
    device: torch.device
    checkpointing: Checkpointing | None = None
    compile_layers: Mapping[str, object] | None = None
    reshard: bool = True
    token_dim: int = 1


@dataclass(frozen=True, kw_only=True)
class ShardedModel:
    """What one process trains.

    stages: number of a pipeline stage → its module, in order. parameters: canonical name → what this rank holds of it.
    """

    plan: Plan
    mesh: Mesh | None
    options: Options
    stages: Mapping[int, TorchProgram]
    parameters: Mapping[str, nn.Parameter]
    layouts: Mapping[str, Layout]

    @property
    def module(self) -> TorchProgram:
        """The module of a plan without a pipeline."""
        (module,) = self.stages.values()
        return module

    def gradients(self) -> Iterator[tuple[Layout, torch.Tensor]]:
        """This rank's part of every gradient that there is."""
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                yield self.layouts[name], local_of(parameter.grad)

    def add_tied_gradients(self) -> None:
        """Sum the gradients of a tensor that the first and the last pipeline stage both hold."""
        if self.mesh is None or self.mesh.ends is None:
            return
        for layout, gradient in self.gradients():
            if layout.tied:
                dist.all_reduce(gradient, group=self.mesh.ends)


def apply_plan(plan: Plan, weights: Weights, mesh: Mesh | None, options: Options) -> ShardedModel:
    """The part of the model that a rank of `mesh` trains; of `weights` it reads what it keeps.

    With `GeneratedWeights` the values do not depend on the plan: the full tensors are the same numbers at every degree.
    """
    rank, degree = (0, 1) if mesh is None else (mesh.ranks["pipeline"], mesh.degrees.pipeline)
    fully_sharded = mesh is not None and mesh.degrees.shard * mesh.degrees.data_replicate > 1
    sites, params = plan.program.sites(), plan.program.params()
    stages: dict[int, TorchProgram] = {}
    parameters: dict[str, nn.Parameter] = {}
    layouts: dict[str, Layout] = {}
    for number in range(rank, len(plan.stages), degree):
        module = stages[number] = _build(plan, number, mesh, options)
        before = replace(plan.program, segments=plan.program.segments[: plan.stages[number][0]])
        module.follows_router = any(isinstance(block, MixtureOfExperts) for _, block in before.blocks())
        names = {local: sites[local].name for local, _ in module.named_parameters()}
        for local, name in names.items():
            layouts[name] = Layout(
                param=params[name], mesh=mesh, fully_sharded=fully_sharded, tied=degree > 1 and _is_tied(plan, name)
            )
            path, _, leaf = local.rpartition(".")
            setattr(module.get_submodule(path), leaf, nn.Parameter(layouts[name].on_meta(options.dtype)))
        _prepare(module, options)
        if fully_sharded:
            _fully_shard(module, options, {local: layouts[name] for local, name in names.items()})
        module.to_empty(device=options.device)
        parameters |= {names[local]: parameter for local, parameter in module.named_parameters()}
    for name, parameter in parameters.items():
        layouts[name].fill(parameter, lambda part, name=name: weights.read(name, part))
    return ShardedModel(plan=plan, mesh=mesh, options=options, stages=stages, parameters=parameters, layouts=layouts)


def _is_tied(plan: Plan, name: str) -> bool:
    """Whether the first and the last stage read one tensor."""
    return sum(site.name == name for site in plan.program.sites().values()) > 1


def _build(plan: Plan, number: int, mesh: Mesh | None, options: Options) -> TorchProgram:
    ops = TorchOps(
        dtype=options.compute_dtype,
        vocab_size=plan.program.vocab_size,
        sequence=plan.degrees.sequence,
        token_dim=options.token_dim,
        ring=plan.degrees.ring,
        groups={} if mesh is None else mesh.groups,
        ranks={} if mesh is None else mesh.ranks,
    )
    return TorchProgram(plan.stage(number), ops, dtype=options.dtype, device="meta")


def _prepare(module: TorchProgram, options: Options) -> None:
    for layer in module.layers():
        layer.checkpointing = options.checkpointing
    if options.compile_layers is not None:
        module.compile_layers(**options.compile_layers)


def _fully_shard(module: TorchProgram, options: Options, layouts: Mapping[str, Layout]) -> None:
    """One FSDP group for each layer, for the embedding and for the head; one for both where they are tied."""
    narrow = options.compute_dtype if options.compute_dtype != options.dtype else None
    policy = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=options.dtype, cast_forward_inputs=False)

    def shard(modules: list[BlockModule] | BlockModule | TorchProgram, layout: Layout, reshard: bool) -> None:
        fully_shard(modules, mesh=layout.shard_mesh, mp_policy=policy, reshard_after_forward=reshard)  # pyright: ignore

    ordinary = next(layout for layout in layouts.values() if not layout.is_expert)
    for layer in module.layers():
        for path, layout in _experts(layer, layouts):
            shard(path, layout, options.reshard)
        shard(layer, ordinary, options.reshard)
    embedding, head = module.embedding(), module.head()
    tied = any(name in each._borrowed for each in head for name in each.block.params())
    for group in [embedding + head] if tied else [embedding, head]:
        if group:
            shard(group, ordinary, False)
    shard(module, ordinary, False)
    for each in module.modules():
        if isinstance(each, FSDPModule):
            # The loss is divided by the number of targets of all ranks, so gradients are summed, not averaged; and gloo
            # sums where an average is asked for (pytorch#162338).
            each.set_gradient_divide_factor(1.0)
            each.set_force_sum_reduction_for_comms(True)


def _experts(layer: BlockModule, layouts: Mapping[str, Layout]) -> Iterator[tuple[BlockModule, Layout]]:
    """The modules of a layer that hold experts."""
    for each in layer.modules():
        if isinstance(each, BlockModule):
            own = [layouts[f"{each.path}.{name}"] for name in each.block.params() if f"{each.path}.{name}" in layouts]
            if own and own[0].is_expert:
                yield each, own[0]


def global_norm(model: ShardedModel) -> torch.Tensor:
    """The 2-norm of all gradients together, the same number on every rank.

    sqrt(all_reduce(Σ x² / copies)), the squares added in float64; one collective for all tensors.
    """
    pairs = list(model.gradients())
    norms = torch._foreach_norm([gradient for _, gradient in pairs])  # pyright: ignore[reportPrivateImportUsage]
    squares = torch.stack(norms).double().square()
    # Numbers of copies are few: with a sum for each, none has to be sent to the device.
    total = torch.zeros_like(squares[0])
    for copies in {layout.copies for layout, _ in pairs}:
        runs = [index for index, (layout, _) in enumerate(pairs) if layout.copies == copies]
        total += sum(squares[start:stop].sum() for start, stop in _runs(runs)) / copies
    if model.mesh is not None:
        dist.all_reduce(total)
    return total.sqrt()


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Rising numbers as ranges [start, stop) of neighbours."""
    start = 0
    for end in range(1, len(numbers) + 1):
        if end == len(numbers) or numbers[end] != numbers[end - 1] + 1:
            yield numbers[start], numbers[end - 1] + 1
            start = end
