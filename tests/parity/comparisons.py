"""Every target against the oracle: what is computed, for which specs, and how far it may be off.

Where a tolerance does not stand in `compiler/tolerances.py` it is said here why it is what it is.
B batch, S sequence, H head_dim.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch

from archwright.compiler.blocks import MixtureOfExperts, Rope
from archwright.compiler.distributed.apply import Options, apply_plan
from archwright.compiler.interpreters import torch_ops
from archwright.compiler.interpreters.numpy_ops import NumpyOps
from archwright.compiler.ir import Degrees, Step
from archwright.compiler.passes import TRAINING_TABLE, lower, run_passes
from archwright.compiler.targets.onnx_graph import export_graphs
from archwright.compiler.targets.stages import GraphOptions
from archwright.compiler.tolerances import TOLERANCES, largest_error
from archwright.runtime.backends.onnxruntime_backend import open_graphs
from archwright.spec import Spec
from archwright.spec.models import MoeFfn
from archwright.trainers import loop
from archwright.trainers.batches import Batch, Share
from tests.parity import dialects
from tests.parity.cases import (
    NUM_STEPS,
    Array,
    Case,
    Outputs,
    TestWeights,
    make_case,
    oracle,
    oracle_slope,
    oracle_through_cache,
)
from tests.parity.ranks import Ranks
from tests.parity.strategies import legal_degrees
from tests.parity.targets import compare, run_onnx, run_torch, torch_module

GRADIENTS = 1e-11
"""float64 gradients, and the loss that they belong to."""
SLOPE = 1e-5
"""A central difference has an error of its own, of size²; twice the size gives four times the error."""
ONE_ROUNDING = 1.01 * 2.0**-8
"""bfloat16 has 8 bits: half a unit in the last place, relative to the smallest value that has the same exponent."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A spec with its inputs and the right answers. folder: for files of the targets."""

    spec: Spec
    seed: int
    folder: Path

    @cached_property
    def case(self) -> Case:
        return make_case(lower(self.spec), self.seed)

    @cached_property
    def expected(self) -> Outputs:
        return oracle(self.case)

    @cached_property
    def gradients(self) -> Mapping[str, Array]:
        """Of the loss's sum, by torch in one process in float64; `_slope` holds them against the oracle."""
        return one_process_gradients(self.case)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """measure: the error of a target. applies: whether there is anything to compare."""

    measure: Callable[[Subject, Ranks], float]
    tolerance: float
    applies: Callable[[Subject], bool] = lambda _: True


def one_process_gradients(case: Case) -> dict[str, Array]:
    module = torch_module(case, torch.float64)
    loss_sum, _ = module(torch.from_numpy(case.ids_BS), torch.from_numpy(case.targets_BS))
    loss_sum.backward()
    return gradients_of(module)


def gradients_of(module: torch.nn.Module) -> dict[str, Array]:
    return {name: parameter.grad.double().numpy() for name, parameter in module.named_parameters()}


def gradient_error(actual: Mapping[str, Array], expected: Mapping[str, Array]) -> float:
    """The largest error of any entry, relative to the largest of its tensor, or to 1/1000 of the largest of all: the
    gradient of k's bias is 0 without RoPE, since a softmax does not see what it adds."""
    if actual.keys() != expected.keys():
        return float("inf")
    floor = 1e-3 * max(np.abs(gradient).max() for gradient in expected.values())
    errors = [
        largest_error(actual[name], gradient) * np.abs(gradient).max() / max(np.abs(gradient).max(), floor)
        for name, gradient in expected.items()
    ]
    return float(max(errors))


def _cached_oracle(subject: Subject, _: Ranks) -> float:
    return compare(oracle_through_cache(subject.case), subject.expected)


def _torch(dtype: torch.dtype) -> Callable[[Subject, Ranks], float]:
    def measure(subject: Subject, _: Ranks) -> float:
        return compare(run_torch(subject.case, torch_module(subject.case, dtype)), subject.expected)

    return measure


def _slope(subject: Subject, _: Ranks) -> float:
    """The gradients' product with a random direction, against the oracle's slope along it."""
    rng = np.random.default_rng(subject.seed)
    direction = {name: rng.standard_normal(tensor.shape) for name, tensor in subject.case.weights.tensors.items()}
    gradients = one_process_gradients(subject.case)
    parts = [np.sum(gradient * direction[name]) for name, gradient in gradients.items()]
    slope = oracle_slope(subject.case, direction, size=1e-6)
    return float(abs(slope - sum(parts)) / np.linalg.norm(parts))


def _micro_batches(subject: Subject, _: Ranks) -> float:
    """The trainer's accumulation: the mean loss over all targets, its rows in two pieces of different counts."""
    case, expected = subject.case, subject.expected
    assert expected.loss_sum is not None and expected.num_tokens is not None
    trainer = _trainer(subject, micro_batches=2)
    loss, num_targets = loop.accumulate(trainer, Batch(ids_BS=case.ids_BS, targets_BS=case.targets_BS))
    if num_targets != expected.num_tokens:
        return float("inf")
    means = {name: gradient / expected.num_tokens for name, gradient in subject.gradients.items()}
    of_loss = largest_error(loss.numpy(), np.array(expected.loss_sum / expected.num_tokens))
    return max(of_loss, gradient_error(gradients_of(trainer.model.module), means))


def _trainer(subject: Subject, micro_batches: int) -> loop.Trainer:
    """What `accumulate` needs: a model in one process."""
    options = Options(dtype=torch.float64, compute_dtype=torch.float64, device=torch.device("cpu"))
    model = apply_plan(run_passes(subject.spec, Degrees(), TRAINING_TABLE), subject.case.weights, None, options)
    unused: Any = None
    return loop.Trainer(
        spec=subject.spec,
        train=unused,
        model=model,
        pipeline=None,
        optimizer=unused,
        samples=unused,
        share=Share(micro_batches=micro_batches),
    )


def _rotation(subject: Subject, _: Ranks) -> float:
    """RoPE of bfloat16 values: one rounding from the exact rotation, relative to each result. Tables in bfloat16 are
    off by more, which no comparison of whole models in bfloat16 can tell from its other roundings."""
    ops, worst = torch_ops.TorchOps(dtype=torch.bfloat16), 0.0
    generator = torch.Generator().manual_seed(subject.seed)
    for table in {block.table for _, block in subject.case.program.blocks() if isinstance(block, Rope)}:
        positions_BS = torch.arange(table.max_positions)[None]
        shape = (1, 4, table.max_positions, table.head_dim)
        x_BNSH = torch.randn(shape, generator=generator).bfloat16()
        step = torch_ops.make_step({table.key: table}, [], ops.dtype, positions_BS=positions_BS)
        actual_BNSH = ops.rope(x_BNSH, table, step).double().numpy()
        exact_BNSH = NumpyOps({}).rope(x_BNSH.double().numpy(), table, Step(positions_BS=positions_BS.numpy()))
        smallest = 1e-4 * np.abs(exact_BNSH).max()  # below it, the float32 arithmetic in between shows
        worst = max(worst, float(np.max(np.abs(actual_BNSH - exact_BNSH) / (np.abs(exact_BNSH) + smallest))))
    return worst


def _has_rope(subject: Subject) -> bool:
    return any(isinstance(block, Rope) for _, block in subject.case.program.blocks())


def _on_two_ranks(dtype: str) -> Callable[[Subject, Ranks], float]:
    def measure(subject: Subject, ranks: Ranks) -> float:
        plan = run_passes(subject.spec, Degrees(tensor=2))
        return compare(ranks.run_local(subject.case, plan, dtype=dtype), subject.expected)

    return measure


def _trained(degrees: Degrees) -> Callable[[Subject, Ranks], float]:
    """Logits, loss and gradients of the module that training uses; every rank gathers the same ones."""

    def measure(subject: Subject, ranks: Ranks) -> float:
        plan, errors, expected = run_passes(subject.spec, degrees, TRAINING_TABLE), [], subject.expected
        for whole_BSV, loss_sum, gradients in ranks.run(subject.case, plan, dtype=None):
            errors.append(largest_error(whole_BSV, expected.whole_BSV))
            errors.append(largest_error(np.array(loss_sum), np.array(expected.loss_sum)))
            errors.append(gradient_error(gradients, subject.gradients))
        return max(errors)

    return measure


def _onnx(degree: int) -> Callable[[Subject, Ranks], float]:
    def measure(subject: Subject, _: Ranks) -> float:
        plan = run_passes(subject.spec, Degrees(tensor=degree))
        return compare(run_onnx(subject.case, plan, subject.folder / f"degree{degree}"), subject.expected)

    return measure


def _placed_onnx(name: str, degrees: Degrees, **options: Any) -> Callable[[Subject, Ranks], float]:
    """The graphs of a mesh with more axes than tensor."""

    def measure(subject: Subject, _: Ranks) -> float:
        plan = run_passes(subject.spec, degrees)
        folder = subject.folder / name
        return compare(run_onnx(subject.case, plan, folder, options=GraphOptions(**options)), subject.expected)

    return measure


def _last_onnx(subject: Subject, _: Ranks) -> float:
    """Graphs that give the logits of one token a row: a prefill of uneven prompts, and decode steps."""
    case, plan = subject.case, run_passes(subject.spec, Degrees(pipeline=2, tensor=2))
    folder = subject.folder / "last"
    options = GraphOptions(logits="last")
    export_graphs(plan, case.weights, folder, precision="float32", capacity=case.capacity, options=options)
    backend = open_graphs(folder, ranks=4, stages=2, precision="float32")
    lengths_B, rows = np.array(case.lengths), np.arange(len(case.lengths))
    cache = backend.new_cache(len(rows), case.capacity)
    first_B = np.cumsum([0, *(lengths_B[:-1] + NUM_STEPS)]) + lengths_B - 1
    actual = [backend.prefill(cache, case.prompts_BS[:, : lengths_B.max()], lengths_B)]
    for step in range(NUM_STEPS):
        at_B = lengths_B + step
        actual.append(backend.decode(cache, case.prompts_BS[rows, at_B], at_B))
    expected = [subject.expected.cached_RV[first_B + step] for step in range(NUM_STEPS + 1)]
    return largest_error(np.stack(actual), np.stack(expected))


def _half_onnx(subject: Subject, _: Ranks) -> float:
    """A bfloat16 graph computed in float32, against the oracle with weights in bfloat16."""
    case = subject.case
    rounded = {n: t.astype(ml_dtypes.bfloat16).astype(np.float32) for n, t in case.weights.tensors.items()}
    case = replace(case, weights=TestWeights(tensors=rounded))
    plan = run_passes(subject.spec, Degrees(tensor=1))
    return compare(run_onnx(case, plan, subject.folder / "half", "bfloat16"), oracle(case))


def _compiled(backend: str, dtype: torch.dtype) -> Callable[[Subject, Ranks], float]:
    def measure(subject: Subject, _: Ranks) -> float:
        module = _compiled_module(subject, backend, dtype)
        with torch.no_grad():
            whole_BSV = module(torch.from_numpy(subject.case.ids_BS)).double().numpy()
        return largest_error(whole_BSV, subject.expected.whole_BSV)

    return measure


def _compiled_gradients(subject: Subject, _: Ranks) -> float:
    module, case = _compiled_module(subject, "aot_eager", torch.float64), subject.case
    loss_sum, _ = module(torch.from_numpy(case.ids_BS), torch.from_numpy(case.targets_BS))
    loss_sum.backward()
    of_loss = largest_error(loss_sum.detach().numpy(), np.array(subject.expected.loss_sum))
    return max(of_loss, gradient_error(gradients_of(module), subject.gradients))


def _compiled_module(subject: Subject, backend: str, dtype: torch.dtype) -> torch.nn.Module:
    torch.compiler.reset()  # what torch learned from other specs would be tried first
    module = torch_module(subject.case, dtype)
    module.compile_layers(backend=backend)
    return module


def _splits_over(degree: int) -> Callable[[Subject], bool]:
    return lambda subject: degree in legal_degrees(subject.spec)


def _has_layers(number: int) -> Callable[[Subject], bool]:
    return lambda subject: subject.spec.model.num_layers >= number


def _splits_experts(tensor: int) -> Callable[[Subject], bool]:
    """Over two ranks, each of them over `tensor` more."""

    def applies(subject: Subject) -> bool:
        ffns = [run.layer.ffn for run in subject.spec.model.runs]
        numbers = [ffn.experts for ffn in ffns if isinstance(ffn, MoeFfn)]
        return bool(numbers) and not any(n % 2 for n in numbers) and tensor in legal_degrees(subject.spec)

    return applies


def _not_filled_up(degrees: Degrees) -> Callable[[Subject], bool]:
    """Sequences that pieces do not divide are filled up with tokens that do not count. Routers look at those too, so
    models that have any are compared where nothing is filled up."""

    def applies(subject: Subject) -> bool:
        routers = any(isinstance(block, MixtureOfExperts) for _, block in subject.case.program.blocks())
        return not routers or subject.case.ids_BS.shape[1] % degrees.token_pieces == 0

    return applies


FUSED = 1e-13
"""The same products of the same numbers: only the order of the sums in a larger matrix may differ, in float64."""
SEQUENCE, CONTEXT = Degrees(tensor=2, sequence=True), Degrees(context=2)
FLOAT64, FLOAT32 = TOLERANCES["torch", "float64"], TOLERANCES["torch", "float32"]
ONNX = TOLERANCES["onnxruntime", "float32"]

COMPARISONS: Mapping[str, Comparison] = {
    "oracle through its cache": Comparison(measure=_cached_oracle, tolerance=FLOAT64),
    "torch, float64": Comparison(measure=_torch(torch.float64), tolerance=FLOAT64),
    "torch, float32": Comparison(measure=_torch(torch.float32), tolerance=FLOAT32),
    "torch, gradients": Comparison(measure=_slope, tolerance=SLOPE),
    "torch, micro-batches": Comparison(measure=_micro_batches, tolerance=GRADIENTS),
    "torch, RoPE in bfloat16": Comparison(measure=_rotation, tolerance=ONE_ROUNDING, applies=_has_rope),
    "two processes, float64": Comparison(measure=_on_two_ranks("float64"), tolerance=FLOAT64),
    "two processes, float32": Comparison(measure=_on_two_ranks("float32"), tolerance=FLOAT32),
    "two processes, training": Comparison(measure=_trained(Degrees(tensor=2)), tolerance=GRADIENTS),
    "two processes, sequence": Comparison(
        measure=_trained(SEQUENCE), tolerance=GRADIENTS, applies=_not_filled_up(SEQUENCE)
    ),
    "two processes, context": Comparison(
        measure=_trained(CONTEXT), tolerance=GRADIENTS, applies=_not_filled_up(CONTEXT)
    ),
    "ONNX Runtime": Comparison(measure=_onnx(1), tolerance=ONNX),
    "ONNX Runtime, bfloat16 weights": Comparison(measure=_half_onnx, tolerance=ONNX),
    "ONNX Runtime, 2 ranks joined": Comparison(measure=_onnx(2), tolerance=ONNX, applies=_splits_over(2)),
    "ONNX Runtime, 4 ranks joined": Comparison(measure=_onnx(4), tolerance=ONNX, applies=_splits_over(4)),
    "ONNX Runtime, 8 ranks joined": Comparison(measure=_onnx(8), tolerance=ONNX, applies=_splits_over(8)),
    "ONNX Runtime, 2 stages": Comparison(
        measure=_placed_onnx("stages", Degrees(pipeline=2)), tolerance=ONNX, applies=_has_layers(2)
    ),
    "ONNX Runtime, 2 expert ranks joined": Comparison(
        measure=_placed_onnx("experts", Degrees(expert=2)), tolerance=ONNX, applies=_splits_experts(1)
    ),
    "ONNX Runtime, 2 x 2 expert and tensor ranks joined": Comparison(
        measure=_placed_onnx("gathered", Degrees(expert=2, tensor=2), moe="gathered"),
        tolerance=ONNX,
        applies=_splits_experts(2),
    ),
    "ONNX Runtime, prefill of last logits": Comparison(measure=_last_onnx, tolerance=ONNX, applies=_has_layers(2)),
    **{
        name: Comparison(
            measure=measured, tolerance=ONNX, applies=_splits_over(2) if "2 ranks" in name else lambda _: True
        )
        for name, measured in dialects.MEASURES.items()
    },
    "fused, oracle": Comparison(measure=dialects.fused_oracle, tolerance=FUSED),
    "fused, torch": Comparison(measure=dialects.fused_torch, tolerance=FLOAT64),
    "compiled, aot_eager": Comparison(measure=_compiled("aot_eager", torch.float64), tolerance=FLOAT64),
    "compiled, aot_eager, gradients": Comparison(measure=_compiled_gradients, tolerance=GRADIENTS),
    "compiled, inductor": Comparison(measure=_compiled("inductor", torch.float32), tolerance=FLOAT32),
}

SOMETIMES = {
    "two processes, sequence": 0,
    "two processes, float32": 1,
    "ONNX Runtime, bfloat16 weights": 2,
    "two processes, context": 3,
}
"""Comparisons that repeat others in another dtype or on another mesh: for one spec in four, by the remainder of its
seed."""
BUILDS = {"ONNX Runtime, 2 stages", "ONNX Runtime, prefill of last logits", "ONNX Runtime, 2 expert ranks joined"}
BUILDS |= {"ONNX Runtime, 2 x 2 expert and tensor ranks joined", *dialects.MEASURES}
"""For seeded bugs. That they are right shows `test_exports`, on random builds with all else that a build chooses."""


def interpreted(seed: int) -> list[str]:
    """The comparisons of a spec in `make test`, but those of compiled modules."""
    names = [name for name in COMPARISONS if not name.startswith("compiled") and name not in BUILDS]
    names = [name for name in names if SOMETIMES.get(name, seed % 4) == seed % 4]
    return [name for name in names if dialects.SOMETIMES.get(name, seed % 8) == seed % 8]


def compiled(seed: int) -> str:
    """The comparison of a spec's compiled module; one in four has its gradients compared as well."""
    return "compiled, aot_eager, gradients" if seed % 4 == 3 else "compiled, aot_eager"


def measure(subject: Subject, names: Iterable[str], ranks: Ranks) -> dict[str, float]:
    """Name → error, for the comparisons that apply."""
    chosen = {name: COMPARISONS[name] for name in names}
    return {name: item.measure(subject, ranks) for name, item in chosen.items() if item.applies(subject)}


def beyond_tolerance(errors: Mapping[str, float]) -> dict[str, float]:
    """Those that are too large; NaN is."""
    return {name: error for name, error in errors.items() if not error <= COMPARISONS[name].tolerance}
