"""The step loop, one for pretraining and finetuning, one process or many."""

import gc
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed import all_reduce

from archwright.compiler.blocks import MixtureOfExperts, PositionedEmbedding
from archwright.compiler.distributed.apply import Options, ShardedModel, apply_plan
from archwright.compiler.distributed.checkpointing import checkpointing_of
from archwright.compiler.distributed.mesh import Mesh, make_mesh
from archwright.compiler.distributed.pipeline import Pipeline
from archwright.compiler.distributed.symmetric import close_window, has_window, open_window
from archwright.compiler.ir import Degrees, Plan
from archwright.compiler.module import DTYPES
from archwright.compiler.passes import TRAINING_TABLE, run_passes
from archwright.compiler.weights.folder import ModelFolder, open_folder
from archwright.compiler.weights.streaming import GeneratedWeights, SafetensorsWeights, Weights
from archwright.spec import ArchwrightError, Spec, spec_digest
from archwright.spec.models import Pretrain, Sft
from archwright.trainers.batches import Batch, Ids, Samples, Share, evaluation_batches, make_samples, training_batch
from archwright.trainers.checkpoints import Progress, prune, restore_optimizer, write_checkpoint
from archwright.trainers.console import Reporter
from archwright.trainers.dataset import Split
from archwright.trainers.metrics import MetricsWriter
from archwright.trainers.optimizer import Optimizers, clipping, make_optimizer, schedule_factor
from archwright.trainers.run_folder import Inputs, Start, master_precision


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """A model, its optimizer and its samples on this rank's device.

    pipeline: None where one rank has all layers. notes: what the user should know of how it runs.
    """

    spec: Spec
    train: Pretrain | Sft
    model: ShardedModel
    pipeline: Pipeline | None
    optimizer: Optimizers
    samples: Samples
    share: Share
    held_out: Samples | None = None
    validation: Split | None = None
    notes: tuple[str, ...] = ()

    @property
    def device(self) -> torch.device:
        return self.model.options.device

    def over_batch(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of a number over the ranks that see different tokens, on every rank; in place."""
        mesh = self.model.mesh
        if mesh is not None:
            if self.pipeline is not None:
                all_reduce(value, group=mesh.groups["pipeline"])
            all_reduce(value, group=mesh.batch)
        return value


def make_trainer(spec: Spec, inputs: Inputs, start: Start, degrees: Degrees, device: torch.device) -> Trainer:
    """Everything that a step needs, as it was after `start.progress.step` steps.

    Raises ArchwrightError TRAIN009 where train.base is another architecture, TRAIN012 to TRAIN014 for unfit data.
    """
    samples = _samples(inputs.train, inputs.data.train, degrees)
    trainer = assemble_trainer(spec, inputs.train, samples, start, degrees, device)
    validation = inputs.data.validation
    return replace(trainer, held_out=_held_out(inputs.train, validation, degrees), validation=validation)


def assemble_trainer(
    spec: Spec, train: Pretrain | Sft, samples: Samples, start: Start, degrees: Degrees, device: torch.device
) -> Trainer:
    """A trainer on the given samples, without an evaluation. Every process of the mesh calls this."""
    mesh = make_mesh(degrees, device.type)
    notes = _share_memory(spec, degrees, mesh, device)
    model = _make_model(spec, train, start, degrees, mesh, device)
    optimizer = make_optimizer(model, train.optimizer)
    if start.checkpoint is not None:
        restore_optimizer(start.checkpoint, model, optimizer, start.progress.step)
    rank = 0 if mesh is None else mesh.data_rank
    return Trainer(
        spec=spec,
        train=train,
        model=model,
        pipeline=Pipeline(model, spec.parallel.schedule.kind) if degrees.pipeline > 1 else None,
        optimizer=optimizer,
        samples=samples,
        share=Share(rank=rank, ranks=degrees.data, micro_batches=train.micro_batches),
        notes=notes,
    )


def _share_memory(spec: Spec, degrees: Degrees, mesh: Mesh | None, device: torch.device) -> tuple[str, ...]:
    """Let tensor ranks that share the sequence read each other's memory; what to tell where they should and cannot.

    Raises ArchwrightError TRAIN018 where the spec demands it.
    """
    wanted = spec.parallel.symmetric_memory
    if mesh is None or degrees.tensor == 1:
        return ()
    close_window(mesh.groups["tensor"])
    if wanted is False or not degrees.sequence or device.type != "cuda":
        return ()
    problem = open_window(mesh.groups["tensor"])
    if problem is None:
        return ("tensor ranks exchange tokens by copies between their memories",)
    if wanted == "auto":
        return (f"tensor ranks exchange tokens by NCCL, and not by copies between their memories: {problem}",)
    raise no_symmetric_memory(problem)


def no_symmetric_memory(problem: str) -> ArchwrightError:
    return ArchwrightError(
        "TRAIN018",
        f"tensor ranks cannot read each other's memory: {problem}",
        where="parallel.symmetric_memory",
        help="use symmetric_memory: auto, which goes on without",
    )


def _samples(train: Pretrain | Sft, split: Split, degrees: Degrees) -> Samples:
    """Of lengths that context and tensor ranks can share; all of one length where stages hand them on."""
    length, pieces, full = train.sequence_length, degrees.token_pieces, degrees.pipeline > 1
    return make_samples(train.kind, split, length, train.seed, multiple=pieces, full=full)


def _make_model(
    spec: Spec, train: Pretrain | Sft, start: Start, degrees: Degrees, mesh: Mesh | None, device: torch.device
) -> ShardedModel:
    plan = run_passes(spec, degrees, TRAINING_TABLE)
    weights: Weights = GeneratedWeights(params=plan.program.params(), seed=train.seed)
    if start.checkpoint is not None:
        weights = SafetensorsWeights(start.checkpoint)
    elif train.base is not None:
        weights = open_base(spec, train.base).weights
    compiled = train.compile is True or (train.compile == "auto" and device.type == "cuda")
    options = Options(
        dtype=DTYPES[master_precision(train.precision)],
        compute_dtype=DTYPES[train.precision],
        device=device,
        checkpointing=checkpointing_of(train.activation_checkpointing),
        compile_layers=_compile_options(mesh) if compiled else None,
        reshard=spec.parallel.reshard and degrees.pipeline == 1,
        token_dim=_token_dim(plan, train, degrees),
    )
    return apply_plan(plan, weights, mesh, options)


def _compile_options(mesh: Mesh | None) -> dict[str, object]:
    if mesh is None or "tensor" not in mesh.groups or not has_window(mesh.groups["tensor"]):
        return {}
    from archwright.compiler.distributed.early_copies import COMPILE_OPTIONS  # here: it loads the compiler of torch

    return {"options": COMPILE_OPTIONS}


def _token_dim(plan: Plan, train: Pretrain | Sft, degrees: Degrees) -> int:
    """Tensor ranks share whole sequences where there are enough of them.

    A router looks at all tokens of a sequence, and learned positions are one row for all sequences: those are cut.
    """
    rows = train.batch_size // (degrees.data * train.micro_batches)
    cut = any(isinstance(block, MixtureOfExperts | PositionedEmbedding) for _, block in plan.program.blocks())
    return 1 if cut or rows % degrees.tensor else 0


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


def _held_out(train: Pretrain | Sft, split: Split, degrees: Degrees) -> Samples | None:
    """Samples of the validation split; None where it is too small to hold one."""
    try:
        return _samples(train, split, degrees)
    except ArchwrightError:
        return None


def freeze_garbage() -> None:
    """Python's collector need not look again through what there is once layers are compiled: on one rank that takes
    0.2 s now and then, and all others wait for it. `gc.unfreeze` takes it back."""
    gc.collect()
    gc.freeze()


def run_steps(
    trainer: Trainer, run: Path, progress: Progress, *, metrics: MetricsWriter | None, reporter: Reporter | None
) -> Progress:
    """Train to the last step. Ranks other than the first have neither metrics nor reporter.

    A step is read after the next one is under way, so that the device need not wait for the host; where there is more
    to do than the step, it is read at once.
    Raises ArchwrightError TRAIN015 where the loss is not a finite number any more.
    """
    train, waiting, second = trainer.train, None, progress.step + 1
    for index in range(progress.step, train.steps):
        launched = launch_step(trainer, index)
        if index == second:
            freeze_garbage()
        if waiting is not None:
            progress = _note(trainer, run, waiting, progress, metrics, reporter)
        waiting, step = launched, index + 1
        last = step == train.steps
        saves = last or step % train.checkpoint.every == 0
        if saves or step % train.evaluate.every == 0:
            progress = _note(trainer, run, waiting, progress, metrics, reporter)
            waiting = None
        if saves:
            if metrics is not None:
                metrics.sync()
            save(trainer, run, progress, main=metrics is not None)
    return progress


def _note(
    trainer: Trainer,
    run: Path,
    launched: "Launched",
    progress: Progress,
    metrics: MetricsWriter | None,
    reporter: Reporter | None,
) -> Progress:
    """Read a step, evaluate after it if it is time, and write its record."""
    record = launched.read(progress.tokens)
    step = record["step"]
    if not math.isfinite(record["loss"]):
        raise ArchwrightError(
            "TRAIN015",
            f"the loss became {record['loss']} at step {step}",
            where=str(run),
            help="lower train.optimizer.learning_rate or lengthen the warmup, in a new run",
        )
    if step == trainer.train.steps or step % trainer.train.evaluate.every == 0:
        record |= evaluate(trainer)
    if metrics is not None and reporter is not None:
        metrics.append(record)
        reporter.step(record)
    return Progress(step=step, tokens=record["tokens"], data_digest=progress.data_digest)


def save(trainer: Trainer, run: Path, progress: Progress, *, main: bool) -> None:
    """A checkpoint of now; older ones beyond `checkpoint.keep` go."""
    write_checkpoint(run, trainer.spec, trainer.model, trainer.optimizer, progress, main=main)
    if main:
        prune(run, trainer.train.checkpoint.keep)


@dataclass(frozen=True, kw_only=True)
class Launched:
    """An optimizer step that may still be running. step counts from 1."""

    step: int
    loss: torch.Tensor
    grad_norm: torch.Tensor
    num_targets: torch.Tensor
    learning_rate: float
    started_s: float

    def read(self, tokens: int) -> dict[str, Any]:
        """The record for the metrics; waits for the device. tokens: targets of the steps before."""
        loss, norm, num_targets = self.loss.item(), self.grad_norm.item(), int(self.num_targets.item())
        return {
            "step": self.step,
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": self.learning_rate,
            "tokens": tokens + num_targets,
            "tokens_per_s": num_targets / (time.perf_counter() - self.started_s),
        }


def launch_step(trainer: Trainer, index: int) -> Launched:
    """One optimizer step, with index from 0. It does not wait for the device."""
    train, started_s = trainer.train, time.perf_counter()
    batch = training_batch(trainer.samples, train.seed, index, train.batch_size, trainer.share)
    factor = schedule_factor(index, schedule=train.schedule, steps=train.steps)
    loss, num_targets = accumulate(trainer, batch)
    norm, scale = clipping(trainer.model, train.clip_norm)
    trainer.optimizer.step(factor, scale)
    rate = factor * train.optimizer.learning_rate
    return Launched(
        step=index + 1, loss=loss, grad_norm=norm, num_targets=num_targets, learning_rate=rate, started_s=started_s
    )


def accumulate(trainer: Trainer, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the mean loss over all targets of the step, on all ranks; that loss, and the number of targets.

    Each piece's sum is divided by the number of targets of the whole step, so the result does not depend on how the
    targets are spread over pieces and ranks.
    """
    pieces = _pieces(trainer, batch)
    num_targets = _count(trainer, batch)
    total = num_targets.clamp(min=1)
    if trainer.pipeline is not None:
        loss = trainer.pipeline.train(pieces, total)
    else:
        loss = torch.zeros((), dtype=torch.float64, device=trainer.device)
        for ids_BS, targets_BS in pieces:
            loss_sum, _ = trainer.model.module(ids_BS, targets_BS)
            part = loss_sum / total
            part.backward()
            loss += part.detach()
    trainer.model.add_tied_gradients()
    return trainer.over_batch(loss), num_targets


def _count(trainer: Trainer, batch: Batch) -> torch.Tensor:
    """Targets of the whole step. Each data rank has its own; context ranks have the same sequences."""
    count = torch.full((), batch.num_targets, dtype=torch.float64, device=trainer.device)
    mesh = trainer.model.mesh
    if mesh is not None and mesh.degrees.data > 1:
        all_reduce(count, group=mesh.batch)
        count /= mesh.degrees.context
    return count


@torch.no_grad()
def evaluate(trainer: Trainer) -> dict[str, float]:
    """Mean loss over the fixed evaluation batches, and bits per byte by the split's tokens per byte.

    validation_bits_per_byte = loss / ln 2 · tokens / bytes, both counts of the whole validation split.
    """
    if trainer.held_out is None or trainer.validation is None:
        return {}
    train, split = trainer.train, trainer.validation
    for stage in trainer.model.stages.values():
        stage.eval()  # without the penalties of routers, which are no property of the text
    loss, count = torch.zeros(2, dtype=torch.float64, device=trainer.device).unbind()
    for batch in evaluation_batches(trainer.held_out, train.evaluate.batches, train.batch_size, trainer.share):
        pieces = _pieces(trainer, batch)
        if trainer.pipeline is not None:
            loss = loss + trainer.pipeline.evaluate(pieces)
        else:
            for ids_BS, targets_BS in pieces:
                loss = loss + trainer.model.module(ids_BS, targets_BS)[0]
        count = count + _count(trainer, batch)
    for stage in trainer.model.stages.values():
        stage.train()
    mean = (trainer.over_batch(loss) / count).item()
    counted = split.num_loss_tokens if train.kind == "sft" else split.num_tokens
    result = {"validation_loss": mean}
    if split.num_bytes and (train.kind == "sft" or not split.masked):
        result["validation_bits_per_byte"] = mean / math.log(2) * counted / split.num_bytes
    return result


def _pieces(trainer: Trainer, batch: Batch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """ids and targets of each micro-batch, sent to the device at once without waiting for it."""

    def send(rows: Ids) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(rows))
        if trainer.device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(trainer.device, non_blocking=True)

    number = trainer.share.micro_batches
    return list(zip(send(batch.ids_BS).chunk(number), send(batch.targets_BS).chunk(number), strict=True))
