"""All ranks of an artifact as one: each does the same calls in the same order, and one that hangs is an error."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from archwright.runtime.engines.binding import read_bindings
from archwright.runtime.engines.device import Device, Peers, Place
from archwright.runtime.engines.mailbox import Mailbox, Message, raise_failure
from archwright.runtime.engines.opening import read_engine
from archwright.runtime.engines.rank import Rank, StepInputs
from archwright.spec import ArchwrightError
from archwright.spec.models import Profile

Array = NDArray[Any]
Machine = Callable[[Place], tuple[Device, Peers]]
"""Gives a rank its device and its way to the other ranks."""

OPEN_TIMEOUT_S = 600.0
"""Engines of some ten GB are read and loaded in this time."""
STEP_TIMEOUT_S = 120.0
_POLL_S = 0.002
_INPUTS = ("ids", "positions", "write_index", "logit_index")


class RankServer:
    """Answers the messages of one rank: `open`, `new_cache`, `step`."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._rank: Rank | None = None

    def handle(self, message: Message) -> Message:
        fields = message.fields
        if message.kind == "open":
            return self._open(fields)
        rank = self._rank
        assert rank is not None, "`open` comes first"
        if message.kind == "new_cache":
            for number in fields["free"]:
                rank.free_cache(number)
            rank.new_cache(fields["number"], fields["batch"])
            return Message(kind="done")
        assert message.kind == "step", message.kind
        inputs = StepInputs(
            **{f"{name}_B" + "S" * (name in ("ids", "positions")): message.arrays[name] for name in _INPUTS},
            visible=fields["visible"],
        )
        rank.step(fields["number"], inputs)
        wanted = fields["outputs"] == "all" or rank.place.rank == (rank.place.stages - 1) * rank.place.per_stage
        return Message(kind="done", arrays={"output": rank.output(inputs)} if wanted else {})

    def _open(self, fields: dict[str, Any]) -> Message:
        place = Place(rank=fields["rank"], stages=fields["stages"], per_stage=fields["per_stage"])
        content = read_engine(Path(fields["engine"]), fields["sha256"], fields["rebuild"])
        device, peers = self._machine(place)
        self._rank = Rank(
            place=place,
            table=read_bindings(Path(fields["graph"])),
            engine=device.deserialize(content, library=fields["library"], host_code=fields["host_code"]),
            device=device,
            peers=peers,
            profiles=tuple(Profile.model_validate(profile) for profile in fields["profiles"]),
        )
        return Message(kind="done", fields={"device": device.description})


@dataclass
class Ranks:
    """The mailboxes of all ranks, in their order."""

    mailboxes: Sequence[Mailbox]
    step_timeout_s: float = STEP_TIMEOUT_S
    open_timeout_s: float = OPEN_TIMEOUT_S
    _broken: bool = False

    def open(self, messages: Sequence[Message]) -> list[Message]:
        """Each rank opens its engine."""
        return self._call(messages, self.open_timeout_s)

    def new_cache(self, number: int, batch: int, free: Sequence[int]) -> None:
        """A cache on every rank. free: the numbers of those that are used no more."""
        message = Message(kind="new_cache", fields={"number": number, "batch": batch, "free": list(free)})
        self._call([message] * len(self.mailboxes), self.step_timeout_s)

    def step(self, number: int, inputs: StepInputs, *, all_outputs: bool = False) -> list[Array | None]:
        """What each rank gave in float32: of the first rank of the last stage, or of all."""
        arrays = {
            "ids": inputs.ids_BS,
            "positions": inputs.positions_BS,
            "write_index": inputs.write_index_B,
            "logit_index": inputs.logit_index_B,
        }
        fields = {"number": number, "visible": inputs.visible, "outputs": "all" if all_outputs else "logits"}
        message = Message(
            kind="step", fields=fields, arrays={name: np.asarray(x, np.int64) for name, x in arrays.items()}
        )
        answers = self._call([message] * len(self.mailboxes), self.step_timeout_s)
        return [answer.arrays.get("output") for answer in answers]

    def close(self) -> None:
        for mailbox in self.mailboxes:
            mailbox.close()

    def _call(self, messages: Sequence[Message], timeout_s: float) -> list[Message]:
        """Post to all, and wait for all: a rank that failed lets the others wait in a collective for ever.

        Raises what a rank raised, or ArchwrightError RUN048 for one that does not answer; after either all is closed.
        """
        if self._broken:
            help = "open the artifact again"
            raise ArchwrightError("RUN048", "the ranks were ended after an earlier failure", help=help)
        try:
            return self._exchange(messages, timeout_s)
        except BaseException:  # also Ctrl-C: an answer that nobody took would be the next call's
            self._broken = True
            self.close()
            raise

    def _exchange(self, messages: Sequence[Message], timeout_s: float) -> list[Message]:
        for mailbox, message in zip(self.mailboxes, messages, strict=True):
            mailbox.post(message)
        answers: dict[int, Message] = {}
        deadline = time.monotonic() + timeout_s
        waiting = set(range(len(self.mailboxes)))
        while waiting:
            for rank in sorted(waiting):
                answer = self.mailboxes[rank].take(_POLL_S if rank == min(waiting) else 0)
                if answer is not None:
                    waiting.discard(rank)
                    answers[rank] = answer
                    if answer.kind == "error":
                        raise_failure(answer, rank)
            if waiting and time.monotonic() > deadline:
                raise _silent(sorted(waiting), messages[0].kind, timeout_s)
        return [answers[rank] for rank in range(len(self.mailboxes))]


def _silent(ranks: Sequence[int], kind: str, timeout_s: float) -> ArchwrightError:
    who = ", ".join(f"rank {rank}" for rank in ranks)
    return ArchwrightError(
        "RUN048",
        f"{who} did not answer `{kind}` within {timeout_s:g} s",
        help="ranks wait for each other in collectives: one whose communicator or engine is another's lets all hang; "
        "`archwright verify --on-target` says more, and NCCL_DEBUG=INFO shows NCCL's view",
    )
