"""The oracle: the Program in float64 NumPy, by the shortest code that is plainly right.

B batch, S sequence, D hidden, N query heads, K key/value heads, H head_dim, V vocabulary, L visible positions,
P cache capacity, E experts, X experts of a token.
"""

import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from archwright.compiler.ir import Boundary, Mask, Param, Penalties, Program, RopeTable, Routing, Step, Window
from archwright.compiler.ir.program import instance_of

Array = NDArray[Any]


class NumpyOps:
    """Ops over float64 arrays. weights: canonical name → array of the parameter's shape.

    cache: (path, state) → array [B, K, P, H], updated in place; only read where the step has a write_index.
    """

    def __init__(self, weights: Mapping[str, Array], cache: dict[tuple[str, str], Array] | None = None) -> None:
        self._weights = weights
        self._cache = cache if cache is not None else {}

    def scope(self, path: str) -> AbstractContextManager[None]:
        return nullcontext()

    def param(self, name: str, param: Param) -> Array:
        weight = np.asarray(self._weights[name], dtype=np.float64)
        assert weight.shape == param.shape, f"{name} is {weight.shape}, its block says {param.shape}"
        return weight

    def linear(
        self, x: Array, weight: Array, bias: Array | None, *, reduce: Boundary | None, gather: Boundary | None = None
    ) -> Array:
        return x @ weight.T if bias is None else x @ weight.T + bias

    def dequantize(self, weight: Array, scale: Array) -> Array:
        return weight * np.repeat(scale, weight.shape[-1] // scale.shape[-1], axis=-1)

    def round_to_float8(self, x: Array, scale_11: Array) -> Array:
        return float8(x / scale_11[0, 0]) * scale_11[0, 0]

    def embed(self, ids_BS: Array, weight_VD: Array, *, reduce: Boundary | None) -> Array:
        return weight_VD[ids_BS]

    def rms_norm(self, x_BSD: Array, weight_D: Array, eps: float) -> Array:
        return x_BSD / np.sqrt(np.mean(x_BSD**2, axis=-1, keepdims=True) + eps) * weight_D

    def layer_norm(self, x_BSD: Array, weight_D: Array, bias_D: Array | None, eps: float) -> Array:
        centred_BSD = x_BSD - np.mean(x_BSD, axis=-1, keepdims=True)
        y_BSD = centred_BSD / np.sqrt(np.mean(centred_BSD**2, axis=-1, keepdims=True) + eps) * weight_D
        return y_BSD if bias_D is None else y_BSD + bias_D

    def silu(self, x: Array) -> Array:
        return x * 0.5 * (1 + np.tanh(0.5 * x))  # x · sigmoid(x), without overflow

    def gelu(self, x: Array, approximation: str) -> Array:
        if approximation == "tanh":
            return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        return 0.5 * x * (1 + np.vectorize(math.erf, otypes=[np.float64])(x / math.sqrt(2)))

    def channels(self, x: Array, start: int, stop: int) -> Array:
        return x[..., start:stop]

    def split_heads(self, x: Array, head_dim: int) -> Array:
        return x.reshape(*x.shape[:2], -1, head_dim).swapaxes(1, 2)

    def merge_heads(self, x: Array) -> Array:
        x = x.swapaxes(1, 2)
        return x.reshape(*x.shape[:2], -1)

    def rope(self, x_BNSH: Array, table: RopeTable, step: Step[Array]) -> Array:
        angle_B1SH = step.positions_BS[:, None, :, None] * np.array(table.frequencies())
        first, second = np.split(x_BNSH, 2, axis=-1)
        cos, sin = np.cos(angle_B1SH), np.sin(angle_B1SH)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    def kv_update(self, m: Any, name: str, x_BKSH: Array, step: Step[Array]) -> Array:
        if step.write_index_B is None or step.kv_positions_L is None:
            return x_BKSH
        cache_BKPH = self._cache[m.path, name]
        for row, start in enumerate(step.write_index_B):
            cache_BKPH[row, :, start : start + x_BKSH.shape[2]] = x_BKSH[row]
        return cache_BKPH[:, :, : len(step.kv_positions_L)]

    def attention(
        self, q_BNSH: Array, k_BKLH: Array, v_BKLH: Array, *, mask: Mask, scale: float, step: Step[Array]
    ) -> Array:
        groups = q_BNSH.shape[1] // k_BKLH.shape[1]
        k_BNLH, v_BNLH = np.repeat(k_BKLH, groups, axis=1), np.repeat(v_BKLH, groups, axis=1)
        keys_BL = step.positions_BS if step.kv_positions_L is None else step.kv_positions_L[None]
        distance_B1SL = (step.positions_BS[:, :, None] - keys_BL[:, None, :])[:, None]
        visible_B1SL = distance_B1SL >= 0
        if isinstance(mask, Window):
            visible_B1SL &= distance_B1SL < mask.size
        score_BNSL = np.where(visible_B1SL, scale * (q_BNSH @ k_BNLH.swapaxes(2, 3)), -np.inf)
        weight_BNSL = np.exp(score_BNSL - score_BNSL.max(axis=-1, keepdims=True))
        return weight_BNSL / weight_BNSL.sum(axis=-1, keepdims=True) @ v_BNLH

    def take_token(self, x_BSD: Array, index_B: Array) -> Array:
        return x_BSD[np.arange(len(index_B)), index_B][:, None]

    def top_k(self, x_BSE: Array, number: int) -> Array:
        return np.argsort(-x_BSE, axis=-1, kind="stable")[..., :number]

    def routing_weights(self, logits_BSE: Array, indices_BSX: Array, routing: Routing) -> Array:
        chosen_BSX = np.take_along_axis(_scores(logits_BSE, routing), indices_BSX, axis=-1)
        if routing.normalize:
            chosen_BSX = chosen_BSX / chosen_BSX.sum(axis=-1, keepdims=True)
        return routing.scale * chosen_BSX

    def experts(
        self,
        x_BSD: Array,
        weights_BSX: Array,
        indices_BSX: Array,
        gate_EFD: Array,
        up_EFD: Array,
        down_EDF: Array,
        *,
        dispatch: str | None,
        reduce: Boundary | None,
    ) -> Array:
        y_BSD = np.zeros_like(x_BSD)
        for batch, position, slot in np.ndindex(indices_BSX.shape):
            x_D, expert = x_BSD[batch, position], indices_BSX[batch, position, slot]
            hidden_F = self.silu(gate_EFD[expert] @ x_D) * (up_EFD[expert] @ x_D)
            y_BSD[batch, position] += weights_BSX[batch, position, slot] * (down_EDF[expert] @ hidden_F)
        return y_BSD

    def router_penalty(
        self, logits_BSE: Array, indices_BSX: Array, routing: Routing, penalties: Penalties, *, spread: str | None
    ) -> Array:
        batch, _, experts = logits_BSE.shape
        score_BSE = _scores(logits_BSE, routing)
        share_BE = (score_BSE / score_BSE.sum(axis=-1, keepdims=True)).mean(axis=1)
        counts_BE = np.stack([np.bincount(indices_BSX[row].ravel(), minlength=experts) for row in range(batch)])
        chosen_BE = counts_BE / (indices_BSX.shape[1] * indices_BSX.shape[2])
        balance_B = experts * (chosen_BE * share_BE).sum(axis=-1)
        largest_BS1 = logits_BSE.max(axis=-1, keepdims=True)
        log_sum_BS = np.log(np.exp(logits_BSE - largest_BS1).sum(axis=-1)) + largest_BS1[..., 0]
        return penalties.balance * balance_B + penalties.z * (log_sum_BS**2).mean(axis=-1)

    def sum_over_targets(self, penalty_B: Array, targets_BS: Array) -> Array:
        return np.sum(penalty_B * (targets_BS != -100).sum(axis=-1))

    def linear_cross_entropy(
        self, x_BSD: Array, weight_VD: Array, targets_BS: Array, *, gather: Boundary | None
    ) -> tuple[Array, int]:
        logits_BSV = x_BSD @ weight_VD.T
        largest_BS1 = logits_BSV.max(axis=-1, keepdims=True)
        log_sum_BS = np.log(np.exp(logits_BSV - largest_BS1).sum(axis=-1)) + largest_BS1[..., 0]
        valid_BS = targets_BS != -100
        picked_BS = np.take_along_axis(logits_BSV, np.where(valid_BS, targets_BS, 0)[..., None], axis=-1)[..., 0]
        return np.sum((log_sum_BS - picked_BS) * valid_BS), int(valid_BS.sum())


def float8(x: Array) -> Array:
    """The nearest values of E4M3, ties to even, at most ±448: 3 bits behind the first, exponents from -6 to 8."""
    exponent = np.maximum(np.frexp(x)[1] - 1, -6)
    step = np.ldexp(1.0, exponent - 3)
    return np.clip(np.rint(x / step) * step, -448, 448)


def _scores(logits_BSE: Array, routing: Routing) -> Array:
    if routing.score == "sigmoid":
        return 0.5 * (1 + np.tanh(0.5 * logits_BSE))  # 1 / (1 + exp(-x)), without overflow
    score_BSE = np.exp(logits_BSE - logits_BSE.max(axis=-1, keepdims=True))
    return score_BSE / score_BSE.sum(axis=-1, keepdims=True)


class FollowingNumpyOps(NumpyOps):
    """The oracle of a target that rounds its inputs to 8-bit floats, where a last bit decides between two neighbours.

    followed: what the target rounded to, [B, S, D] for each rounding in program order, NaN where it did not. It is
    taken where it is an 8-bit float times the scale, and as near as the nearest up to `margin` times the largest input;
    elsewhere the oracle has its own.
    """

    def __init__(
        self,
        weights: Mapping[str, Array],
        cache: dict[tuple[str, str], Array] | None,
        followed: Iterable[Array],
        margin: float,
    ) -> None:
        super().__init__(weights, cache)
        self._followed = iter(followed)
        self._margin = margin

    def round_to_float8(self, x: Array, scale_11: Array) -> Array:
        own, theirs = super().round_to_float8(x, scale_11), next(self._followed)
        theirs = np.where(np.isnan(theirs), own, theirs)
        exact = super().round_to_float8(theirs, scale_11)
        rounded = np.abs(theirs - exact) <= 1e-6 * np.abs(exact)  # a product in the target's precision
        legal = np.abs(exact - x) <= np.abs(own - x) + self._margin * np.abs(x).max()
        return np.where(rounded & legal, exact, own)


def run_numpy(
    program: Program,
    weights: Mapping[str, Array],
    ids_BS: Array,
    *,
    step: Step[Array] | None = None,
    cache: dict[tuple[str, str], Array] | None = None,
    ops: NumpyOps | None = None,
) -> Any:
    """Logits [B, S, V] in float64, or (loss_sum, num_tokens) where the step carries targets.

    step: positions 0..S-1 by default. cache: see `make_cache`; needed where the step has a write_index. ops:
    in place of NumpyOps over weights and cache.
    """
    if step is None:
        step = Step(positions_BS=np.broadcast_to(np.arange(ids_BS.shape[1]), ids_BS.shape))
    return program.run(instance_of(program, ops or NumpyOps(weights, cache)), ids_BS, step)


def make_cache(
    program: Program, *, batch: int, positions: int, dtype: Any = np.float64
) -> dict[tuple[str, str], Array]:
    """Zeroed states of a Program: (path, name) → [batch, kv_heads, positions, head_dim]."""
    known = {"batch": batch, "positions": positions}
    return {
        (path, name): np.zeros([known.get(a, size) for a, size in zip(s.axes, s.sizes, strict=True)], dtype)
        for path, states in program.states().items()
        for name, s in states.items()
    }
