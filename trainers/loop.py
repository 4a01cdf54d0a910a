"""The step loop, one for pretraining and finetuning, one process or many."""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from archwright.compiler.distributed.apply import apply_plan, make_mesh
from archwright.compiler.interpreters.torch_module import TorchProgram
from archwright.compiler.module import DTYPES
from archwright.compiler.passes import degrees_of, run_passes
from archwright.compiler.weights.folder import ModelFolder, open_folder
from archwright.compiler.weights.streaming import GeneratedWeights, SafetensorsWeights, Weights
from archwright.spec import ArchwrightError, Spec, spec_digest
from archwright.spec.models import Pretrain, Sft
from archwright.trainers.batches import Batch, Samples, evaluation_batches, make_samples, training_batch
from archwright.trainers.checkpoints import Progress, prune, restore_optimizer, write_checkpoint
from archwright.trainers.console import Reporter
from archwright.trainers.dataset import Split
from archwright.trainers.metrics import MetricsWriter
from archwright.trainers.optimizer import Optimizers, clip_gradients, make_optimizer, schedule_factor
from archwright.trainers.run_folder import Inputs, Start, master_precision


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """A model, its optimizer and its samples on this rank's device."""

    spec: Spec
    train: Pretrain | Sft
    module: TorchProgram
    optimizer: Optimizers
    samples: Samples
    held_out: Samples | None
    validation: Split
    device: torch.device


def make_trainer(spec: Spec, inputs: Inputs, start: Start, device: torch.device) -> Trainer:
    """Everything that a step needs, as it was after `start.progress.step` steps.

    Raises ArchwrightError TRAIN009 where train.base is another architecture, TRAIN012 to TRAIN014 for unfit data.
    """
    train = inputs.train
    mesh = make_mesh(degrees_of(spec.parallel), device.type)
    samples = make_samples(train.kind, inputs.data.train, train.sequence_length, train.seed)
    module = _make_module(spec, train, start, device, mesh)
    if train.compile is True or (train.compile == "auto" and device.type == "cuda"):
        module.compile_layers()
    optimizer = make_optimizer(module, train.optimizer, DTYPES[train.precision])
    if start.checkpoint is not None:
        restore_optimizer(start.checkpoint, module, optimizer, start.progress.step)
    return Trainer(
        spec=spec,
        train=train,
        module=module,
        optimizer=optimizer,
        samples=samples,
        held_out=_held_out(train, inputs.data.validation),
        validation=inputs.data.validation,
        device=device,
    )


def _make_module(
    spec: Spec, train: Pretrain | Sft, start: Start, device: torch.device, mesh: DeviceMesh | None
) -> TorchProgram:
    plan = run_passes(spec, degrees_of(spec.parallel))
    weights: Weights = GeneratedWeights(params=plan.program.params(), seed=train.seed)
    if start.checkpoint is not None:
        weights = SafetensorsWeights(start.checkpoint)
    elif train.base is not None:
        weights = open_base(spec, train.base).weights
    return apply_plan(
        plan,
        weights,
        dtype=DTYPES[master_precision(train.precision)],
        compute_dtype=DTYPES[train.precision],
        device=device,
        mesh=mesh,
    )


def open_base(spec: Spec, path: str) -> ModelFolder:
    """The weights to start from. Raises ArchwrightError TRAIN009 where they are of another architecture."""
    base = open_folder(Path(path))
    if spec_digest(base.spec) != spec_digest(spec):
        raise ArchwrightError(
            "TRAIN009",
            "train.base holds another architecture than the spec's `model`",
            where=path,
            help=f"copy the model section of {Path(path) / 'spec.yaml'}",
        )
    return base


def _held_out(train: Pretrain | Sft, split: Split) -> Samples | None:
    """Samples of the validation split; None where it is too small to hold one."""
    try:
        return make_samples(train.kind, split, train.sequence_length, train.seed)
    except ArchwrightError:
        return None


def run_steps(
    trainer: Trainer, run: Path, progress: Progress, *, metrics: MetricsWriter | None, reporter: Reporter | None
) -> Progress:
    """Train to the last step. Ranks other than the first have neither metrics nor reporter.

    Raises ArchwrightError TRAIN015 where the loss is not a finite number any more.
    """
    train, main = trainer.train, metrics is not None
    while progress.step < train.steps:
        record = train_step(trainer, progress)
        step = record["step"]
        if not math.isfinite(record["loss"]):
            raise ArchwrightError(
                "TRAIN015",
                f"the loss became {record['loss']} at step {step}",
                where=str(run),
                help="lower train.optimizer.learning_rate or lengthen the warmup, in a new run",
            )
        progress = Progress(step=step, tokens=record["tokens"], data_digest=progress.data_digest)
        last = step == train.steps
        if last or step % train.evaluate.every == 0:
            record |= evaluate(trainer)
        if metrics is not None and reporter is not None:
            metrics.append(record)
            reporter.step(record)
        if last or step % train.checkpoint.every == 0:
            if metrics is not None:
                metrics.sync()
            save(trainer, run, progress, main=main)
    return progress


def save(trainer: Trainer, run: Path, progress: Progress, *, main: bool) -> None:
    """A checkpoint of now; older ones beyond `checkpoint.keep` go."""
    precision = master_precision(trainer.train.precision)
    write_checkpoint(run, trainer.spec, trainer.module, trainer.optimizer, progress, main=main, precision=precision)
    if main:
        prune(run, trainer.train.checkpoint.keep)


def train_step(trainer: Trainer, progress: Progress) -> dict[str, Any]:
    """One optimizer step; its record for the metrics, whose `step` counts from 1."""
    train, started = trainer.train, time.perf_counter()
    batch = training_batch(trainer.samples, train.seed, progress.step, train.batch_size)
    factor = schedule_factor(progress.step, schedule=train.schedule, steps=train.steps)
    loss = accumulate(trainer.module, batch, train.micro_batches, trainer.device)
    norm = clip_gradients(trainer.module, train.clip_norm)
    trainer.optimizer.step(factor)
    loss_value = loss.item()  # waits for the device, so that the time below is the step's
    return {
        "step": progress.step + 1,
        "loss": loss_value,
        "grad_norm": norm.item(),
        "learning_rate": factor * train.optimizer.learning_rate,
        "tokens": progress.tokens + batch.num_targets,
        "tokens_per_s": batch.num_targets / (time.perf_counter() - started),
    }


def accumulate(module: TorchProgram, batch: Batch, micro_batches: int, device: torch.device) -> torch.Tensor:
    """Gradients of the mean loss over all targets of the batch; returns that loss.

    Each piece's sum is divided by the number of targets of the whole batch, so the result does not depend on how the
    targets are spread over the pieces.
    """
    total = max(1, batch.num_targets)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    for piece in batch.pieces(micro_batches):
        loss_sum, _ = module(*_tensors(piece, device))
        part = loss_sum / total
        part.backward()
        loss += part.detach()
    return loss


@torch.no_grad()
def evaluate(trainer: Trainer) -> dict[str, float]:
    """Mean loss over the fixed evaluation batches, and bits per byte by the split's tokens per byte.

    validation_bits_per_byte = loss / ln 2 · tokens / bytes, both counts of the whole validation split.
    """
    if trainer.held_out is None:
        return {}
    train, split = trainer.train, trainer.validation
    trainer.module.eval()  # without the penalties of routers, which are no property of the text
    loss, tokens = 0.0, 0
    for batch in evaluation_batches(trainer.held_out, train.evaluate.batches, train.batch_size):
        for piece in batch.pieces(train.micro_batches):
            loss_sum, _ = trainer.module(*_tensors(piece, trainer.device))
            loss += loss_sum.item()
        tokens += batch.num_targets
    trainer.module.train()
    mean = loss / tokens
    counted = split.num_loss_tokens if train.kind == "sft" else split.num_tokens
    result = {"validation_loss": mean}
    if split.num_bytes and (train.kind == "sft" or not split.masked):
        result["validation_bits_per_byte"] = mean / math.log(2) * counted / split.num_bytes
    return result


def _tensors(batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(batch.ids_BS).to(device), torch.from_numpy(batch.targets_BS).to(device)
