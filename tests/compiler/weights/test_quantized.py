"""Rounding and packing, against slow references that go value by value."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from archwright.compiler.interpreters.numpy_ops import float8
from archwright.compiler.interpreters.onnx_quantization import Packing, pack, unpack
from archwright.compiler.passes import build_plan, build_program, lower
from archwright.compiler.weights.quantized import LARGEST, QuantizedWeights, as_float32, built_weights, dequantized
from archwright.compiler.weights.streaming import GeneratedWeights
from archwright.spec import ArchwrightError, Spec, load
from archwright.spec.quantization import matrices
from tests.parity.cases import TestWeights

MODEL = {
    "model.hidden_size": 128,
    "model.layer.ffn.hidden_size": 256,
    "model.vocab_size": 65,
    "model.layer.attention.head_dim": 64,
    "train": None,
    "tokenizer": None,
    "model.layers": 1,
}
KINDS = {"int4": {"kind": "int4", "group_size": 64}, "int8": {"kind": "int8"}}


def spec_of(*rules: object, tensor: int = 1, precision: str = "bfloat16") -> Spec:
    build = {"build.quantize": {"rules": list(rules)}, "build.parallel.tensor": tensor, "build.precision": precision}
    return load("preset:tiny", MODEL | build)


def source_of(spec: Spec) -> GeneratedWeights:
    return GeneratedWeights(params=lower(spec).params(), seed=3)


@given(st.lists(st.integers(-8, 7), min_size=1, max_size=33), st.sampled_from(["int4", "offset"]))
@settings(max_examples=60)
def test_values_share_bytes_as_onnx_and_onnxruntime_say(values: list[int], packing: Packing) -> None:
    packed = pack(np.array(values, np.int8), packing)
    padded = [*values, 0] if len(values) % 2 else values
    if packing == "int4":
        assert packed.tolist() == [(low & 15) | (high & 15) << 4 for low, high in zip(*[iter(padded)] * 2, strict=True)]
    elif len(values) % 2 == 0:
        assert packed.tolist() == [low + 8 | (high + 8) << 4 for low, high in zip(*[iter(padded)] * 2, strict=True)]
    assert unpack(packed, packing, len(values)).tolist() == values


def test_the_oracle_rounds_to_float8_as_ml_dtypes_does() -> None:
    every = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    every = np.sort(every[np.isfinite(every)])
    between = (every[1:] + every[:-1]) / 2  # ties
    rng = np.random.default_rng(0)
    values = np.concatenate([every, between, between * (1 + 1e-6), rng.normal(0, 60, 4000), rng.normal(0, 1e-3, 400)])
    values = values.astype(np.float32).astype(np.float64)  # which ml_dtypes goes through, and then rounds once more
    np.testing.assert_array_equal(float8(values), values.astype(ml_dtypes.float8_e4m3fn).astype(np.float64))
    assert float8(np.array([1e9, -1e9, 460.0])).tolist() == [448, -448, 448]


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_rounding_is_that_of_a_loop_over_groups(kind: str, precision: str) -> None:
    spec = spec_of(KINDS[kind], precision=precision)
    weights, source = built_weights(spec, source_of(spec)), source_of(spec)
    name = "model.layers.0.mlp.down_proj.weight"
    values, scale = weights.read(name), weights.read(f"{name}_scale")
    plain = source.read(name)
    group = plain.shape[1] // scale.shape[1]
    assert group == (64 if kind == "int4" else 256)
    limit = int(LARGEST[kind])
    for row in (0, 17, 127):
        for number in range(scale.shape[1]):
            part = plain[row, number * group : (number + 1) * group]
            step = np.float32(np.abs(part).max() / np.float32(limit)).astype(scale.dtype)
            assert scale[row, number] == step > 0
            expected = [max(-limit - 1, min(limit, round(float(w / np.float32(step))))) for w in part]
            assert values[row, number * group : (number + 1) * group].tolist() == expected
    error = np.abs(dequantized(values, scale) - plain)
    assert (error <= 0.51 * np.repeat(scale.astype(np.float32), group, axis=1) + limit * 2.0**-8 * np.abs(plain)).all()


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_ranks_part_is_a_slice_of_the_whole(kind: str, tensor: int) -> None:
    """Groups lie inside a rank; a scale that belongs to a whole row is formed from all of it."""
    spec = spec_of(KINDS[kind], {"kind": "int8", "match": "model.embed_tokens"}, tensor=tensor)
    plan, source = build_plan(spec), source_of(spec)
    whole = {name: built_weights(spec, source).read(name) for name in plan.program.params()}
    local = plan.local.params()
    for name, param in plan.program.params().items():
        for rank in range(tensor):
            slices = tuple(slice(None) for _ in param.shape)
            if param.split is not None:
                slices = param.split.slices(param.shape, rank)
            part = built_weights(spec, source).read(name, slices)  # each from scratch: nothing was read before
            np.testing.assert_array_equal(part, whole[name][slices])
            assert part.shape == local[name].shape


def test_scales_that_came_about_are_those_that_are_read() -> None:
    spec = spec_of(KINDS["int4"])
    name = "model.layers.0.self_attn.q_proj.weight"
    fresh, streamed = built_weights(spec, source_of(spec)), built_weights(spec, source_of(spec))
    for start in range(0, 256, 64):
        streamed.read(name, (slice(start, start + 64), slice(None)))
        if start == 0:  # not all rows are known yet
            np.testing.assert_array_equal(streamed.read(f"{name}_scale"), fresh.read(f"{name}_scale"))
    assert isinstance(streamed, QuantizedWeights)
    assert streamed._known.read(f"{name}_scale") is not None
    np.testing.assert_array_equal(streamed.read(f"{name}_scale"), fresh.read(f"{name}_scale"))


def test_empty_and_broken_groups() -> None:
    spec = spec_of(KINDS["int4"], precision="float16")
    tensors = {name: source_of(spec).read(name).copy() for name in lower(spec).params()}
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name][0, :64] = 0
    tensors[name][1, :64] = 1e-9  # below what float16 holds as a scale
    weights = built_weights(spec, TestWeights(tensors=tensors))
    scale = weights.read(f"{name}_scale")
    assert scale[0, 0] == 1 and (scale > 0).all() and scale[1, 0] == np.finfo(np.float16).smallest_normal
    assert not weights.read(name)[:2, :64].any()
    tensors[name][2, 5] = np.inf
    with pytest.raises(ArchwrightError, match="BUILD061") as error:
        built_weights(spec, TestWeights(tensors=tensors)).read(name)
    assert error.value.where == name


def test_bfloat16_is_widened_exactly() -> None:
    values = np.random.default_rng(0).normal(size=(3, 5)).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(as_float32(values), values.astype(np.float32))
    view = np.zeros(4, np.float32)
    as_float32(view)[:] = 1
    assert not view.any(), "a copy, since rounding overwrites it"


def test_the_program_says_how_everything_is_stored() -> None:
    spec = spec_of({"kind": "keep", "match": "*.v_proj"}, KINDS["int4"], {"kind": "int8", "match": "model.embed*"})
    params = build_program(spec).params()
    stored = {name: param.storage for name, param in params.items() if param.storage is not None}
    assert stored.pop("model.embed_tokens.weight") == "int8"
    assert set(stored.values()) == {"int4"} and len(stored) == 6
    assert "model.layers.0.self_attn.v_proj.weight_scale" not in params
    assert params["model.layers.0.mlp.down_proj.weight_scale"].shape == (128, 4)
    assert params["model.embed_tokens.weight_scale"].shape == (65, 1)


def test_what_the_language_names_is_what_is_quantized() -> None:
    """Routers and learned positions are not, whatever a pattern matches."""
    for model in (
        {"model.positions": {"kind": "learned"}, "model.tied_embeddings": False},
        {"model.layer.ffn": {"kind": "moe", "experts": 3, "hidden_size": 64, "shared": {"hidden_size": 64}}},
    ):
        spec = load("preset:tiny", MODEL | model | {"build.quantize": {"rules": [{"kind": "int8", "match": "*"}]}})
        blocks = dict(build_program(spec).blocks())
        stored = {path for path, block in blocks.items() if any(p.storage for p in block.params().values())}
        tied = {"lm_head"} if spec.model.tied_embeddings else set[str]()
        assert stored == {matrix.path for matrix in matrices(spec.model)} | tied
