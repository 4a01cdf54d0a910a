"""Activation-aware weight quantization (Lin et al. 2023): multiply the input channels that matter before rounding.

W x = (W diag(s)) (diag(1/s) x): a channel with a large input gets a large s and is rounded in finer steps of its own
size; 1/s goes into the weights before it, so that the model stays the same and no operator is added. Different from the
paper, s are powers of two, so that folding is exact in every precision, and no clipping is searched.

T tokens, D input channels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from archwright.compiler.blocks import GroupedQueryAttention, Head, LayerNorm, Linear, RMSNorm, SwiGLU
from archwright.compiler.blocks.quantized import QuantHead, QuantLinear
from archwright.compiler.ir import Block, Param, Program
from archwright.compiler.weights.quantized import as_float32, dequantized, group_scales, rounded
from archwright.compiler.weights.scaled import ScaledWeights
from archwright.compiler.weights.streaming import Weights
from archwright.spec.models import Quantize
from archwright.spec.quantization import rule_for

Array = NDArray[Any]
GRID = 20
"""Exponents that are tried: 0, 1/GRID, ..., 1."""


@dataclass(frozen=True, kw_only=True)
class Fold:
    """Matrices that read the same input, and the tensors before it whose rows are divided.

    readers: paths of blocks; every reader of the input, quantized or not. sources: names of tensors.
    repeat: query heads that each row of the sources feeds; head_dim: rows that are repeated together.
    """

    readers: tuple[str, ...]
    sources: tuple[str, ...]
    repeat: int = 1
    head_dim: int = 1

    def spread(self, s: Array) -> Array:
        """A scale for each row of the sources → one for each input channel of the readers."""
        return np.repeat(s.reshape(-1, self.head_dim), self.repeat, axis=0).reshape(-1)

    def gathered(self, statistic_D: Array) -> Array:
        """The mean over the input channels that a row of the sources feeds."""
        return statistic_D.reshape(-1, self.repeat, self.head_dim).mean(axis=1).reshape(-1)


def folds(program: Program, chosen: Quantize) -> list[Fold]:
    """The places of `program` where a rule with `method: awq` decides about one of the readers."""
    owned = program.params()  # a tied head's matrix is the embedding's, which other tokens read unscaled
    return [
        fold
        for path, block in program.blocks()
        for fold in _folds(path, block)
        if any(_is_awq(chosen, reader) for reader in fold.readers) and f"{fold.readers[0]}.weight" in owned
    ]


def _is_awq(chosen: Quantize, path: str) -> bool:
    rule = rule_for(chosen, path)
    return rule is not None and rule.kind == "int4" and rule.method == "awq"


def _folds(path: str, block: Block) -> list[Fold]:
    """The folds of one block: a decoder layer's norms, what is inside attention and feed-forward, and the head's."""
    found: list[Fold] = []
    children = block.children()
    for norm, reader in (("input_layernorm", "self_attn"), ("post_attention_layernorm", "mlp"), ("norm", "lm_head")):
        if norm in children and reader in children:
            readers = _first_matrices(children[reader], block.child_path(reader, path))
            if readers:
                found.append(Fold(readers=readers, sources=_params(children[norm], block.child_path(norm, path))))
    if isinstance(block, GroupedQueryAttention):
        heads, kv_heads = (m.weight.shape[0] // block.head_dim for m in (block.q_proj, block.k_proj))
        sources = _params(block.v_proj, f"{path}.v_proj")
        found.append(
            Fold(readers=(f"{path}.o_proj",), sources=sources, repeat=heads // kv_heads, head_dim=block.head_dim)
        )
    if isinstance(block, SwiGLU) and not path.endswith(".shared_experts"):
        found.append(Fold(readers=(f"{path}.down_proj",), sources=_params(block.up_proj, f"{path}.up_proj")))
    return found


def _first_matrices(block: Block, path: str) -> tuple[str, ...]:
    """The matrices that read a block's own input; none where experts do, whose matrices are a stack."""
    if isinstance(block, Head):
        return (path,)
    names = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "fc1")
    return tuple(
        f"{path}.{name}" for name, sub in block.children().items() if name in names and isinstance(sub, Linear)
    )


def _params(block: Block, path: str) -> tuple[str, ...]:
    """Names of what a scale of the block's output multiplies: weight and bias."""
    assert isinstance(block, Linear | RMSNorm | LayerNorm)
    return tuple(f"{path}.{name}" for name in ("weight", "bias") if getattr(block, name, None) is not None)


@dataclass(kw_only=True)
class Scales:
    """What all folds multiply and divide, by the name of the tensor."""

    rows: dict[str, Array] = field(default_factory=dict[str, Array])
    columns: dict[str, Array] = field(default_factory=dict[str, Array])
    exponents: dict[str, float] = field(default_factory=dict[str, float])

    def add(self, fold: Fold, s: Array, exponent: float) -> None:
        for name in fold.sources:
            self.rows[name] = (1 / s).astype(np.float32)
        for path in fold.readers:
            self.columns[f"{path}.weight"] = fold.spread(s).astype(np.float32)
            self.exponents[path] = exponent

    def apply(self, base: Weights) -> Weights:
        return ScaledWeights(base=base, rows=self.rows, columns=self.columns) if self.rows else base


def search(
    fold: Fold,
    program: Program,
    base: Weights,
    inputs: Mapping[str, Array],
    means: Mapping[str, Array],
    *,
    precision: str,
) -> tuple[Array, float]:
    """The scales [rows of the sources] with the least squared error of the readers' outputs, and their exponent.

    inputs, means: by the first reader's path, sampled inputs [T, D] and the mean magnitude of each channel [D].
    Exponent 0 is rounding to nearest as it is, so calibration inputs never come out worse.
    """
    mean = fold.gathered(np.asarray(means[fold.readers[0]], np.float64))
    blocks, x_TD = dict(program.blocks()), inputs[fold.readers[0]]
    errors: list[Callable[[Array], float]] = []
    for path in fold.readers:
        block = blocks[path]
        if isinstance(block, QuantLinear | QuantHead):
            weight = as_float32(base.read(f"{path}.weight"))
            errors.append(_error_of(weight, x_TD, block.weight, block.weight_scale, precision))
    best, best_error, best_exponent = np.ones_like(mean), np.inf, 0.0
    for step in range(GRID + 1):
        s = scales(mean, step / GRID)
        error = sum(each(fold.spread(s).astype(np.float32)) for each in errors)
        if error < best_error:
            best, best_error, best_exponent = s, error, step / GRID
    return best, best_exponent


def scales(mean: Array, exponent: float) -> Array:
    """mean ** exponent, around 1, as powers of two."""
    floor = max(float(mean.max()) * 1e-4, np.finfo(np.float64).tiny)
    power = exponent * np.log2(np.maximum(mean, floor))
    return np.exp2(np.rint(power - (power.max() + power.min()) / 2))


def _error_of(weight: Array, x_TD: Array, param: Param, scale_param: Param, precision: str) -> Callable[[Array], float]:
    """s → ‖x (W - Q(W s) / s)ᵀ‖²."""
    groups = scale_param.shape[-1]
    assert param.storage is not None
    storage = param.storage

    def error(s: Array) -> float:
        values = (weight * s).reshape(len(weight), groups, -1)
        scale = group_scales(values, storage, precision)
        again = dequantized(rounded(values, scale, storage).reshape(weight.shape), scale) / s
        return float(np.square(x_TD @ (weight - again).T, dtype=np.float64).sum())

    return error


def find_scales(
    all_folds: Sequence[Fold],
    program: Program,
    base: Weights,
    inputs: Mapping[str, Array],
    means: Mapping[str, Array],
    *,
    precision: str,
    progress: Callable[[str], None] = lambda message: None,
) -> Scales:
    """`search` for each fold. program: the quantized one; names of its matrices are those of `base`."""
    found = Scales()
    for number, fold in enumerate(all_folds, 1):
        progress(f"scaling channels, {number} of {len(all_folds)}: {fold.readers[0]}")
        s, exponent = search(fold, program, base, inputs, means, precision=precision)
        found.add(fold, s, exponent)
    return found
