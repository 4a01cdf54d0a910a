"""What a model's activations are like: statistics of the inputs of its matrices, one layer after the other.

Beside the output, until it is written, lie `.{out}.calibration/`: the hidden states behind the last finished layer and
the statistics of the layers before. A calibration that was killed goes on there and gives the same numbers.

N sequences, S tokens, D channels, T sampled tokens.
"""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from archwright.compiler.ir import Program
from archwright.compiler.weights.streaming import Weights
from archwright.runtime.quantization.segments import run_rows, segment_module
from archwright.spec.files import atomic_write
from archwright.spec.json_text import parse_json

Array = NDArray[Any]
Progress = Callable[[str], None]

SAMPLED_TOKENS = 512
"""Inputs of a matrix that are kept, evenly spaced, to compare outputs with."""
_STATE = "state.json"


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Of the inputs of one matrix: mean and largest magnitude of each channel [D], and some inputs [T, D]."""

    mean_D: Array
    largest_D: Array
    sampled_TD: Array


def state_folder(out: Path) -> Path:
    """Where an unfinished calibration for the artifact `out` lies."""
    out = Path(os.path.abspath(out))
    return out.with_name(f".{out.name}.calibration")


def calibrate(
    program: Program,
    weights: Weights,
    ids_NS: NDArray[np.int64],
    paths: Sequence[str],
    folder: Path,
    progress: Progress = lambda message: None,
) -> dict[str, Statistics]:
    """Run the model on the samples and return the statistics of the matrices at `paths`.

    program: unquantized. folder: of the state, see `state_folder`; the caller removes it once it has what it wants.
    """
    digest = _digest(program, weights, ids_NS, paths)
    start, x_NSD = _resumed(folder, digest)
    if x_NSD is None:
        shutil.rmtree(folder, ignore_errors=True)
        x_NSD = torch.from_numpy(ids_NS)
    elif start:
        progress(f"calibration goes on behind {program.segments[start - 1].path}")
    last = max(
        (number for number, segment in enumerate(program.segments) if _within(segment.path, paths, program)), default=-1
    )
    for number in range(start, last + 1):
        path = program.segments[number].path or "the head"
        progress(f"calibrating {path}, {number + 1} of {last + 1}")
        module = segment_module(program, weights, number)
        modules = dict(module.named_modules())
        collectors = {p: _Collector(ids_NS.size) for p in paths if p in modules}
        for name, collector in collectors.items():
            modules[name].register_forward_pre_hook(collector.hook)
        x_NSD = run_rows(module, x_NSD)
        _save(folder, digest, number, {p: c.result() for p, c in collectors.items()}, None if number == last else x_NSD)
    return {path: found for number in range(last + 1) for path, found in _load(folder, number).items()}


def _within(segment: str, paths: Sequence[str], program: Program) -> bool:
    """Whether a segment has one of the matrices; the last one's path is empty, and its blocks stand at the root."""
    if segment:
        return any(path == segment or path.startswith(f"{segment}.") for path in paths)
    below = dict(program.segments[-1].block.children())
    return any(path in {program.segments[-1].block.child_path(name, "") for name in below} for path in paths)


class _Collector:
    """Sums over the tokens of a matrix's input, sequence by sequence."""

    def __init__(self, num_tokens: int) -> None:
        self._step = max(1, num_tokens // SAMPLED_TOKENS)
        self._seen = 0
        self._sum_D: torch.Tensor | None = None
        self._largest_D: torch.Tensor | None = None
        self._sampled: list[torch.Tensor] = []

    def hook(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        x_TD = args[0].flatten(0, -2)
        magnitude_TD = x_TD.abs()
        total_D, largest_D = magnitude_TD.double().sum(0), magnitude_TD.amax(0)
        self._sum_D = total_D if self._sum_D is None else self._sum_D + total_D
        self._largest_D = largest_D if self._largest_D is None else torch.maximum(self._largest_D, largest_D)
        first = -self._seen % self._step
        self._sampled.append(x_TD[first :: self._step].clone())
        self._seen += len(x_TD)

    def result(self) -> Statistics:
        assert self._sum_D is not None and self._largest_D is not None, "the matrix was run"
        return Statistics(
            mean_D=(self._sum_D / self._seen).float().numpy(),
            largest_D=self._largest_D.numpy(),
            sampled_TD=torch.cat(self._sampled).numpy(),
        )


def _digest(program: Program, weights: Weights, ids_NS: Array, paths: Sequence[str]) -> str:
    """Of all that the statistics depend on; of each tensor its first row, since all of them would take minutes."""
    digest = hashlib.sha256(json.dumps([list(ids_NS.shape), list(paths), torch.__version__]).encode())
    digest.update(np.ascontiguousarray(ids_NS).tobytes())
    for name, param in program.params().items():
        row = weights.read(name, (slice(0, 1), *[slice(None)] * (len(param.shape) - 1)))
        digest.update(f"{name} {param.shape}".encode() + np.ascontiguousarray(row).tobytes())
    return digest.hexdigest()


def _save(folder: Path, digest: str, number: int, found: Mapping[str, Statistics], x_NSD: torch.Tensor | None) -> None:
    """Each file whole or not at all, and the state last: what it names is there."""
    arrays = {f"{path}/{key}": value for path, each in found.items() for key, value in vars(each).items()}
    _write(folder / f"statistics-{number}.npz", lambda file: np.savez(file, **arrays))
    if x_NSD is not None:
        _write(folder / f"hidden-{number}.npy", lambda file: np.save(file, x_NSD.numpy()))
    atomic_write(folder / _STATE, json.dumps({"digest": digest, "finished": number}))
    (folder / f"hidden-{number - 1}.npy").unlink(missing_ok=True)


def _write(path: Path, write: Callable[[io.BytesIO], None]) -> None:
    file = io.BytesIO()
    write(file)
    atomic_write(path, file.getbuffer())


def _resumed(folder: Path, digest: str) -> tuple[int, torch.Tensor | None]:
    """The first segment that is not finished, and what enters it; 0 and None where there is nothing to go on from."""
    try:
        state = parse_json((folder / _STATE).read_bytes())
        if state["digest"] != digest:
            return 0, None
        finished = int(state["finished"])
        hidden = folder / f"hidden-{finished}.npy"
        if not hidden.is_file():  # behind the last segment nothing is kept
            return finished + 1, torch.empty(0)
        return finished + 1, torch.from_numpy(np.load(hidden, allow_pickle=False))
    except (OSError, ValueError, KeyError, TypeError):
        return 0, None


def _load(folder: Path, number: int) -> dict[str, Statistics]:
    with np.load(folder / f"statistics-{number}.npz", allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    paths = dict.fromkeys(name.rpartition("/")[0] for name in arrays)
    keys = ("mean_D", "largest_D", "sampled_TD")
    return {path: Statistics(**{key: arrays[f"{path}/{key}"] for key in keys}) for path in paths}
