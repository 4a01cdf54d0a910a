"""One rank of a gloo world that runs mixtures of experts spread over ranks; rank 0 prints how far they are from one
process as JSON.

python -m tests.compiler.distributed.experts_worker RANK EXPERT TENSOR RENDEZVOUS_FILE

B batch, S sequence.
"""

import json
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from archwright.compiler.interpreters.torch_module import TorchProgram
from archwright.compiler.interpreters.torch_ops import TorchOps
from archwright.compiler.ir import Degrees, Param, Plan
from archwright.compiler.passes import INFERENCE_TABLE, lower, run_passes
from archwright.compiler.tolerances import largest_error
from archwright.spec import load
from tests.parity.cases import Array, make_case
from tests.parity.comparisons import gradient_error
from tests.parity.targets import load_weights

TABLE = {**INFERENCE_TABLE, "tokens": "expert"}
DENSE = {"kind": "swiglu", "hidden_size": 48}
MOE = {"kind": "moe", "experts": 6, "experts_per_token": 2, "hidden_size": 24, "balance_loss": 0.3, "z_loss": 0.1}
SHARED = {**MOE, "shared": {"hidden_size": 16}, "router": {"score": "sigmoid", "scale": 2.0}}
ATTENTION = {"kind": "gqa", "heads": 4, "kv_heads": 2, "head_dim": 8}
LAYERS = [{"layer": {"attention": ATTENTION, "ffn": ffn}} for ffn in (DENSE, MOE, SHARED)]
MODEL: dict[str, object] = {"model.layer": None, "model.layers": LAYERS, "model.hidden_size": 32}
CASES = ("even", "all tokens to one rank", "compiled")


def make_tensors(case: str, tensors: Mapping[str, Array]) -> dict[str, Array]:
    """`all tokens to one rank`: the first channel is large in every token, and the routers read little else."""
    changed = {name: value.astype(np.float64) for name, value in tensors.items()}
    if case == CASES[1]:
        changed["model.embed_tokens.weight"][:, 0] = 40
        for name, value in changed.items():
            if name.endswith("norm.weight"):
                value[:] = np.abs(value) + 0.1
            if name.endswith("mlp.gate.weight"):
                value *= 1e-3
                value[:, 0] = -np.arange(len(value))
    return changed


def part(param: Param, at: Mapping[str, int]) -> tuple[slice, ...]:
    slices = [slice(None)] * len(param.shape)
    for split in param.splits:
        slices[split.dim] = split.slices(param.shape, at[split.mesh_axis])[split.dim]
    return tuple(slices)


def run(
    program: Any, tensors: dict[str, Array], ops: TorchOps, ids_BS: Array, targets_BS: Array, compiled: bool = False
) -> tuple[Array, float, dict[str, Array]]:
    """Logits, loss and gradients."""
    module = TorchProgram(program, ops, dtype=torch.float64, device="cpu")
    load_weights(module, tensors)
    if compiled:
        module.compile_layers(backend="aot_eager")
    ids = torch.from_numpy(ids_BS)
    with torch.no_grad():
        logits_BSV = module(ids).numpy()
    loss_sum, _ = module(ids, torch.from_numpy(targets_BS))
    loss_sum.backward()
    gradients = {name: np.zeros(p.shape) if p.grad is None else p.grad.numpy() for name, p in module.named_parameters()}
    return logits_BSV, float(loss_sum.detach()), gradients


def join(plan: Plan, answers: list[Any]) -> dict[str, Array]:
    """Whole gradients: pieces at their places, and those of data ranks added."""
    params = plan.program.params()
    whole = {name: np.zeros(param.shape) for name, param in params.items()}
    for at, _, _, gradients in answers:
        for name, gradient in gradients.items():
            if at["tensor"] == 0 or params[name].split is not None:
                whole[name][part(params[name], at)] += gradient
    return whole


def report(case: str, degrees: Degrees, rank: int) -> dict[str, float] | None:
    plan = run_passes(load("preset:tiny", MODEL), degrees, TABLE)
    mesh = init_device_mesh("cpu", (degrees.expert, degrees.tensor), mesh_dim_names=("expert", "tensor"))
    at = {"expert": rank // degrees.tensor, "tensor": rank % degrees.tensor}
    program = lower(load("preset:tiny", MODEL))
    inputs = make_case(program, 3)
    tensors = make_tensors(case, inputs.weights.tensors)
    rng = np.random.default_rng(1)
    ids_BS = rng.integers(0, program.vocab_size, (2 * degrees.expert, 13))
    targets_BS = np.where(rng.random(ids_BS.shape) < 0.4, -100, ids_BS)
    mine = slice(2 * at["expert"], 2 * at["expert"] + 2)
    local = {name: tensors[name][part(param, at)] for name, param in plan.program.params().items()}
    groups = {axis: mesh.get_group(axis) for axis, degree in degrees.sizes.items() if degree > 1}
    ops = TorchOps(dtype=torch.float64, groups=groups, ranks=at)
    answers: list[Any] = [None] * degrees.world
    compiled = case == "compiled"
    dist.all_gather_object(answers, (at, *run(plan.local, local, ops, ids_BS[mine], targets_BS[mine], compiled)))
    if rank > 0:
        return None
    logits_BSV, loss_sum, gradients = run(program, tensors, TorchOps(dtype=torch.float64), ids_BS, targets_BS)
    first = [answer for answer in answers if answer[0]["tensor"] == 0]
    return {
        "logits": largest_error(np.concatenate([answer[1] for answer in first]), logits_BSV),
        "loss": abs(sum(answer[2] for answer in first) / loss_sum - 1),
        "gradients": gradient_error(join(plan, answers), gradients),
        "smallest gradient": min(
            float(np.abs(each).max())
            for gradient in gradients.values()
            for each in (gradient if gradient.ndim == 3 else [gradient])
        ),
    }


def means_of_pieces(rank: int, world: int) -> list[float]:
    """Errors of a loss of means over sequences of which each rank has a piece, and of its gradient: under `context`,
    where ranks make different parts of the loss, and under `spread`, where each makes all of it."""
    whole_BSE = torch.randn(2, 3 * world, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    piece = slice(3 * rank, 3 * rank + 3)
    weights_W = torch.arange(1, world + 1, dtype=torch.float64)
    errors: list[float] = []
    for axis in ("context", "tensor"):
        full_BSE, part_BSE = whole_BSE.clone().requires_grad_(), whole_BSE[:, piece].clone().requires_grad_()
        ops = TorchOps(dtype=torch.float64, groups={axis: dist.group.WORLD})
        found_BE = ops.sequence_mean(part_BSE, None if axis == "context" else axis)
        expected_BE = TorchOps(dtype=torch.float64).sequence_mean(full_BSE, None)
        (found_BE.square().sum() * (weights_W[rank] if axis == "context" else weights_W.sum())).backward()
        (expected_BE.square().sum() * weights_W.sum()).backward()
        errors.append(float((found_BE - expected_BE).abs().max()))
        errors.append(float((part_BSE.grad - full_BSE.grad[:, piece]).abs().max()))
    return errors


if __name__ == "__main__":
    rank, expert, tensor, rendezvous = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=expert * tensor)
    found: dict[str, Any] = {
        case: report(case, Degrees(expert=expert, tensor=tensor), rank) for case in CASES[: 4 - tensor]
    }
    found["means"] = means_of_pieces(rank, expert * tensor)
    if rank == 0:
        print(json.dumps(found))
    dist.destroy_process_group()
