"""Checkpoints: complete or absent, and the same files whatever the plan that wrote them.

checkpoints/step-00000100/
    model.safetensors       full parameters under canonical names, in the masters' precision
    optimizer.safetensors   full optimizer states, `exp_avg.NAME`, `exp_avg_sq.NAME`, `momentum.NAME`
    state.json              step, tokens, the digest of the data
    manifest.json           SHA-256 of the three
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from archwright.compiler.distributed.apply import ShardedModel
from archwright.compiler.distributed.gathering import Part, gather_all
from archwright.compiler.weights.folder import CHECKPOINT, checkpoints
from archwright.compiler.weights.streaming import (
    Array,
    SafetensorsWeights,
    Tensor,
    write_safetensors,
    write_weights,
)
from archwright.spec import ArchwrightError, Spec
from archwright.spec.files import atomic_folder
from archwright.spec.manifest import MANIFEST, check_manifest, write_manifest
from archwright.trainers.optimizer import Optimizers

OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a training stands: everything that is not a tensor.

    step: steps done. tokens: targets seen. data_digest: of the data's manifest.
    """

    step: int
    tokens: int
    data_digest: str


def checkpoint_path(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def write_checkpoint(
    run: Path, spec: Spec, model: ShardedModel, optimizer: Optimizers, progress: Progress, *, main: bool
) -> None:
    """Write the checkpoint of `progress.step`. All ranks call it and gather tensor by tensor; `main` writes."""
    params = model.plan.program.params()
    names = list(params)
    if not main:
        for _ in gather_all(model, lambda name: model.parameters[name], names):
            pass
        for name in names:
            for state in optimizer.state_names(params[name]):
                for _ in gather_all(model, lambda name, state=state: optimizer.state(name, state), [name]):
                    pass
        return
    dtype = np.dtype(str(model.options.dtype).removeprefix("torch."))
    with atomic_folder(checkpoint_path(run, progress.step), exist="replace") as folder:
        write_weights(folder, {name: _announce(model, name, model.parameters.__getitem__, dtype) for name in names})
        states = {
            f"{state}.{name}": _announce(model, name, lambda name, state=state: optimizer.state(name, state), dtype)
            for name in names
            for state in optimizer.state_names(params[name])
        }
        write_safetensors(folder / OPTIMIZER, states)
        (folder / STATE).write_text(json.dumps(asdict(progress), indent=2) + "\n")
        write_manifest(folder, kind="run", spec=spec, details={"step": progress.step})


def _announce(model: ShardedModel, name: str, part: Part, dtype: np.dtype[Any]) -> Tensor:
    """A tensor to be gathered when its turn to be written comes."""

    def produce() -> Array:
        ((_, whole),) = gather_all(model, part, [name])
        assert whole is not None, "the first process writes"
        return whole.cpu().numpy()

    return Tensor(shape=model.plan.program.params()[name].shape, dtype=dtype, produce=produce)


def read_progress(checkpoint: Path) -> Progress:
    """Raises ArchwrightError TRAIN010 where a file of the checkpoint is missing or changed."""
    problems = check_manifest(checkpoint)
    if problems:
        raise ArchwrightError(
            "TRAIN010",
            f"the checkpoint is damaged: {problems[0]}",
            where=str(checkpoint),
            help="remove this folder to go on from an older checkpoint, or from the beginning",
        )
    return Progress(**json.loads((checkpoint / STATE).read_text()))


def restore_optimizer(checkpoint: Path, model: ShardedModel, optimizer: Optimizers, step: int) -> None:
    """Read the optimizer's states, each rank its own part."""
    saved = SafetensorsWeights(checkpoint / OPTIMIZER)
    for name, parameter in model.parameters.items():
        layout = model.layouts[name]
        states: dict[str, torch.Tensor] = {}
        for state in optimizer.state_names(layout.param):
            key, states[state] = f"{state}.{name}", torch.empty_like(parameter)
            layout.fill(states[state], lambda part, key=key: saved.read(key, part))
        optimizer.restore(parameter, states, step)


def prune(run: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and what killed trainings left, on whatever machine they ran.

    Nobody else writes into a run's checkpoints, and this process is not writing one now.
    """
    kept = list(checkpoints(run).values())[-keep:]
    for folder in (run / "checkpoints").iterdir():
        unfinished = folder.name.startswith(".step-")
        if unfinished or (CHECKPOINT.fullmatch(folder.name) and folder not in kept):
            (folder / MANIFEST).unlink(missing_ok=True)  # first: without it the folder is no checkpoint
            shutil.rmtree(folder)
