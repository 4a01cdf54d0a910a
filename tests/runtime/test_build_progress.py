"""What `build` shows: a bar on a terminal, lines elsewhere."""

import io

import pytest

from archwright.compiler.targets.tensorrt_progress import Phase
from archwright.runtime.build_progress import reporter_to

PHASES = [Phase(name="Building engine", done=done, steps=3) for done in range(3)]
END = Phase(name="Building engine", done=3, steps=None)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_a_line_a_step() -> None:
    stream = io.StringIO()
    with reporter_to(stream) as reporter:
        reporter.say("writing")
        for phase in (*PHASES, END):
            reporter.watch(phase)
    steps = [f"build: TensorRT: building engine, step {done} of 3\n" for done in (1, 2)]
    assert stream.getvalue() == "build: writing\n" + "".join(steps)


@pytest.mark.parametrize("failure", [None, KeyboardInterrupt])
def test_a_terminal_gets_a_bar_and_its_cursor_back(
    failure: type[BaseException] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    try:
        with reporter_to(stream) as reporter:
            for phase in PHASES:
                reporter.watch(phase)
            if failure is not None:
                raise failure
            reporter.watch(END)
            reporter.say("done")
    except KeyboardInterrupt:
        pass
    shown = stream.getvalue()
    assert "Building engine" in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
    assert ("build: done" in shown) == (failure is None)
