"""Model folders: complete, refused when they are not, and the newest checkpoint of a run."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from archwright.compiler import compile_module
from archwright.compiler.passes import lower
from archwright.compiler.weights.folder import checkpoints, open_folder, weight_tensors, write_model_folder
from archwright.compiler.weights.streaming import PRECISIONS, GeneratedWeights, Tensor, write_weights
from archwright.spec import ArchwrightError, Spec, load
from archwright.spec.manifest import check_manifest

SPEC = load("preset:tiny")


def tensors(spec: Spec = SPEC, precision: str = "float32") -> dict[str, Tensor]:
    program = lower(spec)
    return weight_tensors(program, GeneratedWeights(params=program.params(), seed=4), precision)


def write(path: Path, changes: dict[str, Tensor | None] | None = None, spec: Spec = SPEC) -> Path:
    chosen = {**tensors(spec), **(changes or {})}
    write_model_folder(path, spec, {k: v for k, v in chosen.items() if v is not None}, [], details={"step": 3})
    return path


def test_a_folder_opens_as_it_was_written(tmp_path: Path) -> None:
    folder = open_folder(write(tmp_path / "model"))
    assert folder.spec.model == SPEC.model and folder.program == lower(SPEC)
    assert folder.tokenizer is None and folder.step is None
    assert check_manifest(tmp_path / "model") == []
    for name, tensor in tensors().items():
        np.testing.assert_array_equal(folder.weights.read(name), tensor.produce())


def test_a_module_from_a_folder_equals_the_one_from_the_spec(tmp_path: Path) -> None:
    module = compile_module(write(tmp_path / "model"))
    ids_BS = torch.arange(12).reshape(2, 6)
    assert torch.equal(module(ids_BS), compile_module(SPEC, seed=4)(ids_BS))


def test_config_json_has_the_dtype_that_is_stored(tmp_path: Path) -> None:
    write_model_folder(tmp_path / "half", SPEC, tensors(precision="bfloat16"), [], details={})
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["model_type"] == "llama"


def test_a_tokenizer_lies_beside_the_weights(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    write_model_folder(tmp_path / "model", SPEC, tensors(), [file], details={})
    assert open_folder(tmp_path / "model").tokenizer == tmp_path / "model"


def test_nothing_is_left_of_a_folder_that_failed(tmp_path: Path) -> None:
    broken = replace(tensors()["model.norm.weight"], produce=lambda: np.ones(3, np.float32))
    with pytest.raises(AssertionError):
        write(tmp_path / "model", {"model.norm.weight": broken})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_does_not_fit_its_spec_is_refused(tmp_path: Path) -> None:
    extra = replace(tensors()["model.norm.weight"])
    wrong = Tensor(shape=(3,), dtype=PRECISIONS["float32"], produce=lambda: np.ones(3, np.float32))
    for number, (changes, text) in enumerate(
        [
            ({"model.norm.weight": None}, "`model.norm.weight` is missing"),
            ({"model.rotary.weight": extra}, "`model.rotary.weight` is not in the spec's model"),
            ({"model.norm.weight": wrong}, r"has shape \[3\], the spec says \[64\]"),
        ]
    ):
        with pytest.raises(ArchwrightError, match=f"RUN013 {text}" if number < 2 else f"RUN013 .*{text}"):
            open_folder(write(tmp_path / str(number), changes))


def test_a_tied_head_may_be_stored_a_second_time(tmp_path: Path) -> None:
    head = tensors()["model.embed_tokens.weight"]
    open_folder(write(tmp_path / "model", {"lm_head.weight": head}))


def test_the_newest_complete_checkpoint_of_a_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write(run)
    for step, complete in ((20, True), (100, True), (300, False)):
        folder = run / "checkpoints" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        write_weights(folder, tensors())
        if complete:
            (folder / "manifest.json").write_text("{}")
    assert list(checkpoints(run)) == [20, 100]
    opened = open_folder(run)
    assert opened.step == 100 and opened.path == run / "checkpoints" / "step-000100"


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArchwrightError, match="RUN011"):
        open_folder(tmp_path)
    write(tmp_path / "run")
    (tmp_path / "run" / "checkpoints").mkdir()
    with pytest.raises(ArchwrightError, match="RUN012"):
        open_folder(tmp_path / "run")
