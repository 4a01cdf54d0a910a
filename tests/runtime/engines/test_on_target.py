"""`archwright verify --on-target`, with engines that compute in NumPy: what passes, what fails, what is missing."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load as safetensors_load
from safetensors.numpy import save

from archwright.compiler.targets.tensorrt_loader import load_tensorrt
from archwright.runtime.backends import tensorrt_backend
from archwright.runtime.engines.device import Array
from archwright.runtime.engines.opening import find_engines
from archwright.runtime.engines.probe import PROBE, make_probe, read_probe, write_probe
from archwright.runtime.on_target import verify_on_target
from archwright.runtime.verification import Report
from archwright.spec import ArchwrightError
from archwright.spec.cli import main
from tests.runtime.engines.conftest import Rig, engines_of_weights, in_threads
from tests.runtime.engines.fake import World


def on_target(folder: Path, world: World) -> Report:
    return verify_on_target(folder, find=find_engines, start=in_threads(world))


def test_engines_that_compute_what_the_spec_says_pass(engines_of: Callable[..., Path]) -> None:
    folder = engines_of()
    world = engines_of_weights(folder)
    report = on_target(folder, world)
    assert report.ok, report.as_text()
    names = [check.name for check in report.checks if check.error is not None]
    assert names == ["rank 0, whole sequences", "rank 1, whole sequences", "prefill and decode"]
    assert all(check.error < 2e-6 for check in report.checks if check.error is not None)
    assert "5 steps, 12 of 12 most likely tokens are the oracle's" in report.as_text()
    assert all(engine.device.replays > 0 for engine in world.engines), "captured steps are part of the check"
    assert json.dumps(report.as_json())


@pytest.mark.parametrize("rank", [0, 1])
def test_an_engine_that_computes_something_else_fails(engines_of: Callable[..., Path], rank: int) -> None:
    folder = engines_of()
    world = engines_of_weights(folder)
    weights = world.engines[rank].weights
    world.engines[rank].weights = dict(weights) | {"model.norm.weight": 1.01 * weights["model.norm.weight"]}
    report = on_target(folder, world)
    failed = {check.name for check in report.checks if check.result == "failed"}
    # Ranks end with the logits each for itself; rank 0's are those that tokens are chosen from.
    assert failed == {f"rank {rank}, whole sequences"} | ({"prefill and decode"} if rank == 0 else set())
    assert report.problems()[0].startswith(f"VERIFY020 rank {rank}, whole sequences: the error is ")


def test_a_stage_that_is_wrong_is_named(rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three stages the second: what it hands on differs, and so does all that follows."""
    from archwright.runtime.backends.tensorrt_backend import TensorRTBackend
    from archwright.runtime.on_target import whole_errors

    made = rig(stages=3, layers=3)
    probe = make_probe(made.plan, made.weights, max_batch=3, capacity=40)
    backend = TensorRTBackend(made.engines, made.ranks)
    assert max(whole_errors(backend, probe)) < 2e-6
    weights = dict(made.world.engines[1].weights)
    made.world.engines[1].weights = {name: 1.1 * array for name, array in weights.items()}
    first, second, third = whole_errors(backend, probe)
    assert first < 2e-6 < 1e-3 < min(second, third)


def test_a_probe_is_read_as_it_was_written(rig: Callable[..., Rig], tmp_path: Path) -> None:
    made = rig(stages=2)
    probe = make_probe(made.plan, made.weights, max_batch=3, capacity=40)
    assert [output.shape for output in probe.outputs] == [(2, 12, 24), (2, 12, 61)]
    np.testing.assert_allclose(probe.outputs[-1], made.oracle(probe.ids_BT), rtol=1e-5, atol=1e-5)
    write_probe(tmp_path, probe)
    content = (tmp_path / PROBE).read_bytes()
    write_probe(tmp_path, probe)
    assert (tmp_path / PROBE).read_bytes() == content
    read = read_probe(tmp_path, 2, made.spec.model)
    for found, wanted in zip((read.ids_BT, *read.outputs), (probe.ids_BT, *probe.outputs), strict=True):
        np.testing.assert_array_equal(found, wanted)
    with pytest.raises(ArchwrightError, match="VERIFY020 there is no probe of 3 stages"):
        read_probe(tmp_path, 3, made.spec.model)


@pytest.mark.parametrize(
    ("name", "array", "told"),
    [
        ("ids", np.full((2, 12), 61), "outside the vocabulary of 61"),
        ("ids", np.full((2, 12), -1), "outside the vocabulary of 61"),
        ("ids", np.zeros((2, 12), np.float32), "its ids are float32"),
        ("ids", np.zeros(12, np.int64), "its ids are int64"),
        ("ids", np.zeros((0, 12), np.int64), "its ids are int64"),
        ("logits", np.zeros((2, 12, 60), np.float32), "values of"),
        ("hidden.0", np.zeros((2, 11, 24), np.float32), "values of"),
    ],
)
def test_a_probe_of_something_else_is_refused(
    rig: Callable[..., Rig], tmp_path: Path, name: str, array: Array, told: str
) -> None:
    """Whoever writes one writes its hash, too; a token that the embedding lacks would be read from elsewhere."""
    made = rig(stages=2)
    write_probe(tmp_path, make_probe(made.plan, made.weights, max_batch=3, capacity=40))
    (tmp_path / PROBE).write_bytes(save(safetensors_load((tmp_path / PROBE).read_bytes()) | {name: array}))
    with pytest.raises(ArchwrightError, match="VERIFY020") as caught:
        read_probe(tmp_path, 2, made.spec.model)
    assert told in caught.value.message and caught.value.help


def test_a_changed_file_is_told_before_anything_runs(engines_of: Callable[..., Path]) -> None:
    folder = engines_of()
    (folder / "rank1/stage0.engine").write_bytes(b"engine X")
    report = verify_on_target(folder, find=lambda artifact: pytest.fail("opened"))
    assert [problem.split()[0] for problem in report.problems()] == ["VERIFY001"]


def test_without_a_gpu_the_verb_says_what_is_needed(
    engines_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        library = load_tensorrt()
    except ArchwrightError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(tensorrt_backend, "visible_gpus", lambda: ())
    folder = engines_of(version=library.__version__, library=library.__name__)
    assert main(["verify", "--on-target", str(folder)]) == 1
    told = capsys.readouterr().err
    assert "RUN041 the engines need 2 NVIDIA GPUs, and none is here" in told
    assert "run on a machine with SM 8.9, 12.0" in told
    assert main(["verify", "--on-target", "--bisect", str(folder)]) == 2
