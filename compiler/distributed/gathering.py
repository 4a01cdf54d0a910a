"""Full tensors out of a sharded model, in the first process: what checkpoints and comparisons are made of."""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from archwright.compiler.distributed.apply import ShardedModel

Part = Callable[[str], torch.Tensor]
"""Gives this rank's part of a parameter, its gradient or a state of it."""


def gather_all(model: ShardedModel, part: Part, names: list[str]) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Each name with its full tensor, in the first process; with None in the others.

    Every process must go through this, with the same names in the same order.
    """
    owners = _owners(model)
    for name in names:
        whole = model.layouts[name].gather(part(name)) if name in model.layouts else None
        yield name, _to_first(model, name, whole, owners[name])


def _owners(model: ShardedModel) -> dict[str, int]:
    """Canonical name → the pipeline rank of the first stage that holds it."""
    plan = model.plan
    sites, owners = plan.program.sites(), dict[str, int]()
    for number in range(len(plan.stages)):
        for place in plan.stage(number).params():
            owners.setdefault(sites[place].name, number % plan.degrees.pipeline)
    return owners


def _to_first(model: ShardedModel, name: str, whole: torch.Tensor | None, owner: int) -> torch.Tensor | None:
    if model.mesh is None:
        return whole
    degrees, rank = model.mesh.degrees, dist.get_rank()
    source = owner * (degrees.world // degrees.pipeline)
    if rank == source != 0:
        assert whole is not None
        dist.send(whole.contiguous(), 0)
    if rank != 0:
        return None
    if source != 0:
        param, options = model.plan.program.params()[name], model.options
        whole = torch.empty(param.shape, dtype=options.dtype, device=options.device)
        dist.recv(whole, source)
    return whole
