"""One training from the inputs to the model folder, as one process of a world."""

import ctypes
from pathlib import Path

import torch

from archwright.compiler.weights.folder import newest_checkpoint
from archwright.spec import Spec
from archwright.trainers.batches import Conversations
from archwright.trainers.checkpoints import Progress
from archwright.trainers.console import Reporter
from archwright.trainers.launch import World, join, leave, share
from archwright.trainers.loop import Trainer, make_trainer, run_steps
from archwright.trainers.metrics import MetricsWriter
from archwright.trainers.run_folder import Start, open_inputs, prepare_run, write_model


def train_in_world(spec: Spec, run: Path, world: World, *, resume: bool) -> None:
    """Train `spec` into `run` as one process of `world`."""
    device = _device(world)
    join(world, device.type)
    try:
        # The first rank alone looks at what users can get wrong, so that an error is told once.
        start = share(world, _begin(spec, run, resume) if world.main else None)
        inputs = open_inputs(spec)
        if start.progress.step < inputs.train.steps:
            trainer = make_trainer(spec, inputs, start, device)
            progress = _train(trainer, run, start, world, device)
        else:
            progress = start.progress
            if world.main:
                print(f"{run}: complete, {progress.step} steps")
        if world.main:
            _, checkpoint = newest_checkpoint(run)
            model = write_model(run, spec, inputs, checkpoint, progress.step)
            print(f"model: {model}")
    finally:
        leave(world)


def _begin(spec: Spec, run: Path, resume: bool) -> Start:
    return prepare_run(run, spec, open_inputs(spec), resume=resume)


def _device(world: World) -> torch.device:
    """A GPU of its own for each process of this machine, or the CPU for all."""
    if torch.cuda.device_count() < world.local_size:
        _keep_freed_memory()
        return torch.device("cpu")
    torch.cuda.set_device(world.local_rank)
    return torch.device("cuda", world.local_rank)


def _keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next step.

    By default it hands large tensors back to the system and gets them again page by page: 8% of the time of a step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # names of malloc.h
        mallopt(trim_threshold, 1 << 30)
        mallopt(top_pad, 64 << 20)
        mallopt(mmap_threshold, 32 << 20)


def _train(trainer: Trainer, run: Path, start: Start, world: World, device: torch.device) -> Progress:
    if not world.main:
        return run_steps(trainer, run, start.progress, metrics=None, reporter=None)
    train, done = trainer.train, start.progress.step
    with (
        MetricsWriter(run, last_step=done) as metrics,
        Reporter(run, steps=train.steps, done=done, log_every=train.log_every) as reporter,
    ):
        _introduce(trainer, reporter, start, world, device)
        return run_steps(trainer, run, start.progress, metrics=metrics, reporter=reporter)


def _introduce(trainer: Trainer, reporter: Reporter, start: Start, world: World, device: torch.device) -> None:
    train = trainer.train
    processes = f"{world.size} processes, " if world.size > 1 else ""
    reporter.say(
        f"{train.kind} {trainer.spec.name}: {trainer.module.program.num_params():,} parameters, "
        f"{train.batch_size} x {train.sequence_length} tokens a step, {train.precision}, {processes}{device.type}"
    )
    if start.checkpoint is not None:
        reporter.say(f"going on after step {start.progress.step}")
    if isinstance(trainer.samples, Conversations):
        samples = trainer.samples
        reporter.say(
            f"{len(samples)} conversations; {samples.num_cut} cut to {train.sequence_length + 1} tokens, "
            f"{samples.num_left_out} left out because nothing to learn is within that length"
        )
    if trainer.held_out is None:
        reporter.say("no evaluation: the data's validation split holds no sample")
