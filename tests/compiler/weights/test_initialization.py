"""Initial weights: the same numbers under every plan, and normal ones."""

import hashlib
from itertools import pairwise
from statistics import NormalDist

import numpy as np
import pytest

from archwright.compiler.ir import Degrees, Normal, Ones, Param
from archwright.compiler.passes import lower, partition
from archwright.compiler.weights import initialization
from archwright.compiler.weights.initialization import BLOCK, draw
from archwright.spec import load

NAME = "model.layers.0.mlp.down_proj.weight"
MATRIX = Param(shape=(70, 3000), axes=("embed", "ffn"), init=Normal(std=0.02))  # 3.2 blocks


def test_golden_values() -> None:
    """A change here changes every model that is trained from a seed."""
    values = draw(MATRIX, NAME, 0)
    assert values.dtype == np.float32
    expected = [0.01530260406434536, -0.012972461059689522, -0.014287789352238178, -0.001134676393121481]
    assert values[0, :4].tolist() == expected
    assert values[69, -2:].tolist() == [-0.015739891678094864, 0.010851751081645489]
    digest = "e43e7be8610add37dc8c1f909c1ed36b90abee3590317b11eb2c2762877d5804"
    assert hashlib.sha256(values.tobytes()).hexdigest() == digest


@pytest.mark.parametrize(
    "slices",
    [
        (slice(20, 25), slice(None)),
        (slice(21, 23), slice(2500, 3000)),
        (slice(None), slice(0, 1)),
        (slice(69, 70), slice(2999, 3000)),
        (slice(None, 0), slice(None)),
    ],
)
def test_a_slice_is_the_slice_of_the_whole(slices: tuple[slice, ...]) -> None:
    np.testing.assert_array_equal(draw(MATRIX, NAME, 3, slices), draw(MATRIX, NAME, 3)[slices])


def test_a_slice_of_a_stack_of_matrices() -> None:
    """Experts are drawn matrix by matrix, as the stream of the whole tensor."""
    stack = Param(shape=(5, 70, 3000), axes=("expert", "embed", "ffn"), init=Normal(std=0.02))
    flat = Param(shape=(350, 3000), axes=("embed", "ffn"), init=Normal(std=0.02))
    whole = draw(flat, NAME, 3).reshape(stack.shape)
    np.testing.assert_array_equal(draw(stack, NAME, 3), whole)
    for part in ((slice(1, 3), slice(None), slice(7, 1500)), (slice(4, 5), slice(69, 70), slice(None))):
        np.testing.assert_array_equal(draw(stack, NAME, 3, part), whole[part])


def test_rows_longer_than_many_blocks() -> None:
    wide = Param(shape=(3, 20 * BLOCK + 5), axes=("embed", "ffn"), init=Normal(std=1.0))
    tail = (slice(1, 3), slice(BLOCK - 2, BLOCK + 2))
    np.testing.assert_array_equal(draw(wide, NAME, 0, tail), draw(wide, NAME, 0)[tail])


@pytest.mark.parametrize("degree", [2, 4])
def test_ranks_together_draw_the_same_full_tensors(degree: int) -> None:
    program = lower(load("preset:tiny"))
    whole = {name: hashlib.sha256(draw(p, name, 7).tobytes()).hexdigest() for name, p in program.params().items()}
    for name, param in partition(program, Degrees(tensor=degree)).program.params().items():
        full = np.full(param.shape, np.nan, np.float32)
        for rank in range(degree):
            part = param.split.slices(param.shape, rank) if param.split else (slice(None),) * len(param.shape)
            full[part] = draw(param, name, 7, part)
        assert hashlib.sha256(full.tobytes()).hexdigest() == whole[name], name


def test_values_do_not_depend_on_the_number_of_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = Param(shape=(64, BLOCK), axes=("embed", "ffn"), init=Normal(std=1.0))
    many = draw(wide, NAME, 0)
    monkeypatch.setattr(initialization, "cpu_count", lambda: 1)
    np.testing.assert_array_equal(draw(wide, NAME, 0), many)


def test_values_are_normal() -> None:
    values = draw(Param(shape=(1024, 2048), axes=("embed", "ffn"), init=Normal(std=0.5)), NAME, 0).ravel() / 0.5
    error = 1 / np.sqrt(values.size)
    assert abs(values.mean()) < 4 * error and abs(values.std() - 1) < 4 * error
    for probability in (0.0001, 0.01, 0.25, 0.5, 0.75, 0.99, 0.9999):
        quantile = NormalDist().inv_cdf(probability)
        below = (values < quantile).mean()
        assert abs(below - probability) < 5 * np.sqrt(probability * (1 - probability)) * error + 1 / BLOCK
    assert abs((values**4).mean() - 3) < 0.02, "kurtosis"


def test_neighbours_and_blocks_are_independent() -> None:
    values = draw(Param(shape=(32, BLOCK), axes=("embed", "ffn"), init=Normal(std=1.0)), NAME, 0)
    bound = 5 / np.sqrt(BLOCK)
    for first, second in pairwise(values):  # each row is a block
        assert abs(np.mean(first * second)) < bound
    assert abs(np.mean(values[:, 1:] * values[:, :-1])) < bound


def test_names_and_seeds_give_other_values() -> None:
    first = draw(MATRIX, NAME, 0)
    for other in (draw(MATRIX, NAME, 1), draw(MATRIX, NAME.replace("0", "1"), 0), draw(MATRIX, "0:" + NAME, 0)):
        assert np.mean(first == other) < 0.001
        assert abs(np.corrcoef(first.ravel(), other.ravel())[0, 1]) < 0.02
    np.testing.assert_array_equal(first, draw(MATRIX, NAME, 0))


def test_norms_begin_at_one() -> None:
    norm = Param(shape=(7,), axes=("embed",), init=Ones())
    assert draw(norm, "model.norm.weight", 5, (slice(2, 5),)).tolist() == [1, 1, 1]
