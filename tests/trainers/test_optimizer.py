"""Learning rate, weight decay, clipping."""

import pytest
import torch
from torch import nn

from archwright.spec.models import AdamW, Cosine
from archwright.trainers.optimizer import clip_gradients, learning_rate, make_optimizer


def rates(steps: int, **schedule: object) -> list[float]:
    cosine = Cosine.model_validate({"kind": "cosine", **schedule})
    return [learning_rate(step, peak=2.0, schedule=cosine, steps=steps) for step in range(steps)]


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


def test_decay_is_on_matrices_only() -> None:
    module = nn.ParameterDict({"matrix": torch.ones(3, 2), "norm": torch.ones(3)})
    optimizer = make_optimizer(module, AdamW(kind="adamw", learning_rate=0.1, weight_decay=0.5))
    for parameter in module.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.allclose(module["matrix"], torch.full((3, 2), 0.95))
    assert torch.equal(module["norm"], torch.ones(3))


@pytest.mark.parametrize("max_norm", [None, 1.0, 100.0])
def test_clipping_equals_torch(max_norm: float | None) -> None:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3, bias=False)).double()
    for parameter in first.parameters():
        parameter.grad = torch.randn_like(parameter)
    plain = [parameter.grad.clone().requires_grad_() for parameter in first.parameters()]
    for leaf in plain:
        leaf.grad = leaf.detach().clone()
    expected = nn.utils.clip_grad_norm_(plain, max_norm or float("inf"))
    assert clip_gradients(first, max_norm).item() == pytest.approx(expected.item(), rel=1e-12)
    for parameter, leaf in zip(first.parameters(), plain, strict=True):
        assert torch.allclose(parameter.grad, leaf.grad, rtol=1e-12)
