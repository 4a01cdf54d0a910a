"""Worlds of processes that wait for plans to train: through gloo, on GPUs through NCCL."""

import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.multi.plans import MESHES, MODELS, Overrides

MOST = 4
LIMIT_S = 900.0
ROOT = Path(__file__).resolve().parents[2]


class World:
    """`size` processes; see `tests/multi/worker.py`."""

    def __init__(self, size: int, folder: Path, device: str) -> None:
        self._answer = folder / f"answer-{size}.json"
        command = [sys.executable, "-m", "tests.multi.worker"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        self._processes = [
            subprocess.Popen(
                [*command, str(rank), str(size), str(folder / f"rendezvous-{size}"), device],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, env=environment, text=True,
            )
            for rank in range(size)
        ]  # fmt: skip

    def train(self, overrides: Overrides, steps: int) -> dict[str, Any]:
        """What a training tells of itself. A process that fails ends the world, and the test with it."""
        request = json.dumps({"overrides": overrides, "steps": steps, "answer": str(self._answer)})
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(request + "\n")
            process.stdin.flush()
        # In the order in which they answer: where one fails, the others wait for it.
        waiting = {process.stdout: rank for rank, process in enumerate(self._processes) if process.stdout is not None}
        while waiting:
            ready, _, _ = select.select([*waiting], [], [], LIMIT_S)
            assert ready, f"ranks {[*waiting.values()]} of {len(self._processes)} did not answer"
            for output in ready:
                rank = waiting.pop(output)
                assert output.readline() == "done\n", f"rank {rank} of {len(self._processes)} failed"
        return json.loads(self._answer.read_text())

    def close(self) -> None:
        for process in self._processes:
            with process:  # closes its pipes
                process.kill()


class Worlds:
    """Worlds by their number of processes, started when they are first needed, of MOST processes together."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self._folder, self._device = folder, device
        self._worlds: dict[int, World] = {}
        self._known: dict[tuple[str, str, int], dict[str, Any]] = {}

    def train(self, model: str, mesh: str, steps: int, **more: object) -> dict[str, Any]:
        """The training of a model on a mesh, done once. more: overrides, with `__` for dots."""
        key = (model, mesh + json.dumps(more), steps)
        if key not in self._known:
            settings = {name.replace("__", "."): value for name, value in more.items()}
            overrides = {**MODELS[model], **MESHES[mesh].settings, **settings}
            size = MESHES[mesh].processes
            try:
                self._known[key] = self._of(size).train(overrides, steps)
            except BaseException:
                self._end(size)  # the next plan starts afresh
                raise
        return self._known[key]

    def _of(self, size: int) -> World:
        if size not in self._worlds:
            while self._worlds and sum(self._worlds) + size > MOST:
                self._end(max(self._worlds))
            self._worlds[size] = World(size, self._folder, self._device)
        return self._worlds[size]

    def _end(self, size: int) -> None:
        self._worlds.pop(size).close()
        (self._folder / f"rendezvous-{size}").unlink(missing_ok=True)

    def close(self) -> None:
        for size in [*self._worlds]:
            self._end(size)
