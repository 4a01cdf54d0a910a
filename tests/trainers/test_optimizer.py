"""Learning rate, weight decay, clipping."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from archwright.compiler.distributed.apply import Options, ShardedModel, apply_plan
from archwright.compiler.distributed.layout import Layout
from archwright.compiler.ir import Degrees, Ones, Param
from archwright.compiler.passes import TRAINING_TABLE, lower, partition
from archwright.compiler.weights.streaming import GeneratedWeights
from archwright.spec import load
from archwright.spec.models import AdamW, Cosine
from archwright.spec.models import Muon as MuonSpec
from archwright.trainers.muon import Muon, orthogonalize
from archwright.trainers.optimizer import clipping, make_optimizer, schedule_factor
from tests.trainers.optimizer_worker import OPTIMIZERS, PLANS


def rates(steps: int, **schedule: object) -> list[float]:
    cosine = Cosine.model_validate({"kind": "cosine", **schedule})
    return [2.0 * schedule_factor(step, schedule=cosine, steps=steps) for step in range(steps)]


def test_warmup_then_cosine() -> None:
    found = rates(14, warmup_steps=4, final_fraction=0.1)
    assert found[:4] == [0.5, 1.0, 1.5, 2.0]
    assert found[8] == pytest.approx(2.0 * (0.1 + 0.9 / 2))
    assert found[-1] == pytest.approx(0.2)
    assert found[3:] == sorted(found[3:], reverse=True)


def test_default_warmup_is_two_percent() -> None:
    assert rates(200)[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates(10)[0] == 2.0


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_warmup_may_take_all_steps(steps: int) -> None:
    assert rates(steps, warmup_steps=steps)[-1] == 2.0


def model_of(dtype: torch.dtype, **changes: object) -> ShardedModel:
    """A small model in one process."""
    plan = partition(lower(load("preset:tiny", {"model.hidden_size": 32, **changes})), Degrees(), TRAINING_TABLE)
    options = Options(dtype=dtype, compute_dtype=dtype, device=torch.device("cpu"))
    return apply_plan(plan, GeneratedWeights(params=plan.program.params(), seed=1), None, options)


@pytest.mark.parametrize("how", [{}, {"fused": True}, {"foreach": True}])
def test_decay_is_on_matrices_only(how: dict[str, bool]) -> None:
    model = model_of(torch.float32)
    before = {name: parameter.detach().clone() for name, parameter in model.parameters.items()}
    optimizer = make_optimizer(model, AdamW(kind="adamw", learning_rate=0.2, weight_decay=0.5), **how)
    for parameter in model.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.5)
    for name, parameter in model.parameters.items():
        assert torch.allclose(parameter, before[name] * (0.95 if parameter.ndim == 2 else 1.0)), name
        assert parameter.grad is None


@pytest.mark.parametrize("shape", [(32, 32), (24, 64), (64, 24)])
def test_orthogonal_updates_have_singular_values_near_one(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape, generator=generator)))
    assert 0.3 < values.min() and values.max() < 1.3


@pytest.mark.parametrize("shape", [(16, 40), (40, 16)])
def test_muon_is_that_of_torch(shape: tuple[int, int]) -> None:
    """On whole matrices, as far as two bfloat16 iterations agree: 1 to 2% here; a wrong coefficient makes 20%."""
    generator = torch.Generator().manual_seed(1)
    ours, theirs = (nn.Parameter(torch.ones(shape)) for _ in range(2))
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.2}
    layout = Layout(param=Param(shape=shape, axes=("ffn", "embed"), init=Ones()), mesh=None)
    optimizers = (
        Muon([(ours, layout)], **options, dtype=torch.bfloat16),
        torch.optim.Muon([theirs], **options, nesterov=True),
    )
    for _ in range(3):
        ours.grad = torch.randn(shape, generator=generator)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.linalg.norm(ours - theirs) < 0.05 * torch.linalg.norm(theirs - 1)


def test_muon_takes_the_matrices_of_the_layers() -> None:
    model = model_of(torch.float32, **{"model.tied_embeddings": False})
    optimizer = make_optimizer(model, MuonSpec(kind="muon"))
    chosen = {name for name, layout in model.layouts.items() if optimizer.state_names(layout.param) == ("momentum",)}
    assert chosen == {name for name in model.parameters if "_proj" in name} and len(chosen) == 14
    for parameter in model.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(1.0)
    for name, parameter in model.parameters.items():
        expected = {"momentum"} if name in chosen else {"exp_avg", "exp_avg_sq"}
        assert all(optimizer.state(name, state).shape == parameter.shape for state in expected)


def with_gradients(model: ShardedModel) -> list[nn.Parameter]:
    """Random gradients in the model; plain parameters with the same values and gradients."""
    generator, plain = torch.Generator().manual_seed(0), []
    for parameter in model.parameters.values():
        parameter.grad = torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator)
        plain.append(nn.Parameter(parameter.detach().clone()))
        plain[-1].grad = parameter.grad.clone()
    return plain


@pytest.mark.parametrize("max_norm", [None, 1.0, 1e4])
@pytest.mark.parametrize("how", [{}, {"fused": True}, {"foreach": True}])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_clipped_steps_equal_torch(
    dtype: torch.dtype, tolerance: float, how: dict[str, bool], max_norm: float | None
) -> None:
    """The norm, and AdamW with it, whether the scale is applied before the step or inside the fused one."""
    model = model_of(dtype)
    options = AdamW(kind="adamw", learning_rate=0.1, eps=1e-2)  # an eps that makes the gradient's size matter
    optimizer = make_optimizer(model, options, **how)
    plain = with_gradients(model)
    norm, scale = clipping(model, max_norm)
    expected = nn.utils.clip_grad_norm_(plain, max_norm or float("inf"))
    assert norm.item() == pytest.approx(expected.item(), rel=tolerance)
    assert (scale is None) == (max_norm is None)
    reference = torch.optim.AdamW(
        [{"params": [leaf], "weight_decay": options.weight_decay if leaf.ndim == 2 else 0.0} for leaf in plain],
        lr=0.1, betas=options.betas, eps=options.eps, foreach=False,
    )  # fmt: skip
    optimizer.step(1.0, scale)
    reference.step()
    for (name, parameter), leaf in zip(model.parameters.items(), plain, strict=True):
        torch.testing.assert_close(
            parameter, leaf, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, list[float]]]]:
    """plan → optimizer → what `tests.trainers.optimizer_worker` left of each parameter and state."""
    folder, found = tmp_path_factory.mktemp("worlds"), {}
    for size in (1, 2, 4):
        command = [sys.executable, "-m", "tests.trainers.optimizer_worker"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        processes = [
            subprocess.Popen(
                [*command, str(rank), str(size), str(folder / f"rendezvous-{size}"), str(folder / f"{size}.json")],
                cwd=ROOT,
                env=environment,
            )
            for rank in range(size)
        ]
        assert [process.wait(timeout=200) for process in processes] == [0] * size
        found |= json.loads((folder / f"{size}.json").read_text())
    return found


@pytest.mark.heavy
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("plan", [name for name in PLANS if name != "one"])
def test_optimizers_do_not_see_the_plan(trained: dict[str, Any], plan: str, optimizer: str) -> None:
    """Three clipped steps on given gradients, in float64; Muon orthogonalises whole matrices, whoever holds them."""
    one, many = trained["one"][optimizer], trained[plan][optimizer]
    assert many.keys() == one.keys()
    for name, values in one.items():
        np.testing.assert_allclose(many[name], values, rtol=1e-11, atol=1e-13, err_msg=name)
    assert one["model.norm.weight"] != [1.0] * 32
