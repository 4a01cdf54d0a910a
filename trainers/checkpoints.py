"""Checkpoints: complete or absent, and the same files whatever the plan that wrote them.

checkpoints/step-00000100/
    model.safetensors       full parameters under canonical names, in the masters' precision
    optimizer.safetensors   full optimizer states, `exp_avg.NAME`, `exp_avg_sq.NAME`, `momentum.NAME`
    state.json              step, tokens, the digest of the data
    manifest.json           SHA-256 of the three
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from archwright.compiler.distributed.apply import gather, place
from archwright.compiler.interpreters.torch_module import TorchProgram
from archwright.compiler.weights.folder import CHECKPOINT, checkpoints
from archwright.compiler.weights.streaming import (
    PRECISIONS,
    SafetensorsWeights,
    Tensor,
    write_safetensors,
    write_weights,
)
from archwright.spec import ArchwrightError, Spec
from archwright.spec.files import atomic_folder
from archwright.spec.manifest import MANIFEST, check_manifest, write_manifest
from archwright.trainers.optimizer import Optimizers, optimizer_states, restore_states

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
    run: Path,
    spec: Spec,
    module: TorchProgram,
    optimizer: Optimizers,
    progress: Progress,
    *,
    main: bool,
    precision: str,
) -> None:
    """Write the checkpoint of `progress.step`. All ranks call it and gather tensor by tensor; `main` writes."""
    parameters = dict(module.named_parameters())
    states = optimizer_states(module, optimizer)
    if not main:
        for tensor in (*parameters.values(), *states.values()):
            gather(tensor)
        return
    dtype = PRECISIONS[precision]
    with atomic_folder(checkpoint_path(run, progress.step), exist="replace") as folder:
        write_weights(folder, _announce(parameters, dtype))
        write_safetensors(folder / OPTIMIZER, _announce(states, dtype))
        (folder / STATE).write_text(json.dumps(asdict(progress), indent=2) + "\n")
        write_manifest(folder, kind="run", spec=spec, details={"step": progress.step})


def _announce(tensors: Mapping[str, torch.Tensor], dtype: np.dtype[Any]) -> dict[str, Tensor]:
    """Tensors to be gathered when their turn to be written comes."""
    return {
        name: Tensor(shape=tuple(tensor.shape), dtype=dtype, produce=lambda tensor=tensor: gather(tensor).cpu().numpy())
        for name, tensor in tensors.items()
    }


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


def restore_optimizer(checkpoint: Path, module: TorchProgram, optimizer: Optimizers, step: int) -> None:
    """Read the optimizer's states, each rank its own part."""
    saved = SafetensorsWeights(checkpoint / OPTIMIZER)
    params = module.program.params()
    states: dict[str, torch.Tensor] = {}
    for name, parameter in module.named_parameters():
        mesh = getattr(parameter, "device_mesh", None)
        for state in optimizer.state_names(parameter):
            key = f"{state}.{name}"
            states[key] = place(
                params[name],
                lambda part, key=key: saved.read(key, part),
                dtype=parameter.dtype,
                device=parameter.device,
                mesh=mesh,
            )
    restore_states(module, optimizer, states, step)


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
