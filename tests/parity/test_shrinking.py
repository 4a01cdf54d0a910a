"""A failing spec becomes a small YAML file that fails in the same way, with the command that shows it."""

import shlex
from pathlib import Path

import pytest
import torch

from archwright.compiler.interpreters.torch_ops import TorchOps
from archwright.spec import load
from archwright.spec.models import NoPosition, Rope
from tests.parity import reproduce
from tests.parity.comparisons import Subject, beyond_tolerance, measure
from tests.parity.mutations import MUTATIONS
from tests.parity.ranks import Ranks
from tests.parity.shrinking import explain, shrink
from tests.parity.strategies import features, random_spec, random_tree

NAME = "torch, float32"


def first_seed(folder: Path, *wanted: str) -> int:
    return next(seed for seed in range(200) if all(features(random_spec(seed, folder))[name] for name in wanted))


def test_a_planted_bug_is_shrunk_to_a_spec_that_reproduces_it(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bug: torch computes GPT-2's GELU where the exact one is asked for."""
    seed = first_seed(tmp_path, "mixed stack", "gelu", "swiglu", "tied", "rope", "window inside the sequences")
    monkeypatch.setattr(TorchOps, "gelu", lambda _, x, __: torch.nn.functional.gelu(x, approximate="tanh"))
    wrong = beyond_tolerance(
        measure(Subject(spec=random_spec(seed, tmp_path), seed=seed, folder=tmp_path), [NAME], ranks)
    )
    assert list(wrong) == [NAME]

    message = explain(random_tree(seed), seed, wrong, tmp_path, ranks)
    path = tmp_path / f"failing-{seed}.yaml"
    model = load(path).model
    assert model.num_layers == 1 and model.layer is not None and not model.tied_embeddings
    assert model.layer.ffn.kind == "gelu" and model.layer.ffn.approximation == "none"
    assert model.layer.norm.kind == "rmsnorm" and model.layer.attention.mask.kind == "causal"
    assert model.positions is None
    assert model.layer.attention.position in (Rope(kind="rope"), NoPosition(kind="none"))
    assert path.read_text() in message

    command = shlex.split(message.splitlines()[-1].partition(":  ")[2])
    assert command[:3] == ["python", "-m", "tests.parity.reproduce"]
    assert reproduce.main(command[3:]) == 1
    assert "WRONG" in capsys.readouterr().out
    monkeypatch.undo()
    assert reproduce.main(command[3:]) == 0


def test_a_bug_of_two_ranks_stays_legal_for_two_ranks(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "all-reduce missing, joined ranks"
    mutation = MUTATIONS[name]
    mutation.patch(monkeypatch)
    seed = first_seed(tmp_path, "mixed stack", "biases on q, k, v, o")
    explain(random_tree(seed), seed, {mutation.comparison: 1e-2}, tmp_path, ranks)
    model = load(tmp_path / f"failing-{seed}.yaml").model
    assert model.num_layers == 1 and model.layer is not None
    assert model.layer.attention.heads == 2 and model.layer.ffn.hidden_size <= 8


def test_shrinking_ends_where_nothing_simpler_fails() -> None:
    tree = random_tree(5)
    assert shrink(tree, lambda _: False) == tree
    assert shrink(tree, lambda candidate: "layers" in candidate["model"])["model"].keys() == {"layers"}
