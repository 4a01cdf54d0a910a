"""The oracle against figures worked out by hand."""

import numpy as np
import pytest

from archwright.compiler.interpreters.numpy_ops import NumpyOps, make_cache, run_numpy
from archwright.compiler.ir import Causal, Param, RopeTable, Step
from archwright.compiler.ir.param import Ones
from archwright.compiler.passes import lower
from archwright.compiler.weights.initialization import draw
from archwright.spec import load

OPS = NumpyOps({})


def step_at(positions: list[int]) -> Step[np.ndarray]:
    return Step(positions_BS=np.array([positions]))


def test_rms_norm() -> None:
    x = np.array([[[3.0, 4.0]]])
    mean_square = (9 + 16) / 2
    expected = x / np.sqrt(mean_square + 0.5) * [2.0, 10.0]
    np.testing.assert_allclose(OPS.rms_norm(x, np.array([2.0, 10.0]), 0.5), expected, rtol=1e-15)


def test_silu_holds_for_large_values() -> None:
    x = np.array([0.0, 1.0, -1.0, 800.0, -800.0])
    expected = [0, 1 / (1 + np.exp(-1.0)), -1 / (1 + np.exp(1.0)), 800, 0]
    np.testing.assert_allclose(OPS.silu(x), expected, atol=1e-15)


def test_heads_are_consecutive_columns() -> None:
    x = np.arange(12.0).reshape(1, 1, 12)
    heads = OPS.split_heads(x, 4)
    assert heads.shape == (1, 3, 1, 4) and heads[0, 1, 0].tolist() == [4, 5, 6, 7]
    np.testing.assert_array_equal(OPS.merge_heads(heads), x)


def test_rope_turns_the_pair_i_and_i_plus_half() -> None:
    table = RopeTable(head_dim=4, theta=100.0, max_positions=8)  # frequencies 1 and 0.1
    x = np.array([1.0, 0.0, 0.0, 1.0]).reshape(1, 1, 1, 4)
    turned = OPS.rope(x, table, step_at([3]))[0, 0, 0]
    np.testing.assert_allclose(turned, [np.cos(3), -np.sin(0.3), np.sin(3), np.cos(0.3)], rtol=1e-15)


def test_rope_makes_scores_depend_on_distance_only() -> None:
    table = RopeTable(head_dim=8, theta=50.0, max_positions=64)
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, 1, 1, 8))
    near = OPS.rope(q, table, step_at([7])) @ OPS.rope(k, table, step_at([2])).swapaxes(2, 3)
    far = OPS.rope(q, table, step_at([47])) @ OPS.rope(k, table, step_at([42])).swapaxes(2, 3)
    np.testing.assert_allclose(near, far, rtol=1e-12)


def test_attention_is_causal_and_groups_neighbouring_query_heads() -> None:
    q = np.zeros((1, 4, 2, 2))  # equal scores: the mean of what is visible
    k = np.zeros((1, 2, 2, 2))
    v = np.array([[[1.0, 1], [3, 3]], [[10, 10], [30, 30]]])[None]
    y = OPS.attention(q, k, v, mask=Causal(), scale=1.0, step=step_at([0, 1]))
    np.testing.assert_allclose(y[0, :, :, 0], [[1, 2], [1, 2], [10, 20], [10, 20]])


def test_attention_multiplies_scores_by_scale() -> None:
    q, k = np.array([2.0]).reshape(1, 1, 1, 1), np.array([1.0, 3.0]).reshape(1, 1, 2, 1)
    v = np.array([0.0, 1.0]).reshape(1, 1, 2, 1)
    step = Step(positions_BS=np.array([[1]]), write_index_B=np.array([1]), kv_positions_L=np.arange(2))
    y = OPS.attention(q, k, v, mask=Causal(), scale=0.25, step=step)
    assert y.item() == pytest.approx(1 / (1 + np.exp(0.5 - 1.5)))


def test_cache_rows_are_written_at_each_rows_own_index() -> None:
    program = lower(load("preset:tiny"))
    cache = make_cache(program, batch=2, positions=6)
    ops = NumpyOps({}, cache)
    path = "model.layers.0.self_attn"

    class M:
        pass

    m = M()
    m.path = path  # type: ignore[attr-defined]
    x = np.ones((2, 2, 2, 16))
    step = Step(positions_BS=np.zeros((2, 2)), write_index_B=np.array([0, 3]), kv_positions_L=np.arange(5))
    visible = ops.kv_update(m, "key", x, step)
    assert visible.shape == (2, 2, 5, 16)
    assert cache[path, "key"][:, 0, :, 0].tolist() == [[1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 0]]
    assert not cache[path, "value"].any()


def test_the_loss_sums_over_counted_tokens() -> None:
    x = np.array([[[1.0, 0], [0, 1], [1, 1]]])
    weight = np.log(np.array([[2.0, 5], [3, 7], [5, 8]]))
    loss_sum, count = OPS.linear_cross_entropy(x, weight, np.array([[1, -100, 2]]), gather=None)
    probability = [3 / 10, 40 / (10 + 21 + 40)]
    assert count == 2 and loss_sum == pytest.approx(-np.log(probability).sum())


def test_the_loss_holds_for_large_logits() -> None:
    weight = np.array([[1.0], [0.9]])
    loss_sum, _ = OPS.linear_cross_entropy(np.full((1, 1, 1), 1e4), weight, np.array([[1]]), gather=None)
    assert loss_sum == pytest.approx(1000)


def test_a_weight_of_another_shape_is_refused() -> None:
    ops = NumpyOps({"w": np.ones((2, 3))})
    with pytest.raises(AssertionError, match=r"w is \(2, 3\)"):
        ops.param("w", Param(shape=(3, 2), axes=("embed", "ffn"), init=Ones()))


def test_an_untrained_model_knows_nothing() -> None:
    program = lower(load("preset:tiny"))
    weights = {name: draw(param, name, 0) for name, param in program.params().items()}
    ids, targets = np.random.default_rng(0).integers(0, 512, (2, 4, 32))
    step = Step(positions_BS=np.broadcast_to(np.arange(32), (4, 32)), targets_BS=targets)
    loss_sum, count = run_numpy(program, weights, ids, step=step)
    assert loss_sum / count == pytest.approx(np.log(512), rel=0.05)
