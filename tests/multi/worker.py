"""One process of a world that trains under several plans, one after the other. Requests come in as JSON lines, each
answered with one: what the training told of itself.

python -m tests.multi.worker RANK WORLD RENDEZVOUS_FILE [cpu|cuda|lent]

lent: on CPUs, whose tensor ranks exchange tokens as those on GPUs do.
"""

import hashlib
import json
import sys
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from archwright.compiler.distributed import symmetric
from archwright.compiler.distributed.gathering import Part, gather_all
from archwright.spec import load
from archwright.trainers import loop
from archwright.trainers.batches import IGNORED, Batch, Ids, training_batch
from archwright.trainers.checkpoints import Progress
from archwright.trainers.launch import World, check_world
from archwright.trainers.loop import Trainer, accumulate, assemble_trainer
from archwright.trainers.optimizer import clipping, make_optimizer
from archwright.trainers.run_folder import Start
from tests.compiler.distributed.lent import open_in_files
from tests.multi.plans import BASE

NUM_SAMPLES = 61


class Patterns:
    """Numbered samples with something to learn, of which every third has fewer targets and every fourth none at all.

    Two neighbouring rows in eight have none: a rank of four then has nothing to learn from.
    """

    def __init__(self, vocab_size: int, length: int) -> None:
        self._vocab_size, self._length = vocab_size, length

    def __len__(self) -> int:
        return NUM_SAMPLES

    def batch(self, numbers: Ids, epoch: int) -> Batch:
        rows = [self._row(int(number)) for number in numbers]
        return Batch(ids_BS=np.stack([ids for ids, _ in rows]), targets_BS=np.stack([targets for _, targets in rows]))

    def _row(self, number: int) -> tuple[Ids, Ids]:
        generator = np.random.Generator(np.random.Philox(key=number))
        tokens = np.cumsum(generator.integers(1, 4, self._length + 1)) % self._vocab_size
        targets = tokens[1:].copy()
        if number % 3 == 0:
            targets[: self._length // 2] = IGNORED
        if number % 4 == 0:
            targets[:] = IGNORED
        return tokens[:-1], targets


def run(overrides: dict[str, Any], steps: int, world: World, device: torch.device) -> dict[str, Any]:
    spec = load("preset:tiny", {**BASE, **overrides})
    train = spec.train
    assert train is not None
    degrees = check_world(world, spec)
    start = Start(checkpoint=None, progress=Progress(step=0, tokens=0, data_digest=""))
    samples = Patterns(spec.model.vocab_size, train.sequence_length)
    trainer = assemble_trainer(spec, train, samples, start, degrees, device)
    # Lists of tensors, not one by one: what breaks where plain tensors and DTensors are mixed.
    optimizer = make_optimizer(trainer.model, train.optimizer, foreach=True)
    found: dict[str, Any] = {"losses": [], "norms": [], "gradients": [], "initial": hashes(trainer)}
    groups = {} if trainer.model.mesh is None else trainer.model.mesh.groups
    found["window"] = "tensor" in groups and symmetric.has_window(groups["tensor"])
    for step in range(steps):
        batch = training_batch(samples, train.seed, step, train.batch_size, trainer.share)
        loss, _ = accumulate(trainer, batch)
        if step in (0, steps - 1):
            found["gradients"].append(parts(trainer, lambda name: trainer.model.parameters[name].grad))
        norm, scale = clipping(trainer.model, train.clip_norm)
        optimizer.step(1.0, scale)
        found["norms"].append(norm.item())
        found["losses"].append(loss.item())
    return found


def lend_from(folder: Path) -> None:
    """Open windows in files where a training on GPUs would open them in the GPUs' memory."""
    folder.mkdir(exist_ok=True)

    def opened(group: dist.ProcessGroup) -> None:
        open_in_files(group, folder)

    class _Gpu:
        type = "cuda"

    share = loop._share_memory
    loop._share_memory = lambda spec, degrees, mesh, device: share(spec, degrees, mesh, _Gpu())  # pyright: ignore
    loop.open_window = opened  # pyright: ignore[reportAttributeAccessIssue]


def full(trainer: Trainer, part: Part) -> dict[str, Any]:
    """Full tensors by name, in the first process."""
    names = list(trainer.model.plan.program.params())
    return {name: whole.cpu().numpy() for name, whole in gather_all(trainer.model, part, names) if whole is not None}


def hashes(trainer: Trainer) -> dict[str, str]:
    tensors = full(trainer, lambda name: trainer.model.parameters[name])
    return {name: hashlib.sha256(whole.tobytes()).hexdigest() for name, whole in tensors.items()}


def parts(trainer: Trainer, part: Part) -> dict[str, list[float]]:
    """Full tensors by name, flattened."""
    return {name: whole.reshape(-1).tolist() for name, whole in full(trainer, part).items()}


def main(rank: int, size: int, rendezvous: str, device_type: str = "cpu") -> None:
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if device_type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size > 1:
        store, backend = dist.FileStore(rendezvous, size), "gloo" if device.type == "cpu" else "nccl"
        limit = timedelta(seconds=120 if device.type == "cpu" else 45)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
        # A mesh makes groups, and NCCL's hold memory of the GPU until the process ends.
        loop.make_mesh = cache(loop.make_mesh)
    if device_type == "lent":
        lend_from(Path(rendezvous).with_name(f"lent-{size}"))
    world = World(rank=rank, size=size, local_rank=rank, local_size=size)
    for line in sys.stdin:
        request = json.loads(line)
        answer = run(request["overrides"], request["steps"], world, device)
        if rank == 0:
            Path(request["answer"]).write_text(json.dumps(answer))
        print("done", flush=True)
    if size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
