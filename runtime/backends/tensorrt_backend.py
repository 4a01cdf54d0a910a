"""Artifacts through their TensorRT engines. B batch, S sequence, L visible cache positions, V vocabulary."""

import itertools
import weakref
from dataclasses import dataclass

import numpy as np

from archwright.compiler.targets.gpus import visible_gpus
from archwright.compiler.targets.tensorrt_loader import load_tensorrt
from archwright.runtime.artifact import Artifact
from archwright.runtime.backends.base import Backend, Ids, Logits
from archwright.runtime.backends.onnxruntime_backend import bucketed
from archwright.runtime.engines.binding import read_bindings
from archwright.runtime.engines.mailbox import Message
from archwright.runtime.engines.opening import Engines, carries_host_code, check_machine, find_engines, rebuild
from archwright.runtime.engines.rank import StepInputs
from archwright.runtime.engines.ranks import Ranks
from archwright.spec import ArchwrightError


@dataclass(frozen=True, eq=False)
class EngineCache:
    """Caches of the same number on every rank."""

    number: int


class TensorRTBackend(Backend[EngineCache]):
    """The ranks of an artifact, which compute in lockstep. The next token is chosen once, from what this gives: ranks
    that chose on their own would go apart, and hang in the next collective.
    """

    def __init__(self, engines: Engines, ranks: Ranks) -> None:
        """Opens the engines on the ranks. Raises ArchwrightError RUN044 to RUN048."""
        self._ranks, self._profiles = ranks, engines.profiles
        self.tables = [read_bindings(file.graph) for file in engines.files]
        self.stages, self.per_stage = engines.stages, engines.per_stage
        last = self.tables[-1]
        vocab_size = last.given.dims[-1]
        assert last.gives_logits and isinstance(vocab_size, int), "the last stage gives logits of one size"
        self.vocab_size, self.capacity, self._last_only = vocab_size, last.capacity, last.last_only
        self.max_batch = engines.artifact.max_batch
        self._longest = max(profile.positions.max for profile in self._profiles)
        weakref.finalize(self, ranks.close)
        answers = ranks.open(open_messages(engines))
        self._numbers = itertools.count()
        self._unused: list[int] = []
        title = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT for RTX"}[engines.facts["library"]]
        world = len(engines.files)
        self.description = (
            f"{title} {engines.facts['version']}, {engines.artifact.precision}, "
            f"{world} rank{'s' if world > 1 else ''} on {answers[0].fields['device']}"
        )

    def new_cache(self, batch: int, positions: int) -> EngineCache:
        assert positions <= self.capacity, "the caches of an engine have one size"
        cache = EngineCache(next(self._numbers))
        free, self._unused = self._unused, []
        self._ranks.new_cache(cache.number, batch, free)
        weakref.finalize(cache, self._unused_later, cache.number).atexit = False
        return cache

    def _unused_later(self, number: int) -> None:
        """Freed at the next call: a finalizer may run in the middle of one."""
        self._unused.append(number)

    def forward(self, cache: EngineCache, ids_BS: Ids, positions_BS: Ids, write_index_B: Ids, visible: int) -> Logits:
        """In pieces of at most the longest sequence of a profile, which the cache makes exact."""
        size = 1 if self._last_only else max(profile.sequence.max for profile in self._profiles)
        pieces = [
            self.outputs(
                cache,
                ids_BS[:, start : start + size],
                positions_BS[:, start : start + size],
                write_index_B + start,
                visible,
            )[-self.per_stage]
            for start in range(0, ids_BS.shape[1], size)
        ]
        found = [piece for piece in pieces if piece is not None]
        assert len(found) == len(pieces), "the first rank of the last stage answers with logits"
        return np.concatenate(found, axis=1)

    def forward_last(
        self, cache: EngineCache, ids_BS: Ids, positions_BS: Ids, write_index_B: Ids, visible: int, index_B: Ids
    ) -> Logits:
        if not self._last_only:
            return super().forward_last(cache, ids_BS, positions_BS, write_index_B, visible, index_B)
        size, length = max(profile.sequence.max for profile in self._profiles), ids_BS.shape[1]
        last_BV = np.empty((len(ids_BS), self.vocab_size), np.float32)
        for start in range(0, length, size):
            stop = min(start + size, length)
            logits_B1V = self.outputs(
                cache,
                ids_BS[:, start:stop],
                positions_BS[:, start:stop],
                write_index_B + start,
                visible,
                index_B=np.clip(index_B - start, 0, stop - start - 1),
            )[-self.per_stage]
            assert logits_B1V is not None, "the first rank of the last stage answers with logits"
            here_B = (start <= index_B) & (index_B < stop)
            last_BV[here_B] = logits_B1V[here_B, 0]
        return last_BV

    def outputs(
        self,
        cache: EngineCache,
        ids_BS: Ids,
        positions_BS: Ids,
        write_index_B: Ids,
        visible: int,
        *,
        index_B: Ids | None = None,
        all_ranks: bool = False,
    ) -> list[Logits | None]:
        """One step; what each rank gave: `hidden`, or logits [B, S, V], or [B, 1, V] of the tokens `index_B`, where
        engines give those of one token a row (by default the last)."""
        inputs = StepInputs(
            ids_BS=ids_BS,
            positions_BS=positions_BS,
            write_index_B=write_index_B,
            visible=min(bucketed(visible, self.capacity), max(visible, self._longest)),
            logit_index_B=np.full(len(ids_BS), ids_BS.shape[1] - 1) if index_B is None else index_B,
        )
        return self._ranks.step(cache.number, inputs, all_outputs=all_ranks)

    def close(self) -> None:
        self._ranks.close()


def open_messages(engines: Engines) -> list[Message]:
    """What each rank is told first."""
    return [
        Message(
            kind="open",
            fields={
                "rank": file.rank,
                "stages": engines.stages,
                "per_stage": engines.per_stage,
                "graph": str(file.graph),
                "engine": str(file.path),
                "sha256": file.sha256,
                "profiles": file.facts["profiles"],
                "library": file.facts["library"],
                "host_code": carries_host_code(file.facts),
                "rebuild": rebuild(engines.artifact),
            },
        )
        for file in engines.files
    ]


def usable_engines(artifact: Artifact) -> Engines:
    """The engines of an artifact, where they can run here.

    Raises ArchwrightError RUN040 to RUN044, or BUILD001 without TensorRT.
    """
    engines = find_engines(artifact)
    check_machine(engines, load_tensorrt(engines.facts["library"]), visible_gpus())
    return engines


def open_tensorrt(artifact: Artifact, device: str, precision: str) -> TensorRTBackend:
    """Open the engines of an artifact, each in a process of its own where there are several.

    Raises ArchwrightError RUN021, RUN022, RUN040 to RUN048, or BUILD001 without TensorRT.
    """
    if device not in ("auto", "cuda"):
        help = "use auto or cuda: rank r runs on GPU r, and CUDA_VISIBLE_DEVICES chooses among the GPUs"
        raise ArchwrightError("RUN021", f"engines do not run on `{device}`", where=str(artifact.path), help=help)
    if precision not in ("auto", artifact.precision):
        message = f"the engines are {artifact.precision}, not {precision}"
        raise ArchwrightError("RUN022", message, where=str(artifact.path), help="leave the precision out")
    engines = usable_engines(artifact)
    from archwright.runtime.engines.processes import start_ranks

    return TensorRTBackend(engines, start_ranks(len(engines.files)))
