"""Worlds of processes: joining one that torchrun made, and making one on this machine."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archwright.compiler.ir import Degrees
from archwright.compiler.passes import degrees_of
from archwright.spec import ArchwrightError, Spec
from archwright.spec.checks import check_values

_LOCAL = "ARCHWRIGHT_LOCAL_WORKER"
_GRACE_S = 10.0
_TELL_S = 2.0
_POLL_S = 0.05


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among those that train together. local_rank, local_size: among those of this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def main(self) -> bool:
        """Whether this process writes files and lines."""
        return self.rank == 0


def world_of(environment: Mapping[str, str]) -> World | None:
    """The world that torchrun (or `run_workers`) put this process into; None outside of one."""
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return None
    rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    return World(
        rank=rank,
        size=size,
        local_rank=int(environment.get("LOCAL_RANK", rank)),
        local_size=int(environment.get("LOCAL_WORLD_SIZE", size)),
    )


def check_world(world: World, spec: Spec) -> Degrees:
    """The mesh that `world` makes.

    Raises ArchwrightError TRAIN007 where the degrees do not multiply to its size, and a rule's code (SPEC0nn) where
    the degree that `auto` becomes breaks it.
    """
    parallel = spec.parallel
    degrees = degrees_of(parallel, world.size)
    autos = {axis: degree for axis, degree in degrees.sizes.items() if getattr(parallel, axis) == "auto"}
    if degrees.world == world.size:
        check_values(spec.model_copy(update={"parallel": parallel.model_copy(update=autos)}))
        return degrees
    least = degrees_of(parallel).world
    near = max(1, world.size // least) * least if autos else least
    raise ArchwrightError(
        "TRAIN007",
        f"{world.size} processes were started, `parallel` needs {'a multiple of ' if autos else ''}{least}",
        where="parallel",
        help=f"start torchrun with --nproc-per-node {near}, or run `archwright train` without torchrun",
    )


def num_gpus() -> int:
    """NVIDIA GPUs that this process may use, without loading torch: CUDA_VISIBLE_DEVICES, else the driver's devices."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is not None:
        return len([each for each in shown.split(",") if each.strip() not in ("", "-1")])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def run_workers(number: int, command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run `archwright COMMAND` in `number` processes of one world here; the exit status of the first that fails.

    All end when one fails, when this process is interrupted, and when it dies, however it dies: the workers hold one
    end of a pipe to it (their standard input).
    """
    program = [sys.executable, "-c", "import sys; from archwright.spec.cli import main; sys.exit(main())", *command]
    workers: list[subprocess.Popen[bytes]] = []
    with reserved_port() as port:
        try:
            for variables in _environments(number, environment, port):
                # A session of its own: Ctrl-C reaches this process only, which then ends the workers.
                workers.append(subprocess.Popen(program, env=variables, stdin=subprocess.PIPE, start_new_session=True))
            return _wait(workers)
        finally:
            _end(workers)


@contextmanager
def reserved_port() -> Generator[int]:
    """A free port for the first worker to listen at, seconds from now.

    The system gives a port that has a socket to nobody who asks for any port, while one who asks for this one, and
    shares addresses as torch does, may have it as long as our socket does not listen.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("", 0))
        yield holder.getsockname()[1]


def _environments(number: int, environment: Mapping[str, str], port: int) -> list[dict[str, str]]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shared = {
        "OMP_NUM_THREADS": str(max(1, cores // number)),  # the default, all cores to each, is several times slower
        **environment,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(number),
        "LOCAL_WORLD_SIZE": str(number),
        _LOCAL: "1",
    }
    if sys.platform == "linux":
        shared.setdefault("GLOO_SOCKET_IFNAME", "lo")  # gloo asks for the host's name otherwise, which may not resolve
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number)]


def _wait(workers: list[subprocess.Popen[bytes]]) -> int:
    while all(worker.poll() in (None, 0) for worker in workers):
        if all(worker.poll() == 0 for worker in workers):
            return 0
        time.sleep(_POLL_S)
    for rank, worker in enumerate(workers):
        if worker.returncode is not None and worker.returncode < 0:
            print(f"archwright: the process of rank {rank} was ended by signal {-worker.returncode}", file=sys.stderr)
            return 3
    failed = next(worker.returncode for worker in workers if worker.returncode not in (None, 0))
    # The mistake is every worker's, and the first one is to tell it: give it the time.
    deadline = time.monotonic() + _TELL_S
    while workers[0].poll() is None and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return workers[0].returncode or failed


def _end(workers: list[subprocess.Popen[bytes]]) -> None:
    for worker in workers:
        worker.terminate()
    deadline = time.monotonic() + _GRACE_S
    for worker in workers:
        try:
            worker.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
        if worker.stdin is not None:
            worker.stdin.close()


def watch_parent(environment: Mapping[str, str]) -> None:
    """In a worker of `run_workers`: end this process as soon as the one that started it is gone."""
    if environment.get(_LOCAL) != "1":
        return

    def wait() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=wait, name="watch-parent", daemon=True).start()


def join(world: World, device_type: str) -> None:
    """Make the process group of `world`: nccl on GPUs, gloo on CPUs. Nothing on one process."""
    if world.size > 1:
        import torch.distributed as dist

        dist.init_process_group("nccl" if device_type == "cuda" else "gloo", rank=world.rank, world_size=world.size)


def leave(world: World) -> None:
    if world.size > 1:
        import torch.distributed as dist

        dist.destroy_process_group()


def lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another process has gone. gloo says so in words only."""
    return any(words in str(error) for words in ("Connection closed by peer", "Connection reset by peer"))


def share(world: World, value: Any) -> Any:
    """The value of the first rank, in every rank."""
    if world.size == 1:
        return value
    import torch.distributed as dist

    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
