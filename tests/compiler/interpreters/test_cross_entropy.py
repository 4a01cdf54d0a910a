"""`LinearCrossEntropy` against the plain cross-entropy of the logits."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from archwright.compiler.interpreters import cross_entropy
from archwright.compiler.interpreters.cross_entropy import LinearCrossEntropy, Rows
from tests.compiler.interpreters.threads import Group, all_reduce

TOLERANCES = {torch.float64: 1e-13, torch.float32: 5e-6, torch.bfloat16: 2e-2}


def gradients(loss_sum: torch.Tensor, *leaves: torch.Tensor) -> list[torch.Tensor]:
    """Of three times the loss, so that a scale that is not applied shows."""
    return list(torch.autograd.grad(3 * loss_sum, leaves))


def terms(x_TD: torch.Tensor, weight_VD: torch.Tensor, targets_T: torch.Tensor) -> list[torch.Tensor]:
    """Of the gradients of x and of the weight: Σ of the terms' absolute values, which are what is rounded.

    (softmax + onehot) |weight| and (softmax + onehot)ᵀ |x|, where the gradients have softmax - onehot.
    """
    valid_T = targets_T != -100
    onehot_TV = F.one_hot(targets_T.where(valid_T, 0), len(weight_VD)).double()
    both_TV = ((x_TD @ weight_VD.T).softmax(-1) + onehot_TV) * valid_T[:, None]
    return [(3 * both_TV @ weight_VD.abs()).detach(), (3 * both_TV.T @ x_TD.abs()).detach()]


def assert_close(
    found: torch.Tensor, expected: torch.Tensor, tolerance: float, scale: torch.Tensor | None = None
) -> None:
    """Relative to the largest value of `scale`: the elements of a gradient may cancel."""
    largest = (expected if scale is None else scale).abs().max().clamp(min=1e-3)
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
    pairs = zip(gradients(found, x, weight), gradients(plain, wide_x, wide_weight), strict=True)
    for (actual, expected), scale in zip(pairs, terms(wide_x, wide_weight, targets), strict=True):
        assert actual.dtype == dtype
        assert_close(actual, expected, TOLERANCES[dtype], scale)


def piece_of(weight_VD: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    """A rank's rows, filled up with rows that nobody may read."""
    size = -(-len(weight_VD) // ranks)
    piece = torch.full((size, weight_VD.shape[1]), 9.0, dtype=weight_VD.dtype)
    real = weight_VD[rank * size : (rank + 1) * size].detach()
    piece[: len(real)] = real
    return piece.requires_grad_()


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 20),
    vocab=st.integers(1, 400),
    ranks=st.integers(1, 5),
    rows_at_once=st.integers(1, 25),
    ignored=st.sampled_from(["none", "some", "all"]),
    dtype=st.sampled_from(list(TOLERANCES)),
    seed=st.integers(0, 2**16),
)
def test_ranks_that_share_the_vocabulary_equal_one(
    tokens: int, vocab: int, ranks: int, rows_at_once: int, ignored: str, dtype: torch.dtype, seed: int
) -> None:
    """The loss is the same on each, the gradient of x a sum of theirs, that of a row of the weight its owner's. Ranks
    without a single real row are among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 8, generator=generator).to(dtype)
    weight = torch.randn(vocab, 8, generator=generator).to(dtype)
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    if ignored != "none":
        targets[torch.rand(tokens, generator=generator) < (0.5 if ignored == "some" else 2)] = -100
    wide_x, wide_weight = (leaf.double().requires_grad_() for leaf in (x, weight))
    plain = F.cross_entropy(wide_x @ wide_weight.T, targets, ignore_index=-100, reduction="sum")
    group, size = Group(ranks), -(-vocab // ranks)

    def work(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        own_x, own_weight = x.clone().requires_grad_(), piece_of(weight, rank, ranks)
        real = max(0, min(size, vocab - rank * size))
        rows = Rows(group=group, first=rank * size, real=real)  # type: ignore[arg-type]
        loss = LinearCrossEntropy.apply(own_x, own_weight, targets, rows)
        return loss.detach(), *gradients(loss, own_x, own_weight)  # type: ignore[return-value]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "all_reduce", all_reduce)
        wide = torch.promote_types(dtype, torch.float32)
        patch.setattr(cross_entropy, "CPU_CHUNK_BYTES", rows_at_once * size * wide.itemsize)
        losses, x_parts, weight_parts = zip(*group.run(work), strict=True)
    assert all(torch.equal(loss, losses[0]) for loss in losses)
    assert_close(losses[0], plain.detach(), TOLERANCES[dtype])
    expected_x, expected_weight = gradients(plain, wide_x, wide_weight)
    scale_x, scale_weight = terms(wide_x, wide_weight, targets)
    found_x, found_weight = torch.stack(x_parts).double().sum(0), torch.cat(weight_parts)
    assert_close(found_x, expected_x, TOLERANCES[dtype], scale_x)
    assert_close(found_weight[:vocab], expected_weight, TOLERANCES[dtype], scale_weight)
    assert not found_weight[vocab:].any(), "rows that fill up have no gradient"


def test_a_target_a_hundred_rows_before_a_piece_counts() -> None:
    """Counted from the piece's first row it is -100, which is no mark there."""
    x, weight = torch.randn(3, 4, dtype=torch.float64), torch.randn(240, 4, dtype=torch.float64)
    targets = torch.tensor([20, -100, 19])
    group = Group(2)

    def work(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        own_x = x.clone().requires_grad_()
        rows = Rows(group=group, first=120 * rank, real=120)  # type: ignore[arg-type]
        loss = LinearCrossEntropy.apply(own_x, piece_of(weight, rank, 2), targets, rows)
        return loss.detach(), *gradients(loss, own_x)  # type: ignore[return-value]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "all_reduce", all_reduce)
        (first, first_x), (second, second_x) = group.run(work)
    wide_x = x.requires_grad_()
    plain = F.cross_entropy(wide_x @ weight.T, targets, ignore_index=-100, reduction="sum")
    assert torch.equal(first, second)
    assert_close(first, plain.detach(), 1e-12)
    assert_close(first_x + second_x, *gradients(plain, wide_x), 1e-12)


@pytest.mark.parametrize("largest", [-1e4, 1e4])
def test_large_logits_of_another_rank_stay_finite(largest: float) -> None:
    """Each rank's own largest logit would overflow the sum, or lose all of it."""
    group = Group(2)

    def work(rank: int) -> list[torch.Tensor]:
        own_x = torch.tensor([[1.0]], dtype=torch.float32, requires_grad=True)
        own = torch.tensor([[0.0], [largest]][rank : rank + 1], requires_grad=True)
        rows = Rows(group=group, first=rank, real=1)  # type: ignore[arg-type]
        loss = LinearCrossEntropy.apply(own_x, own, torch.tensor([0]), rows)
        return [loss.detach(), *gradients(loss, own_x, own)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "all_reduce", all_reduce)
        answers = group.run(work)
    for values in answers:
        assert values[0].item() == max(0.0, largest)
        assert all(torch.isfinite(value).all() for value in values)


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
