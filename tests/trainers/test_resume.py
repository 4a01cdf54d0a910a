"""A training that is interrupted and goes on is the same training, bit by bit."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from archwright.compiler.weights.folder import checkpoints
from archwright.compiler.weights.streaming import SafetensorsWeights
from archwright.spec import ArchwrightError, Spec
from archwright.spec.manifest import read_manifest
from archwright.trainers.launch import World
from archwright.trainers.metrics import METRICS, read_metrics
from archwright.trainers.training import train_in_world

MakeSpec = Callable[..., Spec]
Overrides = dict[str, object]


def train(spec: Spec, run: Path, *, resume: bool = False) -> None:
    train_in_world(spec, run, World(), resume=resume)


def comparable(run: Path) -> list[dict[str, float]]:
    """The metrics without what a clock says."""
    return [{key: value for key, value in record.items() if key != "tokens_per_s"} for record in read_metrics(run)]


def hashes(folder: Path) -> dict[str, str]:
    return {name: entry.sha256 for name, entry in read_manifest(folder).files.items() if name != "state.json"}


def assert_same_run(first: Path, second: Path, step: int) -> None:
    assert comparable(first) == comparable(second)
    assert hashes(checkpoints(first)[step]) == hashes(checkpoints(second)[step])
    assert hashes(first / "model")["model.safetensors"] == hashes(second / "model")["model.safetensors"]


@pytest.fixture(scope="module")
def straight(make_spec: MakeSpec, training: Overrides, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "straight"
    train(make_spec(training), run)
    return run


def cut(source: Path, run: Path, step: int) -> None:
    """What a run looks like that was killed between `step` and the next checkpoint."""
    shutil.copytree(source, run)
    shutil.rmtree(run / "model")
    for later, folder in checkpoints(run).items():
        if later > step:
            shutil.rmtree(folder)


@pytest.mark.parametrize("step", [0, 6, 9])
def test_resumed_is_straight(
    make_spec: MakeSpec, training: Overrides, straight: Path, tmp_path: Path, step: int
) -> None:
    run = tmp_path / "run"
    cut(straight, run, step)
    unfinished = run / "checkpoints" / ".step-00000010.tmp-1-0-0-0"
    unfinished.mkdir()  # by a training with another checkpoint.every, on another machine
    with (run / METRICS).open("a") as file:
        file.write('{"step": 13, "lo')  # torn
    train(make_spec(training), run, resume=True)
    assert_same_run(straight, run, 12)
    assert not unfinished.exists()


def test_resume_without_a_run_begins_one(
    make_spec: MakeSpec, training: Overrides, straight: Path, tmp_path: Path
) -> None:
    train(make_spec(training), tmp_path / "run", resume=True)
    assert_same_run(straight, tmp_path / "run", 12)


def test_a_complete_run_says_so_and_gets_its_model_back(
    make_spec: MakeSpec, training: Overrides, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    shutil.rmtree(run / "model")
    train(make_spec(training), run, resume=True)
    assert "complete, 12 steps" in capsys.readouterr().out
    assert_same_run(straight, run, 12)


def test_steps_may_grow(make_spec: MakeSpec, training: Overrides, straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    train(make_spec({**training, "train.steps": 14, "train.log_every": 1}), run, resume=True)
    assert [record["step"] for record in read_metrics(run)] == list(range(1, 15))
    assert comparable(run)[:12] == comparable(straight)
    assert read_manifest(run / "model").details["step"] == 14
    assert hashes(run / "model") != hashes(straight / "model")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"train.seed": 7}, "`train.seed` is 7, the run was started with 0"),
        ({"train.batch_size": 8}, "`train.batch_size` is 8"),
        ({"train.precision": "bfloat16"}, "`train.precision`"),
        ({"train.optimizer.weight_decay": 0.0}, "`train.optimizer.weight_decay`"),
        ({"train.steps": 11}, "`train.steps` is 11"),
        ({"model.hidden_size": 64}, "`model.hidden_size` is 64"),
        ({"model.tied_embeddings": False}, "`model.tied_embeddings`"),
    ],
)
def test_another_spec_is_refused(
    make_spec: MakeSpec, training: Overrides, straight: Path, changes: Mapping[str, object], field: str
) -> None:
    with pytest.raises(ArchwrightError) as caught:
        train(make_spec({**training, **changes}), straight, resume=True)
    assert caught.value.code == "TRAIN005"
    assert field in str(caught.value)


def test_other_data_are_refused(make_spec: MakeSpec, training: Overrides, built_chats: Path, straight: Path) -> None:
    with pytest.raises(ArchwrightError) as caught:
        train(make_spec({**training, "data.path": str(built_chats)}), straight, resume=True)
    assert caught.value.code == "TRAIN011"


def test_a_damaged_checkpoint_is_refused(
    make_spec: MakeSpec, training: Overrides, straight: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    cut(straight, run, 6)
    file = checkpoints(run)[6] / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(ArchwrightError) as caught:
        train(make_spec(training), run, resume=True)
    assert caught.value.code == "TRAIN010"
    assert "optimizer.safetensors" in str(caught.value)


def test_a_folder_that_is_no_run_is_refused(make_spec: MakeSpec, training: Overrides, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(ArchwrightError) as caught:
        train(make_spec(training), tmp_path / "run", resume=True)
    assert caught.value.code == "TRAIN006"


def command(spec_file: Path, run: Path, settings: Overrides, *more: str) -> list[str]:
    sets = [f"--set={path}={json.dumps(value)}" for path, value in settings.items()]
    program = "import sys; from archwright.spec.cli import main; sys.exit(main())"
    return [sys.executable, "-c", program, "train", str(spec_file), "-o", str(run), *sets, *more]


@pytest.mark.heavy
def test_a_run_may_go_on_with_another_plan(
    spec_file: Path, make_spec: MakeSpec, training: Overrides, tmp_path: Path
) -> None:
    """Checkpoints hold full tensors: begun in one process, continued in two, in float64."""
    settings = {**training, "train.precision": "float64"}
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    train(make_spec(settings), straight)
    cut(straight, moved, 6)
    more = {**settings, "parallel.tensor": 2}
    subprocess.run(command(spec_file, moved, more, "--resume"), check=True, stdout=subprocess.DEVNULL)
    losses = [[record["loss"] for record in read_metrics(run)] for run in (straight, moved)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-10, abs=0)
    assert "2 processes" in (moved / "log.txt").read_text()


PLANS: dict[int, Overrides] = {
    2: {"parallel.tensor": 2, "parallel.sequence": True},
    4: {"parallel.data_shard": 2},
    6: {"parallel.pipeline": 2},
    8: {},
}
"""The step after which a run goes on under another plan; at last in one process again."""


@pytest.mark.heavy
def test_checkpoints_know_no_plan(spec_file: Path, make_spec: MakeSpec, training: Overrides, tmp_path: Path) -> None:
    """Each plan begins with the checkpoint that the one before wrote. Muon has both kinds of states; no two ranks have
    as many of the 1031 tokens."""
    settings: Overrides = {
        **training,
        "model.vocab_size": 1031,
        "train.precision": "float64",
        "train.micro_batches": 2,
        "train.steps": 10,
        "train.checkpoint": {"every": 2, "keep": 10},
        "train.optimizer": {"kind": "muon"},
        "parallel.data_shard": 1,
    }
    del settings["train.optimizer.learning_rate"]
    straight = before = tmp_path / "straight"
    train(make_spec(settings), straight)
    for step, plan in PLANS.items():
        run = tmp_path / f"after-{step}"
        cut(before, run, step)
        subprocess.run(command(spec_file, run, {**settings, **plan}, "--resume"), check=True, stdout=subprocess.DEVNULL)
        one, other = (read_metrics(each) for each in (straight, run))
        assert [record["step"] for record in other] == list(range(1, 11))
        for key in ("loss", "grad_norm", "learning_rate", "tokens"):
            assert [each[key] for each in other] == pytest.approx([each[key] for each in one], rel=1e-10, abs=0), plan
        assert other[-1]["validation_loss"] == pytest.approx(one[-1]["validation_loss"], rel=1e-10)
        before = run
    for name in ("model.safetensors", "optimizer.safetensors"):
        expected, found = (SafetensorsWeights(checkpoints(run)[10] / name) for run in (straight, before))
        assert set(found.names()) == set(expected.names())
        for key in expected.names():
            whole = expected.read(key)
            assert found.read(key).shape == whole.shape and found.read(key).dtype == whole.dtype == np.float64
            assert np.abs(found.read(key) - whole).max() <= 1e-10 * np.abs(whole).max(), key
