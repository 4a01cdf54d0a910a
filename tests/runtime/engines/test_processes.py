"""Ranks in processes: messages, groups and hand-offs are the real ones, through gloo; engines and memory are fakes."""

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from archwright.runtime.engines.mailbox import Message, read_message, write_message
from archwright.runtime.engines.processes import ProcessMailbox
from archwright.runtime.engines.ranks import Ranks
from archwright.spec import ArchwrightError
from tests.runtime.engines.conftest import Rig
from tests.runtime.engines.test_execution import OTHERS, PROMPTS, TOKENS, expected

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.heavy
def test_processes_give_the_oracles_tokens(rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two stages."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    made = rig(stages=2, processes=True)
    model = made.open()
    found = [[a.tokens for a in model.generate(prompts, max_tokens=TOKENS)] for prompts in (PROMPTS, OTHERS)]
    assert found == expected(made)


def test_a_message_comes_back_as_it_was() -> None:
    stream = io.BytesIO()
    sent = Message(kind="step", fields={"visible": 3}, arrays={"a": np.arange(6).reshape(2, 3), "b": np.float32([[]])})
    write_message(stream, sent)
    stream.seek(0)
    read = read_message(stream)
    assert read is not None and (read.kind, read.fields) == (sent.kind, sent.fields)
    for name, array in sent.arrays.items():
        np.testing.assert_array_equal(read.arrays[name], array)
    assert read_message(stream) is None


def test_a_process_that_ends_is_an_error() -> None:
    ranks = Ranks([ProcessMailbox([sys.executable, "-c", "import sys; sys.exit(7)"])])
    with pytest.raises(ArchwrightError, match="rank0: RUN048 the rank's process ended with status 7"):
        ranks.open([Message(kind="open")])


@pytest.mark.parametrize("words", ["import time; time.sleep(60)", "import sys; sys.stdin.read()"])
def test_a_process_that_hangs_is_ended(words: str) -> None:
    mailbox = ProcessMailbox([sys.executable, "-c", words])
    ranks = Ranks([mailbox], open_timeout_s=0.5)
    with pytest.raises(ArchwrightError, match=r"RUN048 rank 0 did not answer `open` within 0\.5 s"):
        ranks.open([Message(kind="open")])
    assert mailbox._process.poll() is not None


def test_a_worker_ends_with_its_parent(tmp_path: Path) -> None:
    """It reads until stdin ends, even while it waits for a rank that never comes."""
    command = [sys.executable, "-m", "archwright.runtime.engines.worker", "--rank", "0", "--world", "2"]
    command += ["--rendezvous", str(tmp_path / "rendezvous"), "--machine", "time:sleep"]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert worker.stdin is not None
    worker.stdin.close()
    assert worker.wait(60) == 0
