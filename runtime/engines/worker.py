"""A rank in a process of its own: messages come through stdin, answers go out through stdout.

    python -m archwright.runtime.engines.worker --rank 1 --world 2 --rendezvous FILE --machine MODULE:FUNCTION

The function gets the rank's `Place`, the size of the world and the rendezvous, and gives the rank's device and peers.
"""

import argparse
import importlib
import os
import queue
import sys
import threading
from collections.abc import Callable
from typing import Any, BinaryIO

from archwright.runtime.engines.device import Place
from archwright.runtime.engines.mailbox import Message, failure, read_message, write_message
from archwright.runtime.engines.ranks import RankServer


def main() -> None:
    args = argparse.ArgumentParser()
    args.add_argument("--rank", type=int, required=True)
    args.add_argument("--world", type=int, required=True)
    args.add_argument("--rendezvous", required=True)
    args.add_argument("--machine", required=True)
    chosen = args.parse_args()
    # What libraries print goes to stderr; the answers have a descriptor of their own.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    module, _, name = chosen.machine.partition(":")

    def machine(place: Place) -> Any:
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return function(place, chosen.world, chosen.rendezvous)

    _serve(RankServer(machine), _messages(sys.stdin.buffer), answers)


def _messages(stream: BinaryIO) -> "queue.Queue[Message]":
    """Read in a thread: when the parent has gone, a rank that waits in a collective must end too."""
    received: queue.Queue[Message] = queue.Queue()

    def read() -> None:
        while (message := read_message(stream)) is not None:
            received.put(message)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return received


def _serve(server: RankServer, received: "queue.Queue[Message]", answers: BinaryIO) -> None:
    while True:
        message = received.get()
        try:
            answer = server.handle(message)
        except Exception as error:
            answer = failure(error)
        write_message(answers, answer)


if __name__ == "__main__":
    main()
