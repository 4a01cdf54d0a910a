"""One rank of a gloo world that applies plans; prints what it holds of each as JSON.

python -m tests.compiler.distributed.worker RANK WORLD RENDEZVOUS_FILE
"""

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from archwright.compiler.distributed.apply import Options, ShardedModel, apply_plan, global_norm
from archwright.compiler.distributed.layout import local_of
from archwright.compiler.distributed.mesh import make_mesh
from archwright.compiler.ir import Degrees
from archwright.compiler.passes import TRAINING_TABLE, lower, partition
from archwright.compiler.weights.streaming import GeneratedWeights
from archwright.spec import load

BASE: dict[str, object] = {
    "model.vocab_size": 91,  # no degree divides it
    "tokenizer.vocab_size": 91,
    "model.hidden_size": 32,
    "model.layers": 4,
    "model.layer.ffn.hidden_size": 48,
}
MODELS: dict[str, dict[str, object]] = {
    "tied": {},
    "untied": {"model.tied_embeddings": False, "model.layer.attention.kv_heads": 1},
}
PLANS: dict[str, Degrees] = {
    "one": Degrees(),
    "tensor 2": Degrees(tensor=2),
    "tensor 2, sequence": Degrees(tensor=2, sequence=True),
    "data_shard 2": Degrees(data_shard=2),
    "data_replicate 2": Degrees(data_replicate=2),
    "context 2": Degrees(context=2),
    "pipeline 2": Degrees(pipeline=2),
    "pipeline 2, interleaved": Degrees(pipeline=2, stages_per_rank=2),
    "tensor 4": Degrees(tensor=4),
    "data_shard 2, tensor 2": Degrees(data_shard=2, tensor=2),
    "data_replicate 2, data_shard 2": Degrees(data_replicate=2, data_shard=2),
    "pipeline 2, tensor 2": Degrees(pipeline=2, tensor=2),
    "pipeline 2, data_shard 2": Degrees(pipeline=2, data_shard=2),
}


def make(overrides: dict[str, object], degrees: Degrees) -> ShardedModel:
    plan = partition(lower(load("preset:tiny", {**BASE, **overrides})), degrees, TRAINING_TABLE)
    weights = GeneratedWeights(params=plan.program.params(), seed=5)
    options = Options(dtype=torch.float64, compute_dtype=torch.float64, device=torch.device("cpu"))
    return apply_plan(plan, weights, make_mesh(degrees, "cpu"), options)


def norm_of_drawn(model: ShardedModel) -> float:
    """The norm of gradients that are the initial values of another seed."""
    drawn = GeneratedWeights(params=model.plan.program.params(), seed=6)
    for name, parameter in model.parameters.items():
        parameter.grad = torch.empty_like(parameter)
        model.layouts[name].fill(parameter.grad, lambda part, name=name: drawn.read(name, part))
    return global_norm(model).item()


def report(world: int) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    for plan, degrees in PLANS.items():
        if degrees.world != world:
            continue
        for name, overrides in MODELS.items():
            model = make(overrides, degrees)
            answer[f"{plan}: {name}"] = {
                "dtensors": sorted({isinstance(parameter, DTensor) for parameter in model.parameters.values()}),
                "local": {key: list(local_of(parameter).shape) for key, parameter in model.parameters.items()},
                "norm": norm_of_drawn(model),
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
