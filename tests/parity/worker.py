"""One of the ranks that compute cases with tensor parallelism over gloo. Requests come in as pickles, answers go out.

python -m tests.parity.worker RANK WORLD RENDEZVOUS_FILE
"""

import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from archwright.compiler.distributed.apply import Options, apply_plan
from archwright.compiler.distributed.mesh import Mesh, make_mesh
from archwright.compiler.interpreters.torch_module import TorchProgram
from archwright.compiler.interpreters.torch_ops import TorchOps
from archwright.compiler.ir import Degrees, Plan, Program
from tests.parity.cases import Array, Case, Outputs
from tests.parity.targets import load_weights, run_torch


def run_local(case: Case, program: Program, local: Program, dtype: torch.dtype) -> Outputs:
    """This rank's Program of local sizes, on its slices of the weights."""
    rank = dist.get_rank()
    tensors = {
        name: case.weights.read(name, param.split and param.split.slices(param.shape, rank))
        for name, param in program.params().items()
    }
    ops = TorchOps(dtype=dtype, groups={"tensor": dist.group.WORLD}, ranks={"tensor": rank})
    module = TorchProgram(local, ops, dtype=dtype, device="cpu")
    load_weights(module, tensors)
    return run_torch(replace(case, program=local), module)


@cache
def mesh_of(degrees: Degrees) -> Mesh | None:
    return make_mesh(degrees, "cpu")


def run_trained(case: Case, plan: Plan) -> tuple[Array, float, dict[str, Array]]:
    """The module that training uses, in float64: logits, loss and the full gradients."""
    mesh = mesh_of(plan.degrees)
    options = Options(dtype=torch.float64, compute_dtype=torch.float64, device=torch.device("cpu"))
    model = apply_plan(plan, case.weights, mesh, options)
    length = case.ids_BS.shape[1]
    # To a length that ranks can share: what follows a token does not change it, and is no target.
    more = ((0, 0), (0, -length % plan.degrees.token_pieces))
    ids_BS = torch.from_numpy(np.pad(case.ids_BS, more))
    targets_BS = torch.from_numpy(np.pad(case.targets_BS, more, constant_values=-100))
    with torch.no_grad():
        whole_BSV = model.module(ids_BS)[:, :length].numpy()
    loss_sum, _ = model.module(ids_BS, targets_BS)
    loss_sum.backward()
    total = loss_sum.detach().clone()
    if mesh is not None:
        dist.all_reduce(total, group=mesh.batch)
    gradients = {name: model.layouts[name].gather(p.grad).numpy() for name, p in model.parameters.items()}
    return whole_BSV, float(total), gradients


def answer(request: dict[str, Any]) -> Any:
    case, plan, dtype = request["case"], request["plan"], request["dtype"]
    with seeded(request["mutation"]):
        if dtype is None:
            return run_trained(case, plan)
        return run_local(case, plan.program, plan.local, getattr(torch, dtype))


@contextmanager
def seeded(mutation: str | None) -> Iterator[None]:
    """The bug of that name in this process, as the parent has it."""
    if mutation is None:
        yield
        return
    import pytest

    from tests.parity.seeded_bugs import ALL_MUTATIONS

    with pytest.MonkeyPatch.context() as monkeypatch:
        ALL_MUTATIONS[mutation].patch(monkeypatch)
        yield


def main(rank: int, world: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(rendezvous, world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    while (request := pickle.load(requests)) is not None:
        try:
            result = answer(request)
        except Exception as error:  # the parent decides whether that is a failure
            result = error
        pickle.dump(result, answers)
        answers.flush()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
