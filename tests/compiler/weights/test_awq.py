"""The scales of AWQ are folded so that the model stays the same, and are chosen by the error of what a matrix gives."""

import numpy as np
import pytest

from archwright.compiler.interpreters.numpy_ops import run_numpy
from archwright.compiler.passes import build_program, lower
from archwright.compiler.weights.awq import Fold, Scales, folds, scales, search
from archwright.compiler.weights.streaming import GeneratedWeights
from archwright.spec import Spec, load

AWQ = {"kind": "int4", "group_size": 32, "method": "awq"}
SWIGLU = {"kind": "swiglu", "hidden_size": 64, "bias": True}


def spec_of(*rules: object, **model: object) -> Spec:
    base = {"model.hidden_size": 64, "model.layer.ffn": SWIGLU, "model.tied_embeddings": False, "tokenizer": None}
    more = {f"model.{name}": value for name, value in model.items()}
    build = {"build.quantize": {"rules": list(rules)}, "model.init": {"kind": "normal", "std": 0.3}}
    return load("preset:tiny", base | {"train": None} | build | more)


def params_of(spec: Spec) -> GeneratedWeights:
    return GeneratedWeights(params=lower(spec).params(), seed=0)


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_folding_any_scales_keeps_the_model(norm: str) -> None:
    spec = spec_of(AWQ, {**AWQ, "match": "lm_head"}, layer={
        "norm": {"kind": norm}, "ffn": SWIGLU,
        "attention": {"kind": "gqa", "heads": 4, "kv_heads": 2, "head_dim": 16, "bias": "all"},
    })  # fmt: skip
    program, base = lower(spec), params_of(spec)
    arrays = {name: base.read(name) + 0.1 for name in base.names()}  # biases and norms that are not trivial
    found, rng = Scales(), np.random.default_rng(0)
    all_folds = folds(build_program(spec), spec.build.quantize)
    assert len(all_folds) == 2 * 4 + 1
    for fold in all_folds:
        size = arrays[fold.sources[0]].shape[0]
        found.add(fold, np.exp2(rng.integers(-3, 4, size)), 0.5)
    from tests.parity.cases import TestWeights

    scaled = found.apply(TestWeights(tensors=arrays))
    ids_BS = rng.integers(0, program.vocab_size, (2, 9))
    changed = {name: scaled.read(name) for name in arrays}
    assert any((changed[name] != arrays[name]).any() for name in arrays)
    expected = run_numpy(program, arrays, ids_BS)
    np.testing.assert_allclose(run_numpy(program, changed, ids_BS), expected, rtol=1e-6, atol=1e-6)


def test_a_part_of_scaled_weights_is_a_part_of_the_whole() -> None:
    spec = spec_of(AWQ)
    base, found = params_of(spec), Scales()
    for fold in folds(build_program(spec), spec.build.quantize):
        size = base.shape(fold.sources[0])[0]
        found.add(fold, np.exp2(np.arange(size) % 5 - 2.0), 1.0)
    scaled = found.apply(base)
    for name in base.names():
        whole = scaled.read(name)
        slices = tuple(slice(size // 4, size // 2) for size in whole.shape)
        np.testing.assert_array_equal(scaled.read(name, slices), whole[slices])


def test_scales_are_powers_of_two_around_one() -> None:
    s = scales(np.array([1e-9, 0.5, 1.0, 900.0]), 0.5)
    assert (np.exp2(np.rint(np.log2(s))) == s).all() and s.min() * s.max() in (0.5, 1.0, 2.0)
    assert (scales(np.array([3.0, 0.0]), 0.0) == 1).all()


def test_a_channel_that_is_large_is_rounded_finely() -> None:
    """64 times as large an input, and columns as much smaller: rounding to nearest loses them, the search does not."""
    spec = spec_of(AWQ)
    quantized, base = build_program(spec), params_of(spec)
    arrays = {name: base.read(name).copy() for name in base.names()}
    from tests.parity.cases import TestWeights

    fold = next(f for f in folds(quantized, spec.build.quantize) if f.readers[0].endswith("0.mlp.gate_proj"))
    x_TD = np.random.default_rng(0).normal(size=(200, 64)).astype(np.float32)
    x_TD[:, 5] *= 64
    for reader in fold.readers:
        arrays[f"{reader}.weight"][:, 5] /= 64
    weights = TestWeights(tensors=arrays)
    mean_D = np.abs(x_TD).mean(axis=0)

    def error(s: np.ndarray) -> float:
        from archwright.compiler.weights.awq import _error_of

        block = dict(quantized.blocks())[fold.readers[0]]
        weight = arrays[f"{fold.readers[0]}.weight"]
        return _error_of(weight, x_TD, block.weight, block.weight_scale, "float32")(s)

    s, exponent = search(
        fold, quantized, weights, {fold.readers[0]: x_TD}, {fold.readers[0]: mean_D}, precision="float32"
    )
    assert exponent > 0 and s[5] == s.max()
    assert error(s.astype(np.float32)) < 0.6 * error(np.ones(64, np.float32))


def test_heads_that_share_values_share_scales() -> None:
    fold = Fold(readers=("o_proj",), sources=("v_proj.weight",), repeat=2, head_dim=2)
    assert fold.spread(np.array([1, 2, 3, 4.0])).tolist() == [1, 2, 1, 2, 3, 4, 3, 4]
    assert fold.gathered(np.array([1, 2, 3, 4, 5, 6, 7, 8.0])).tolist() == [2, 3, 6, 7]


def test_a_tied_head_and_experts_are_not_folded() -> None:
    keep = {"kind": "keep", "match": "model.embed_tokens"}
    tied = spec_of(keep, {**AWQ, "match": "*"}, tied_embeddings=True)
    assert not any("lm_head" in fold.readers for fold in folds(build_program(tied), tied.build.quantize))
    moe = spec_of({**AWQ, "match": "*.self_attn.*"}, **{"layer.ffn": {"kind": "moe", "experts": 4, "hidden_size": 64}})
    readers = {reader for fold in folds(build_program(moe), moe.build.quantize) for reader in fold.readers}
    assert readers and all(".self_attn." in reader for reader in readers)
