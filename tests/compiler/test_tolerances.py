"""The measure of error."""

import numpy as np
import pytest

from archwright.compiler.tolerances import largest_error


def test_errors_are_relative_to_the_largest_magnitude():
    expected = np.array([0.0, -4.0, 1.0])
    assert largest_error(np.array([0.0, -4.0, 1.0], np.float32), expected) == 0
    assert largest_error(np.array([0.2, -4.0, 1.0]), expected) == pytest.approx(0.05)


@pytest.mark.parametrize("actual", [np.zeros(2), np.array([0.0, np.nan, 0.0]), np.array([np.inf, 0.0, 0.0])])
def test_other_shapes_and_values_that_are_not_finite_are_infinitely_wrong(actual):
    assert largest_error(actual, np.ones(3)) == float("inf")


def test_zeros_are_met_only_by_zeros():
    assert largest_error(np.zeros(3), np.zeros(3)) == 0
    assert largest_error(np.full(3, 1e-9), np.zeros(3)) > 1e9
