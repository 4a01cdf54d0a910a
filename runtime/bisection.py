"""`verify --bisect`: the first operation of a target that differs from the oracle.

Oracle and target run the same steps, each through its own cache, and keep the result of every operation. The target
computes each operation from the oracle's values, so that one that differs is itself at fault, and not a victim of what
came before it. Last come the logits of the whole model.
B batch, S sequence.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from archwright.compiler.interpreters.onnx_dialects import PORTABLE
from archwright.compiler.ir import Degrees, Program
from archwright.compiler.passes import build_plan, lower, run_passes
from archwright.compiler.passes.fuse import fuse
from archwright.compiler.passes.origin import origin
from archwright.compiler.reduced import reduced
from archwright.compiler.targets.stages import DEFAULT_OPTIONS, graph_options
from archwright.compiler.tolerances import TOLERANCES, Target, largest_error
from archwright.compiler.weights.folder import open_folder
from archwright.compiler.weights.fused import FusedWeights
from archwright.compiler.weights.streaming import GeneratedWeights, Weights
from archwright.runtime.artifact import Artifact, escapes, external_data, is_artifact, read_artifact_manifest
from archwright.runtime.rank_weights import RankWeights
from archwright.runtime.recorded_runs import (
    LOGITS,
    Array,
    Call,
    OnnxRun,
    OracleRun,
    Recorder,
    TorchRun,
    operation_names,
    rank_part,
)
from archwright.runtime.verification import computable, numeric_scope
from archwright.spec import ArchwrightError, Spec, load
from archwright.spec.load import resolve
from archwright.spec.manifest import check_manifest

PROMPT = 24
DECODE_STEPS = 4
ROWS = 3
END_TOKENS = 8

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The first operation that differs.

    name: of its node, as in the graph. call: the step in which it differs. rank: None where all ranks share the value
    or there is one. shape: the oracle's, of this rank's part; found: the target's, None where it has no such value.
    block: the class whose forward runs it, source: where that stands. spec_path, spec_line: the key of the spec that
    the block comes from, and its `file:line`. agreed: the operation before it, None where there is none.
    """

    name: str
    call: str
    rank: int | None
    shape: tuple[int, ...]
    found: tuple[int, ...] | None
    error: float
    tolerance: float
    block: str
    source: str
    spec_path: str
    spec_line: str
    agreed: str | None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Bisection:
    """What a bisection found. num_operations: of the program; num_compared: results, over calls and ranks.

    largest_error, largest_at: of the results that agree.
    """

    path: Path
    target: str
    calls: tuple[str, ...]
    num_operations: int
    num_compared: int
    largest_error: float
    largest_at: str
    tolerance: float
    first: Difference | None

    @property
    def ok(self) -> bool:
        return self.first is None

    def problems(self) -> list[str]:
        """`CODE sentence` of the difference, if there is one."""
        return [] if self.first is None else [f"VERIFY007 `{self.first.name}` is the first operation that differs"]

    def as_json(self) -> dict[str, Any]:
        first = self.first and asdict(self.first) | {"error": _finite(self.first.error)}
        return asdict(self) | {"path": str(self.path), "ok": self.ok, "first": first}

    def as_text(self) -> str:
        allowed = f"allowed is {self.tolerance:.0e}"
        largest = f"the largest error is {self.largest_error:.1e}, in {self.largest_at}; {allowed}"
        if self.first is None:
            head = f"no difference: {self.num_compared:,} results of {self.num_operations:,} operations agree"
            return f"{head} with the oracle\n  target   {self.target}\n  calls    {', '.join(self.calls)}\n  {largest}"
        first = self.first
        rank = "" if first.rank is None else f", rank {first.rank}"
        found = "" if first.found == first.shape else f", found {_shape(first.found)}"
        lines = [
            f"first difference: {first.name}",
            f"  target   {self.target}",
            f"  call     {first.call}{rank}",
            f"  shape    {_shape(first.shape)}{found}",
            f"  error    {first.error:.1e} of the largest value; {allowed}",
            f"  block    {first.block}, {first.source}",
            f"  spec     {first.spec_line}: {first.spec_path}",
            f"  before   {first.agreed} agrees" if first.agreed else "  before   nothing: this is the first operation",
        ]
        if self.num_compared > 1:
            lines.append(f"           in the {self.num_compared - 1:,} results that agree, {largest}")
        return "\n".join([*lines, *([f"  note     {first.note}"] if first.note else [])])


def _finite(error: float) -> float | None:
    """JSON has no infinity."""
    return error if np.isfinite(error) else None


def _shape(shape: tuple[int, ...] | None) -> str:
    return "no such value" if shape is None else str(list(shape))


def bisect(path: str | Path, progress: Progress = lambda message: None) -> Bisection:
    """Compare every operation of an artifact (ONNX Runtime), a model folder or a run (PyTorch) with the oracle's.

    Models too large for the oracle are compared on their spec made small, as `verify` does. An artifact is run even
    where its graphs are not the files that were built: finding the change is what this is for.
    Raises ArchwrightError VERIFY002 or VERIFY003 where an artifact would read files outside its folder, VERIFY006 where
    its graphs lack weights, VERIFY007 where they do not run, RUN010 to RUN016 where the folder cannot be opened.
    """
    path = Path(path)
    if is_artifact(path):
        return _bisect_artifact(path, progress)
    opened = open_folder(path)
    plainly = opened.spec.build.model_copy(update={"quantize": None})  # a model folder runs as it was trained
    spec, weights = opened.spec.model_copy(update={"build": plainly}), opened.weights
    if numeric_scope(spec) == "reduced":
        spec = reduced(spec)
        weights = GeneratedWeights(params=lower(spec).params(), seed=0)
        progress("the model is large: comparing on its spec made small")
    program = lower(spec)
    run = TorchRun(program, weights)
    return _Comparer(path, spec, program, weights, "torch").compare(run)


def _bisect_artifact(path: Path, progress: Progress) -> Bisection:
    read_artifact_manifest(path)
    for problem in check_manifest(path):
        progress(problem)
    for code, problems in (("VERIFY002", escapes(path)), ("VERIFY003", external_data(path))):
        for problem in problems:
            raise ArchwrightError(code, problem, where=str(path), help="`archwright verify` lists all that is wrong")
    whole = Artifact(path, load(path / "spec.yaml"))
    if numeric_scope(whole.spec) == "reduced":
        progress("the model is large: comparing on its spec made small, exported now")
    with computable(whole) as artifact:
        # Queries whose scale is folded into their matrix are other values; all else that is fused has the same ones.
        scaled = fuse(artifact.plan.program, ("scale",) if "scale" in artifact.dialect.fusions else ())
        weights = FusedWeights(weights=RankWeights(artifact), params=scaled.program.params(), parts=scaled.weights)
        comparer = _Comparer(path, artifact.spec, scaled.program, weights, "onnxruntime")
        try:
            return comparer.compare(OnnxRun(artifact))
        except ArchwrightError:
            raise
        except Exception as error:  # an edited graph can trip whatever reads or runs it
            message = f"the graphs cannot be run: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            help = "`archwright verify` lists what is wrong with the files"
            raise ArchwrightError("VERIFY007", message, where=str(path), help=help) from error


def calls(rows: int, capacity: int, vocab_size: int) -> Iterator[Call]:
    """Prompts of uneven length, decode steps behind each, and the last rows of the cache."""
    rng = np.random.default_rng(0)
    total = min(PROMPT + DECODE_STEPS, capacity)
    steps = min(DECODE_STEPS, total - 1)
    longest = total - steps
    ids_BS = rng.integers(0, vocab_size, (rows, total))
    lengths_B = np.array([max(1, longest * (rows - row) // rows) for row in range(rows)])
    zeros_B = np.zeros(rows, np.int64)
    # Every cell of the padded batch is computed and compared, those behind a short prompt too.
    positions_BS = np.broadcast_to(np.arange(longest), (rows, longest))
    yield Call("prefill", ids_BS[:, :longest], positions_BS, zeros_B, longest, new_cache=total)
    for step in range(steps):
        at_B = lengths_B + step
        ids_B1 = ids_BS[np.arange(rows), at_B][:, None]
        yield Call(f"decode step {step + 1}", ids_B1, at_B[:, None], at_B, int(at_B.max()) + 1)
    start = capacity - min(END_TOKENS, capacity)
    positions_BS = np.arange(start, capacity)[None]
    ids_BS = rng.integers(0, vocab_size, positions_BS.shape)
    yield Call("end of the cache", ids_BS, positions_BS, np.array([start]), capacity, new_cache=capacity)


class _Comparer:
    """Oracle against one target, until the first difference."""

    def __init__(self, path: Path, spec: Spec, program: Program, weights: Weights, target: Target) -> None:
        """program: the global one, annotated where the target is sharded."""
        self._path = path
        self._spec = spec
        self._program = program
        self._weights = weights
        self._tolerance = TOLERANCES[target, "float32"]
        sharded = target == "onnxruntime"
        plan = build_plan(spec) if sharded else run_passes(spec, Degrees())
        self._degree = plan.degrees.tensor
        # By their canonical names, whatever the graphs have fused.
        options = replace(graph_options(spec.build), dialect=PORTABLE) if sharded else DEFAULT_OPTIONS
        self.stages = operation_names(plan, spec, options)
        self.names = (*(name for stage in self.stages for name in stage), LOGITS)
        first = [plan.stage_ranks(stage)[0] for stage, own in enumerate(self.stages) for _ in own]
        self._first_ranks = (*first, 0)
        self._num_compared = 0
        self._largest = (0.0, "")
        self._agreed: str | None = None

    def compare(self, run: Recorder) -> Bisection:
        """Run all calls, or up to the first difference."""
        oracle = OracleRun(self._program, self._weights)
        done: list[str] = []
        first: Difference | None = None
        for call in calls(min(ROWS, run.backend.max_batch or ROWS), run.backend.capacity, self._program.vocab_size):
            call = run.adapted(call)
            done.append(call.name)
            expected = oracle.run(call)
            first = self._first(call.name, expected, run.run(call, expected))
            if first is not None:
                break
        error, place = self._largest
        return Bisection(
            path=self._path,
            target=run.backend.description,
            calls=tuple(done),
            num_operations=len(self.names),
            num_compared=self._num_compared,
            largest_error=error,
            largest_at=place,
            tolerance=self._tolerance,
            first=first,
        )

    def _first(self, call: str, expected: list[Array], found: Sequence[Sequence[Array | None]]) -> Difference | None:
        assert len(expected) == len(found) == len(self.names), "all interpreters run the same operations"
        for name, first, whole, parts in zip(self.names, self._first_ranks, expected, found, strict=True):
            for index, part in enumerate(parts):
                tensor_rank = index % self._degree
                mine = whole if part is None else rank_part(whole, part.shape, tensor_rank, self._degree)
                error = float("inf") if part is None else largest_error(part, mine)
                self._num_compared += 1
                if error > self._tolerance:
                    rank = first + index if len(parts) > 1 else None
                    return self._difference(name, call, rank, mine, part, error)
                self._largest = max(self._largest, (error, f"{name} ({call})"))
            self._agreed = name
        return None

    def _difference(
        self, name: str, call: str, rank: int | None, mine: Array, part: Array | None, error: float
    ) -> Difference:
        path = name.rpartition("/")[0]
        block = type(dict(self._program.blocks())[path])
        place = origin(self._spec, resolve(self._path / "spec.yaml").tree, path)
        line = inspect.getsourcelines(block.forward)[1]
        return Difference(
            name=name,
            call=call,
            rank=rank,
            shape=mine.shape,
            found=None if part is None else part.shape,
            error=error,
            tolerance=self._tolerance,
            block=block.__name__,
            source=f"{inspect.getsourcefile(block.forward)}:{line}",
            spec_path=place.path,
            spec_line=str(place),
            agreed=self._agreed,
            note=_WHOLE if name == LOGITS else "",
        )


_WHOLE = (
    "every operation agrees by itself, computed from the oracle's values: their rounding errors add up to this, or the "
    "runtime computes otherwise where nothing is recorded"
)
