"""One rank of a gloo world whose optimizers make three clipped steps on given gradients under each plan of its size.

python -m tests.trainers.optimizer_worker RANK WORLD RENDEZVOUS_FILE ANSWER_FILE
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from archwright.compiler.distributed.apply import Options, ShardedModel, apply_plan
from archwright.compiler.distributed.gathering import gather_all
from archwright.compiler.distributed.mesh import make_mesh
from archwright.compiler.ir import Degrees
from archwright.compiler.passes import TRAINING_TABLE, lower, partition
from archwright.compiler.weights.streaming import GeneratedWeights
from archwright.spec import load
from archwright.spec.models import AdamW, Muon
from archwright.trainers.optimizer import Optimizers, clipping, make_optimizer

SETTINGS: dict[str, object] = {
    "model.vocab_size": 91,  # no degree divides it
    "tokenizer.vocab_size": 91,
    "model.hidden_size": 32,
    "model.layer.ffn.hidden_size": 52,
}
PLANS: dict[str, Degrees] = {
    "one": Degrees(),
    "data_shard 2": Degrees(data_shard=2),
    "data_replicate 2": Degrees(data_replicate=2),
    "pipeline 2": Degrees(pipeline=2),
    "data_shard 4": Degrees(data_shard=4),
    "data_replicate 2, data_shard 2": Degrees(data_replicate=2, data_shard=2),
    "pipeline 2, data_shard 2": Degrees(pipeline=2, data_shard=2),
    "data_shard 2, context 2": Degrees(data_shard=2, context=2),
    "tensor 2": Degrees(tensor=2),
    "tensor 4": Degrees(tensor=4),
    "data_shard 2, tensor 2": Degrees(data_shard=2, tensor=2),
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw, fused": {"options": AdamW(kind="adamw", learning_rate=0.01, eps=1e-3), "fused": True},
    "adamw, foreach": {"options": AdamW(kind="adamw", learning_rate=0.01, eps=1e-3), "foreach": True},
    "muon": {"options": Muon(kind="muon"), "fused": True},
    "muon, foreach": {"options": Muon(kind="muon"), "foreach": True},
}


def train(model: ShardedModel, optimizer: Optimizers) -> None:
    for step in range(3):
        drawn = GeneratedWeights(params=model.plan.program.params(), seed=step + 10)
        for name, parameter in model.parameters.items():
            parameter.grad = torch.empty_like(parameter)
            model.layouts[name].fill(parameter.grad, lambda part, name=name, drawn=drawn: drawn.read(name, part))
        _, scale = clipping(model, 0.5)
        optimizer.step(1.0, scale)


def left(model: ShardedModel, optimizer: Optimizers) -> dict[str, list[float]]:
    """Full parameters and states, in the first process."""
    params = model.plan.program.params()
    names = list(params)
    found = dict(gather_all(model, lambda name: model.parameters[name], names))
    for name in names:
        for state in optimizer.state_names(params[name]):
            found |= {
                f"{state}.{each}": whole
                for each, whole in gather_all(model, lambda name, state=state: optimizer.state(name, state), [name])
            }
    return {name: whole.flatten().tolist() for name, whole in found.items() if whole is not None}


def main(rank: int, size: int, rendezvous: str, answer: str) -> None:
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
    found: dict[str, Any] = {}
    for plan_name, degrees in PLANS.items():
        if degrees.world != size:
            continue
        plan = partition(lower(load("preset:tiny", SETTINGS)), degrees, TRAINING_TABLE)
        weights = GeneratedWeights(params=plan.program.params(), seed=5)
        options = Options(dtype=torch.float64, compute_dtype=torch.float64, device=torch.device("cpu"))
        mesh = make_mesh(degrees, "cpu")
        for name, how in OPTIMIZERS.items():
            model = apply_plan(plan, weights, mesh, options)
            optimizer = make_optimizer(model, **how)
            train(model, optimizer)
            found.setdefault(plan_name, {})[name] = left(model, optimizer)
    if rank == 0:
        Path(answer).write_text(json.dumps(found))
    if size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
