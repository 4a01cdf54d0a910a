"""One training from the inputs to the model folder, as one process of a world."""

import ctypes
import gc
from pathlib import Path

import torch

from archwright.compiler.passes import degrees_of
from archwright.compiler.weights.folder import newest_checkpoint
from archwright.spec import ArchwrightError, Spec
from archwright.trainers.batches import Conversations, make_samples
from archwright.trainers.checkpoints import Progress, prune
from archwright.trainers.console import Reporter
from archwright.trainers.launch import World, join, leave, lost_peer, share
from archwright.trainers.loop import Trainer, make_trainer, no_symmetric_memory, open_base, run_steps
from archwright.trainers.metrics import MetricsWriter
from archwright.trainers.run_folder import Start, open_inputs, prepare_run, write_model


def train_in_world(spec: Spec, run: Path, world: World, *, resume: bool) -> None:
    """Train `spec` into `run` as one process of `world`.

    Errors of the user are raised in the first rank, so that they are told once; the others leave with status 1.
    """
    device = device_of(world)
    join(world, device.type)
    try:
        start = _begin_together(spec, run, world, device, resume=resume)
        inputs = open_inputs(spec)
        progress = start.progress
        if progress.step < inputs.train.steps:
            degrees = degrees_of(spec.parallel, world.size)
            progress = _train(make_trainer(spec, inputs, start, degrees, device), run, start, world)
        elif world.main:
            print(f"{run}: complete, {progress.step} steps")
        if world.main:
            prune(run, inputs.train.checkpoint.keep)  # one killed after its last checkpoint did not come to it
            _, checkpoint = newest_checkpoint(run)
            print(f"model: {write_model(run, spec, inputs, checkpoint, progress.step)}")
    except ArchwrightError:
        if world.main:
            raise
        raise SystemExit(1) from None
    except RuntimeError as error:
        if not lost_peer(error):
            raise
        if not world.main:
            raise SystemExit(1) from None
        help = "the message of that process, or of what started it, says why; then go on with --resume"
        message = "the connection to another process of this training is lost"
        raise ArchwrightError("TRAIN017", message, where=str(run), help=help) from error
    finally:
        gc.unfreeze()
        leave(world)


def _begin_together(spec: Spec, run: Path, world: World, device: torch.device, *, resume: bool) -> Start:
    """Only the first rank looks at the folders; the others learn where it begins, or that it cannot."""
    start, error = None, None
    if world.main:
        try:
            start = _begin(spec, run, device, resume)
        except (ArchwrightError, OSError) as caught:
            error = caught
    start = share(world, start)
    if error is not None:
        raise error
    if start is None:
        raise SystemExit(1)
    return start


def _begin(spec: Spec, run: Path, device: torch.device, resume: bool) -> Start:
    """Everything that can be found wrong is, before the run folder is made."""
    inputs = open_inputs(spec)
    if spec.parallel.symmetric_memory is True and device.type != "cuda":
        raise no_symmetric_memory("they are not on GPUs")
    make_samples(inputs.train.kind, inputs.data.train, inputs.train.sequence_length, inputs.train.seed)
    if inputs.train.base is not None and not run.exists():
        open_base(spec, inputs.train.base)
    return prepare_run(run, spec, inputs, resume=resume)


def device_of(world: World) -> torch.device:
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


def _train(trainer: Trainer, run: Path, start: Start, world: World) -> Progress:
    if not world.main:
        return run_steps(trainer, run, start.progress, metrics=None, reporter=None)
    train, done = trainer.train, start.progress.step
    with (
        MetricsWriter(run, last_step=done) as metrics,
        Reporter(run, steps=train.steps, done=done, log_every=train.log_every) as reporter,
    ):
        _introduce(trainer, reporter, start, world)
        return run_steps(trainer, run, start.progress, metrics=metrics, reporter=reporter)


def _introduce(trainer: Trainer, reporter: Reporter, start: Start, world: World) -> None:
    train = trainer.train
    processes = f"{world.size} processes, " if world.size > 1 else ""
    where = f"{train.precision}, {processes}{trainer.device.type}"
    reporter.say(
        f"{train.kind} {trainer.spec.name}: {trainer.model.plan.program.num_params():,} parameters, "
        f"{train.batch_size} x {train.sequence_length} tokens a step, {where}"
    )
    if start.checkpoint is not None:
        reporter.say(f"going on after step {start.progress.step}")
    if isinstance(trainer.samples, Conversations):
        samples = trainer.samples
        reporter.say(
            f"{len(samples)} conversations; {samples.num_cut} cut to {train.sequence_length + 1} tokens, "
            f"{samples.num_left_out} left out because nothing to learn is within that length"
        )
    for note in trainer.notes:
        reporter.say(note)
    if trainer.held_out is None:
        reporter.say("no evaluation: the data's validation split holds no sample")
