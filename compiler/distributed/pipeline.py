"""Pipeline parallelism: a rank's stages run its schedule, and hand activations and their gradients on.

b sequences of a micro-batch, S sequence, D hidden.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from archwright.compiler.distributed.apply import ShardedModel
from archwright.compiler.interpreters.torch_module import Form
from archwright.compiler.schedules import Action, schedule

Tensor = torch.Tensor
Piece = tuple[Tensor, Tensor]
"""ids [b, S] and targets [b, S] of a micro-batch; all of one shape."""


@dataclass(kw_only=True)
class _Edge:
    """A channel to one neighbour in one direction, with communicators of its own: what is sent arrives in order.

    One communicator for both directions would wait for itself where two neighbours send to each other.
    """

    group: dist.ProcessGroup
    peer: int
    sent: list[tuple[dist.Work, Tensor]] = field(default_factory=list[tuple[dist.Work, Tensor]])

    def send(self, tensors: Iterable[Tensor]) -> None:
        """Does not wait; tensors stay alive until they have left."""
        self.sent = [(work, tensor) for work, tensor in self.sent if not work.is_completed()]
        for tensor in tensors:
            tensor = tensor.detach().contiguous()
            work = dist.isend(tensor, self.peer, group=self.group)
            assert work is not None
            self.sent.append((work, tensor))

    def receive(self, forms: Iterable[Form], device: torch.device) -> list[Tensor]:
        received = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in forms]
        for tensor in received:
            dist.recv(tensor, self.peer, group=self.group)
        return received

    def flush(self) -> None:
        for work, _ in self.sent:
            work.wait()
        self.sent.clear()


class Pipeline:
    """Runs the micro-batches of a step through all stages of a model. Every rank of the mesh makes one, once."""

    def __init__(self, model: ShardedModel, kind: str) -> None:
        """kind: of the schedule."""
        mesh = model.mesh
        assert mesh is not None and mesh.degrees.pipeline > 1
        self._model, self._kind = model, kind
        self._ranks, self._rank = mesh.degrees.pipeline, mesh.ranks["pipeline"]
        column = mesh.degrees.world // self._ranks
        place = dist.get_rank() % column
        after, before = ((self._rank + step) % self._ranks * column + place for step in (1, -1))
        # The sources of what is handed on: the last rank is none, unless it has further stages before it.
        sources = range(self._ranks - (model.plan.degrees.stages_per_rank == 1))
        columns = [[rank * column + first for rank in range(self._ranks)] for first in range(column)]
        # (backward, incoming) → channel. Two ranks that send to each other do so in groups of their own, even and odd.
        self._edges: dict[tuple[bool, bool], _Edge] = {}
        for backward in (False, True):
            for odd in sorted({source % 2 for source in sources}):
                group, _ = dist.new_subgroups_by_enumeration(columns)
                assert isinstance(group, dist.ProcessGroup)
                for source, incoming in ((self._rank, False), ((self._rank - 1) % self._ranks, True)):
                    if source in sources and source % 2 == odd:
                        peer = before if incoming else after
                        self._edges[backward, incoming != backward] = _Edge(group=group, peer=peer)

    def train(self, pieces: Sequence[Piece], total: Tensor) -> Tensor:
        """Gradients of the summed loss / total. Gives that loss, of this rank's tokens; 0 without the last stage."""
        loss = torch.zeros((), dtype=torch.float64, device=self._model.options.device)
        inputs: dict[tuple[int, int], Any] = {}
        outputs: dict[tuple[int, int], Any] = {}
        actions = schedule(
            self._kind, ranks=self._ranks, stages_per_rank=self._model.plan.degrees.stages_per_rank,
            micro_batches=len(pieces), rank=self._rank,
        )  # fmt: skip
        for action in actions:
            key = (action.stage, action.micro_batch)
            if not action.backward:
                inputs[key], y = self._forward(action.stage, pieces[action.micro_batch])
                if self._is_last(action.stage):
                    y = y[0] / total
                    loss += y.detach()
                outputs[key] = y
            else:
                self._set_last(action, len(pieces))
                self._backward(action.stage, inputs.pop(key), outputs.pop(key))
        self._flush()
        return loss

    @torch.no_grad()
    def evaluate(self, pieces: Sequence[Piece]) -> Tensor:
        """The summed loss of this rank's tokens, 0 where the last stage is not here."""
        loss = torch.zeros((), dtype=torch.float64, device=self._model.options.device)
        for piece in pieces:
            for stage in self._model.stages:
                _, y = self._forward(stage, piece)
                if self._is_last(stage):
                    loss += y[0]
        self._flush()
        return loss

    def _is_last(self, stage: int) -> bool:
        return stage == len(self._model.plan.stages) - 1

    def _forward(self, stage: int, piece: Piece) -> tuple[Any, Any]:
        """The input of a stage and its output, which is sent on."""
        ids_bS, targets_bS = piece
        module = self._model.stages[stage]
        x = ids_bS
        if stage > 0:
            received = self._edges[False, True].receive(module.handed_on(ids_bS), ids_bS.device)
            x = _joined([tensor.requires_grad_(torch.is_grad_enabled()) for tensor in received])
        y = module(x, targets_bS)
        if not self._is_last(stage):
            self._edges[False, False].send(_split(y))
        return x, y

    def _backward(self, stage: int, x: Any, y: Any) -> None:
        if self._is_last(stage):
            y.backward()
        else:
            outputs = _split(y)
            forms = [(each.shape, each.dtype) for each in outputs]
            torch.autograd.backward(outputs, self._edges[True, True].receive(forms, outputs[0].device))
        if stage > 0:
            self._edges[True, False].send([tensor.grad for tensor in _split(x) if tensor.grad is not None])

    def _set_last(self, action: Action, micro_batches: int) -> None:
        """FSDP adds up the gradients of the ranks once, in the last backward of a stage."""
        module = self._model.stages[action.stage]
        if isinstance(module, FSDPModule):
            last = action.micro_batch == micro_batches - 1
            module.set_is_last_backward(last)
            module.set_reshard_after_backward(last)
            module.set_requires_gradient_sync(last)

    def _flush(self) -> None:
        for edge in self._edges.values():
            edge.flush()


def _split(stream: Any) -> list[Tensor]:
    return [stream] if isinstance(stream, Tensor) else list(stream)


def _joined(tensors: list[Tensor]) -> Any:
    return tensors[0] if len(tensors) == 1 else tuple(tensors)
