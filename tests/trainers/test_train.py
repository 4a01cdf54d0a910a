"""`train` in one process: what a run holds, what the loss is, what is refused."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from archwright.compiler import compile_module
from archwright.compiler.ir import Degrees
from archwright.compiler.weights.folder import checkpoints
from archwright.compiler.weights.streaming import SafetensorsWeights
from archwright.spec import ArchwrightError, Spec, load
from archwright.spec.cli import main
from archwright.spec.manifest import check_manifest
from archwright.trainers.batches import IGNORED, Batch, Share
from archwright.trainers.checkpoints import Progress
from archwright.trainers.launch import World
from archwright.trainers.loop import accumulate, assemble_trainer
from archwright.trainers.metrics import read_metrics
from archwright.trainers.run_folder import Start
from archwright.trainers.training import train_in_world

MakeSpec = Callable[..., Spec]
Overrides = dict[str, object]


def train(spec: Spec, run: Path, *, resume: bool = False) -> list[dict[str, float]]:
    train_in_world(spec, run, World(), resume=resume)
    return read_metrics(run)


def code_of(spec: Spec, run: Path, *, resume: bool = False) -> str:
    with pytest.raises(ArchwrightError) as caught:
        train(spec, run, resume=resume)
    return caught.value.code


@pytest.fixture(scope="module")
def finished(make_spec: MakeSpec, training: Overrides, tmp_path_factory: pytest.TempPathFactory) -> tuple[Spec, Path]:
    spec, run = make_spec(training), tmp_path_factory.mktemp("runs") / "run"
    train(spec, run)
    return spec, run


def test_a_run_holds_every_step_once(finished: tuple[Spec, Path]) -> None:
    _, run = finished
    records = read_metrics(run)
    assert [record["step"] for record in records] == list(range(1, 13))
    assert [record["step"] for record in records if "validation_loss" in record] == [5, 10, 12]
    assert all(record["validation_bits_per_byte"] > 0 for record in records if "validation_loss" in record)
    assert records[-1]["loss"] < records[0]["loss"] - 0.3
    assert records[-1]["tokens"] == 12 * 4 * 48
    assert records[0]["loss"] == pytest.approx(math.log(1024), rel=0.05)


def test_checkpoints_are_whole_and_the_model_is_the_last(finished: tuple[Spec, Path]) -> None:
    spec, run = finished
    found = checkpoints(run)
    assert list(found) == [3, 6, 9, 12]
    assert all(check_manifest(folder) == [] for folder in (*found.values(), run / "model"))
    assert sorted(path.name for path in found[12].iterdir()) == [
        "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json",
    ]  # fmt: skip
    ids_BS = torch.arange(24).reshape(2, 12)
    assert torch.equal(compile_module(run)(ids_BS), compile_module(run / "model")(ids_BS))
    assert load(run / "model" / "spec.yaml").model == spec.model
    assert "step 12/12" in (run / "log.txt").read_text()


def test_old_checkpoints_go(make_spec: MakeSpec, training: Overrides, tmp_path: Path) -> None:
    train(make_spec({**training, "train.checkpoint": {"every": 3, "keep": 2}}), tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "step-00000009",
        "step-00000012",
    ]


def test_evaluation_is_the_mean_over_its_windows(finished: tuple[Spec, Path]) -> None:
    """The record of the last step, recomputed from the model folder with plain torch."""
    from archwright.trainers.batches import Windows, evaluation_batches
    from archwright.trainers.dataset import open_data

    spec, run = finished
    assert spec.data is not None and spec.data.path is not None
    split = open_data(spec.data.path).validation
    batches = list(evaluation_batches(Windows(split, 48, 0), 2, 4, Share()))
    module = compile_module(run / "model")
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(
                module(torch.from_numpy(batch.ids_BS)).flatten(0, 1), torch.from_numpy(batch.targets_BS).flatten()
            ).item()
            for batch in batches
        ]
    last = read_metrics(run)[-1]
    assert last["validation_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    bits = np.mean(losses) / math.log(2) * split.num_tokens / split.num_bytes
    assert last["validation_bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_accumulation_is_exact_with_unequal_pieces(make_spec: MakeSpec) -> None:
    """Loss and gradients of the mean over all targets, however they are spread over the pieces."""
    spec = make_spec({"model.vocab_size": 1024, "train.precision": "float64"})
    start = Start(checkpoint=None, progress=Progress(step=0, tokens=0, data_digest=""))
    unused: Any = None
    assert spec.train is not None
    trainer = assemble_trainer(spec, spec.train, unused, start, Degrees(), torch.device("cpu"))
    module = trainer.model.module
    generator = np.random.default_rng(0)
    ids_BS, targets_BS = (generator.integers(0, 1024, (6, 16)) for _ in range(2))
    targets_BS[0, 1:] = IGNORED
    targets_BS[3:5] = IGNORED
    batch = Batch(ids_BS=ids_BS, targets_BS=targets_BS)
    found = []
    for pieces in (1, 2, 3, 6):
        module.zero_grad()
        loss, num_targets = accumulate(replace(trainer, share=Share(micro_batches=pieces)), batch)
        assert num_targets == batch.num_targets
        found.append((loss.item(), [parameter.grad.clone() for parameter in module.parameters()]))
    logits = module(torch.from_numpy(ids_BS)).flatten(0, 1)
    plain = torch.nn.functional.cross_entropy(logits, torch.from_numpy(targets_BS).flatten())
    for loss, gradients in found:
        assert loss == pytest.approx(plain.item(), rel=1e-12)
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-14) for a, b in zip(gradients, found[0][1], strict=True))


def test_bfloat16_keeps_float32_masters(make_spec: MakeSpec, training: Overrides, tmp_path: Path) -> None:
    records = train(make_spec({**training, "train.precision": "bfloat16"}), tmp_path / "run")
    assert records[-1]["loss"] < records[0]["loss"] - 0.3
    weights = SafetensorsWeights(checkpoints(tmp_path / "run")[12])
    matrix = weights.read("model.layers.0.mlp.up_proj.weight")
    assert matrix.dtype == np.float32
    rounded = torch.from_numpy(matrix.copy()).bfloat16().float().numpy()
    assert not np.array_equal(matrix, rounded)


def test_finetuning_starts_from_a_base(
    make_spec: MakeSpec,
    training: Overrides,
    finished: tuple[Spec, Path],
    built_chats: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    chats = {
        **training,
        "train": {"kind": "sft", "steps": 6, "batch_size": 4, "sequence_length": 64, "base": str(finished[1])},
        "data.path": str(built_chats),
    }
    for name in list(chats):
        if name.startswith("train."):
            del chats[name]
    run = tmp_path / "run"
    records = train(make_spec(chats), run)
    output = capsys.readouterr().out
    assert "conversations;" in output and "cut to 65 tokens" in output
    scratch = train(make_spec({**chats, "train.base": None}), tmp_path / "scratch")
    assert records[0]["loss"] != scratch[0]["loss"]
    assert records[-1]["loss"] < records[0]["loss"]
    assert 0 < records[-1]["tokens"] < 6 * 4 * 64
    assert "validation_bits_per_byte" in records[-1]
    assert code_of(make_spec({**chats, "model.tied_embeddings": False}), tmp_path / "other") == "TRAIN009"
    assert code_of(make_spec({**chats, "data.path": training["data.path"]}), tmp_path / "plain") == "TRAIN013"
    assert not (tmp_path / "other").exists() and not (tmp_path / "plain").exists()


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"data.path": None}, "TRAIN002"),
        ({"tokenizer.path": None}, "TRAIN003"),
        ({"model.vocab_size": 900, "tokenizer.vocab_size": 900}, "TRAIN008"),
        ({"train.optimizer.learning_rate": 1e30, "train.clip_norm": None}, "TRAIN015"),
    ],
)
def test_unfit_inputs_are_refused(
    make_spec: MakeSpec, training: Overrides, tmp_path: Path, changes: Mapping[str, object], code: str
) -> None:
    assert code_of(make_spec({**training, **changes}), tmp_path / "run") == code


def test_a_spec_without_training_is_refused(make_spec: MakeSpec, training: Overrides, tmp_path: Path) -> None:
    spec = make_spec(training).model_copy(update={"train": None})
    assert code_of(spec, tmp_path / "run") == "TRAIN001"
    assert not (tmp_path / "run").exists()


def test_the_verb_reports_errors_in_one_line(
    spec_file: Path, finished: tuple[Spec, Path], training: Overrides, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [f"--set={path}={json.dumps(value)}" for path, value in training.items()]
    assert main(["train", str(spec_file), "-o", str(finished[1]), *settings]) == 1
    error = capsys.readouterr().err
    assert "TRAIN004" in error and "--resume" in error
    assert "Traceback" not in error
