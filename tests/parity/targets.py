"""The targets that are compared with the oracle. B batch, S sequence, V vocabulary."""

from pathlib import Path

import numpy as np
import torch

from archwright.compiler.interpreters.torch_module import TorchProgram
from archwright.compiler.interpreters.torch_ops import TorchOps
from archwright.compiler.ir import Plan
from archwright.compiler.targets.onnx_graph import export_graphs
from archwright.compiler.targets.stages import DEFAULT_OPTIONS, GraphOptions
from archwright.compiler.tolerances import largest_error
from archwright.runtime.backends.onnxruntime_backend import open_graphs
from tests.parity.cases import Array, Case, Forward, Outputs, run_generation, run_whole

STALE = 7.5
"""What caches hold before they are written: a row that is read too early shows."""


def compare(actual: Outputs, expected: Outputs) -> float:
    """The largest of the errors of logits, loss and generation; infinite where the loss counts other tokens."""
    errors = [
        largest_error(actual.whole_BSV, expected.whole_BSV),
        largest_error(actual.cached_RV, expected.cached_RV),
    ]
    if actual.loss_sum is not None:
        errors.append(largest_error(np.array(actual.loss_sum), np.array(expected.loss_sum)))
        errors.append(0.0 if actual.num_tokens == expected.num_tokens else float("inf"))
    return max(errors)


def torch_module(case: Case, dtype: torch.dtype) -> TorchProgram:
    """The case's model on one device."""
    module = TorchProgram(case.program, TorchOps(dtype=dtype), dtype=dtype, device="cpu")
    load_weights(module, case.weights.tensors)
    return module


def load_weights(module: TorchProgram, tensors: dict[str, Array]) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.from_numpy(tensors[name]))


def run_torch(case: Case, module: TorchProgram) -> Outputs:
    """Whole sequences and loss without a cache, the generation with one."""
    cache = module.make_cache(batch=len(case.lengths), positions=case.capacity)
    for states in cache.values():
        for state in states.values():
            state.fill_(STALE)
    module.bind_cache(cache)

    def forward(ids_BS: Array, positions_BS: Array, write_index_B: Array, visible: int) -> Array:
        ids, positions, index = (torch.from_numpy(x.copy()) for x in (ids_BS, positions_BS, write_index_B))
        return module(ids, positions_BS=positions, write_index_B=index, visible=visible).double().numpy()

    with torch.no_grad():
        ids_BS = torch.from_numpy(case.ids_BS)
        loss_sum, num_tokens = module(ids_BS, torch.from_numpy(case.targets_BS))
        return Outputs(
            whole_BSV=module(ids_BS).double().numpy(),
            loss_sum=float(loss_sum),
            num_tokens=int(num_tokens),
            cached_RV=run_generation(case, forward),
        )


def run_onnx(
    case: Case, plan: Plan, folder: Path, precision: str = "float32", options: GraphOptions = DEFAULT_OPTIONS
) -> Outputs:
    """ONNX Runtime through Archwright's own back end: of each stage the graph of one rank, or of all ranks joined.

    Half-precision graphs are computed in float32 with the weights that they hold.
    """
    export_graphs(plan, case.weights, folder, precision=precision, capacity=case.capacity, options=options)
    backend = open_graphs(
        folder,
        ranks=plan.degrees.world,
        stages=plan.degrees.pipeline,
        precision=precision,
        target=options.dialect.target,
    )

    def new_forward(batch: int) -> Forward:
        cache = backend.new_cache(batch, case.capacity)
        for value in cache.values.values():
            value.update_inplace(np.full(value.shape(), STALE, np.float32))

        def forward(ids_BS: Array, positions_BS: Array, write_index_B: Array, visible: int) -> Array:
            return backend.forward(cache, ids_BS, positions_BS, write_index_B, visible).astype(np.float64)

        return forward

    return Outputs(
        whole_BSV=run_whole(case, new_forward(len(case.ids_BS))),
        loss_sum=None,
        num_tokens=None,
        cached_RV=run_generation(case, new_forward(len(case.lengths))),
    )
