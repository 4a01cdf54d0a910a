"""One rank of a gloo world that applies plans; prints what it found as JSON.

python -m tests.compiler.distributed.worker RANK WORLD RENDEZVOUS_FILE
"""

import hashlib
import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from archwright.compiler.distributed.apply import apply_plan, gather, global_norm, make_mesh, place, scale_
from archwright.compiler.interpreters.torch_module import TorchProgram
from archwright.compiler.ir import Degrees, Plan
from archwright.compiler.passes import lower, partition
from archwright.compiler.weights.streaming import GeneratedWeights
from archwright.spec import load
from archwright.trainers.batches import Batch
from archwright.trainers.loop import accumulate
from archwright.trainers.optimizer import clip_gradients, make_optimizer

MODELS: dict[str, dict[str, object]] = {
    "tied": {"model.tied_embeddings": True},
    "untied": {"model.tied_embeddings": False, "model.layer.attention.kv_heads": 1},
    "muon": {"train.optimizer": {"kind": "muon"}},
}
BASE: dict[str, object] = {
    "model.vocab_size": 96,
    "tokenizer.vocab_size": 96,
    "model.hidden_size": 32,
    "model.layer.ffn.hidden_size": 48,
    "train.optimizer.learning_rate": 1e-2,
}
STEPS = 20


def make(name: str, world: int, dtype: torch.dtype) -> tuple[TorchProgram, Plan, DeviceMesh | None]:
    spec = load("preset:tiny", {**BASE, **MODELS[name]})
    plan = partition(lower(spec), Degrees(tensor=world))
    mesh = make_mesh(plan.degrees, "cpu")
    weights = GeneratedWeights(params=plan.program.params(), seed=5)
    module = apply_plan(plan, weights, dtype=dtype, compute_dtype=dtype, device=torch.device("cpu"), mesh=mesh)
    return module, plan, mesh


def hashes(module: TorchProgram) -> dict[str, str]:
    """SHA-256 of each full tensor."""
    return {
        name: hashlib.sha256(gather(parameter).numpy().tobytes()).hexdigest()
        for name, parameter in module.named_parameters()
    }


def losses(module: TorchProgram, name: str) -> tuple[list[float], list[float]]:
    """Loss and gradient norm of each of 20 steps in the module's dtype, clipping at work."""
    options = load("preset:tiny", {**BASE, **MODELS[name]}).train
    assert options is not None
    optimizer = make_optimizer(module, options.optimizer, torch.float64)
    generator = torch.Generator().manual_seed(1)
    found: list[float] = []
    norms: list[float] = []
    for _ in range(STEPS):
        tokens = torch.randint(0, 96, (4, 25), generator=generator).numpy()
        loss = accumulate(module, Batch(ids_BS=tokens[:, :-1], targets_BS=tokens[:, 1:]), 2, torch.device("cpu"))
        norms.append(clip_gradients(module, 0.5).item())
        optimizer.step(1.0)
        found.append(loss.item())
    return found, norms


def norm_and_scale(module: TorchProgram, plan: Plan, mesh: DeviceMesh | None) -> dict[str, float]:
    """The norm of the initial values, and again after halving all of them."""
    params = plan.program.params()
    drawn = GeneratedWeights(params=params, seed=6)
    tensors = [
        place(
            param,
            lambda part, name=name: drawn.read(name, part),
            dtype=torch.float64,
            device=torch.device("cpu"),
            mesh=mesh,
        )
        for name, param in params.items()
    ]
    before = global_norm(tensors).item()
    scale_(tensors, torch.tensor(0.5))
    return {"before": before, "after": global_norm(tensors).item()}


def report(world: int) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    for name in MODELS:
        module, plan, mesh = make(name, world, torch.float64)
        parameters = dict(module.named_parameters())
        answer[name] = {
            "hashes": hashes(module),
            "norm": norm_and_scale(module, plan, mesh),
            "dtensors": sorted({isinstance(parameter, DTensor) for parameter in parameters.values()}),
            "local": {
                key: list(p.to_local().shape if isinstance(p, DTensor) else p.shape) for key, p in parameters.items()
            },
            **dict(zip(("losses", "norms"), losses(module, name), strict=True)),
            "final": {key: gather(parameter).double().sum().item() for key, parameter in parameters.items()},
            "own": hashlib.sha256(gather(parameters["model.norm.weight"]).numpy().tobytes()).hexdigest(),
        }
    return answer


if __name__ == "__main__":
    rank, size, rendezvous = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
    print(json.dumps(report(size)))
    if size > 1:
        dist.destroy_process_group()
