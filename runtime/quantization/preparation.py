"""A model's weights → those of its quantized build, calibrated, with what they lose."""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from archwright.compiler.ir import Program
from archwright.compiler.passes import build_program, lower
from archwright.compiler.passes.quantize import INPUT_SCALE, calibrated_by
from archwright.compiler.weights.awq import Scales, find_scales, folds
from archwright.compiler.weights.quantized import LARGEST, built_weights
from archwright.compiler.weights.streaming import Weights
from archwright.runtime.quantization.quality import Quality, check_quality
from archwright.runtime.quantization.tokens import Tokens, read_tokens
from archwright.spec import ArchwrightError, Spec

if TYPE_CHECKING:
    from archwright.runtime.quantization.calibration import Statistics

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """weights: of what is built. quality: None without calibration tokens.

    exponents: path of a matrix → how strongly AWQ scaled its inputs by their mean magnitudes; 0 is not at all.
    seconds: of calibrating and measuring.
    """

    weights: Weights
    quality: Quality | None = None
    exponents: dict[str, float] = field(default_factory=dict[str, float])
    seconds: float = 0.0


def prepare(spec: Spec, base: Weights, tokenizer: Path | None, out: Path, progress: Progress) -> Prepared:
    """Quantize as `build.quantize` says. tokenizer: folder of the model's. out: beside it lies an unfinished state.

    Raises ArchwrightError BUILD060 where calibration is needed and not given, BUILD062 where its tokens do not serve,
    BUILD063 where the quality is beyond the limit.
    """
    chosen = spec.build.quantize
    if chosen is None:
        return Prepared(weights=base)
    program, quantized = lower(spec), build_program(spec)
    all_folds = folds(quantized, chosen)
    rounded = _rounded_inputs(quantized)
    if chosen.calibration is None:
        if (needed := calibrated_by(chosen)) is not None:
            raise ArchwrightError(
                "BUILD060",
                f"`{needed}` needs calibration tokens",
                where="build.quantize",
                help="add build.quantize.calibration: {path: ...}, or use kind: int8, or int4 with method: rtn",
            )
        return Prepared(weights=built_weights(spec, base))
    # Only what runs the model needs PyTorch: without calibration an artifact is written where it is not installed.
    from archwright.runtime.quantization.calibration import calibrate, state_folder

    start = time.perf_counter()
    tokens = read_tokens(chosen.calibration, vocab_size=spec.model.vocab_size, tokenizer=tokenizer)
    paths = sorted({fold.readers[0] for fold in all_folds} | set(rounded))
    found = calibrate(program, base, tokens.samples_NS, paths, state_folder(out), progress) if paths else {}
    inputs, means = {p: s.sampled_TD for p, s in found.items()}, {p: s.mean_D for p, s in found.items()}
    precision = spec.build.precision
    scales = find_scales(all_folds, quantized, base, inputs, means, precision=precision, progress=progress)
    scaled = scales.apply(base)
    weights = built_weights(spec, scaled, _input_scales(rounded, found, scales))
    try:
        quality = _judged(spec, base, quantized, weights, tokens, progress)
    except ArchwrightError:  # refused: nothing stays; whoever was killed finds the calibration again
        shutil.rmtree(state_folder(out), ignore_errors=True)
        raise
    shutil.rmtree(state_folder(out), ignore_errors=True)
    seconds = time.perf_counter() - start
    return Prepared(weights=weights, quality=quality, exponents=scales.exponents, seconds=seconds)


def _judged(
    spec: Spec, base: Weights, quantized: Program, weights: Weights, tokens: Tokens, progress: Progress
) -> Quality:
    from archwright.runtime.quantization.measuring import measure

    quality = measure(lower(spec), base, quantized, weights, tokens.evaluation_NS, progress)
    assert spec.build.quantize is not None
    check_quality(quality, spec.build.quantize.limit)
    return quality


def _rounded_inputs(program: Program) -> list[str]:
    """Paths of the matrices whose inputs are rounded to 8-bit floats."""
    return [name.rpartition(".")[0] for name in program.params() if name.rpartition(".")[2] == INPUT_SCALE]


def _input_scales(paths: list[str], found: dict[str, "Statistics"], scales: Scales) -> dict[str, float]:
    """Name of the scale → value: the largest magnitude that calibration saw becomes the type's largest value."""
    values: dict[str, float] = {}
    for path in paths:
        largest_D = found[path].largest_D / scales.columns.get(f"{path}.weight", np.float32(1))
        values[f"{path}.{INPUT_SCALE}"] = max(float(largest_D.max()), 1e-6) / LARGEST["float8"]
    return values


def quantization_measured(prepared: Prepared) -> dict[str, Any]:
    """What the manifest says of a quantized build; nothing of another one."""
    if prepared.quality is None:
        return {}
    return {"quality": prepared.quality.as_json(), "awq_exponents": prepared.exponents, "prepare_s": prepared.seconds}
