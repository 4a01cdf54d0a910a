"""`LinearCrossEntropy` against the plain cross-entropy of the logits."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from archwright.compiler.interpreters import cross_entropy
from archwright.compiler.interpreters.cross_entropy import LinearCrossEntropy

TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2}


def gradients(loss_sum: torch.Tensor, *leaves: torch.Tensor) -> list[torch.Tensor]:
    """Of three times the loss, so that a scale that is not applied shows."""
    return list(torch.autograd.grad(3 * loss_sum, leaves))


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Relative to the largest value: single elements of a bfloat16 gradient may cancel."""
    largest = expected.abs().max().clamp(min=1e-3)
    assert ((found.double() - expected).abs().max() / largest).item() <= tolerance


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 40),
    hidden=st.sampled_from([1, 8, 24]),
    vocab=st.integers(1, 90),
    rows_at_once=st.integers(1, 50),
    ignored=st.sampled_from(["none", "some", "all"]),
    dtype=st.sampled_from(list(TOLERANCES)),
    seed=st.integers(0, 2**16),
)
def test_equals_plain_cross_entropy(
    tokens: int, hidden: int, vocab: int, rows_at_once: int, ignored: str, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab, hidden, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    if ignored != "none":
        mask = torch.rand(tokens, generator=generator) < 0.5 if ignored == "some" else torch.ones(tokens).bool()
        targets[mask] = -100
    wide_x, wide_weight = (leaf.detach().double().requires_grad_() for leaf in (x, weight))
    plain = F.cross_entropy(wide_x @ wide_weight.T, targets, ignore_index=-100, reduction="sum")
    wide = torch.promote_types(dtype, torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "CPU_CHUNK_BYTES", rows_at_once * vocab * wide.itemsize)
        found = LinearCrossEntropy.apply(x, weight, targets)
    assert found.dtype == wide
    assert_close(found.detach(), plain.detach(), TOLERANCES[dtype])
    for actual, expected, leaf in zip(
        gradients(found, x, weight), gradients(plain, wide_x, wide_weight), (x, weight), strict=True
    ):
        assert actual.dtype == leaf.dtype
        assert_close(actual, expected, TOLERANCES[dtype])


def test_float32_masters_get_float32_gradients_under_bfloat16() -> None:
    """The gradient of the matrix is added up in float32 over the chunks and never rounded to bfloat16."""
    x = torch.randn(64, 16).bfloat16()
    weight = torch.randn(32, 16, requires_grad=True)
    loss_sum = LinearCrossEntropy.apply(x, weight, torch.randint(0, 32, (64,)))
    (gradient,) = gradients(loss_sum, weight)
    assert gradient.dtype == torch.float32
    assert not torch.equal(gradient, gradient.bfloat16().float())


def test_large_logits_stay_finite() -> None:
    x = torch.tensor([[1e4, 0.0]], requires_grad=True)
    loss_sum = LinearCrossEntropy.apply(x, torch.eye(2), torch.tensor([1]))
    assert loss_sum.item() == pytest.approx(1e4)
    assert torch.isfinite(gradients(loss_sum, x)[0]).all()
