"""spec → Program."""

import math

import pytest

from archwright.compiler.blocks import DecoderLayer
from archwright.compiler.ir import Normal, Ones
from archwright.compiler.passes import lower
from archwright.spec import load


@pytest.mark.parametrize(("preset", "count"), [("llama3.2-1b", 1_235_814_400), ("llama3.1-8b", 8_030_261_248)])
def test_presets_have_the_published_number_of_parameters(preset: str, count: int) -> None:
    assert lower(load(f"preset:{preset}")).num_params() == count


def test_head_dim_and_kv_heads_have_defaults() -> None:
    program = lower(load("preset:tiny", {"model.layer.attention": {"kind": "gqa", "heads": 8, "kv_heads": None}}))
    params = program.params()
    layer = program.segments[1].block
    assert isinstance(layer, DecoderLayer) and layer.self_attn.head_dim == 8
    assert params["model.layers.0.self_attn.k_proj.weight"].shape == (64, 64)
    assert params["model.layers.0.self_attn.k_proj.weight"].grain == (8, 1)


def test_depth_scaled_init_shrinks_what_writes_to_the_residual_stream() -> None:
    params = lower(load("preset:tiny", {"model.layers": 8})).params()
    small = Normal(std=0.02 / math.sqrt(2 * 8))
    for name, param in params.items():
        expected = Ones() if "norm" in name else small if "o_proj" in name or "down_proj" in name else Normal(std=0.02)
        assert param.init == expected, name
    plain = lower(load("preset:tiny", {"model.init": {"kind": "normal", "std": 0.1}})).params()
    assert {param.init for param in plain.values()} == {Ones(), Normal(std=0.1)}


def test_every_value_of_the_architecture_arrives() -> None:
    scaling = {"kind": "llama3", "factor": 4.0, "low_frequency_factor": 1.5, "high_frequency_factor": 3.0}
    spec = load(
        "preset:tiny",
        {
            "model.layer.norm.eps": 1e-3,
            "model.layer.attention.position": {"kind": "rope", "theta": 777.0, "scaling": scaling},
        },
    )
    program = lower(spec)
    layer = program.segments[1].block
    assert isinstance(layer, DecoderLayer)
    table = layer.self_attn.position.table
    assert (table.theta, table.factor, table.low, table.high, table.original_positions) == (777.0, 4.0, 1.5, 3.0, 8192)
    assert {layer.input_layernorm.eps, layer.post_attention_layernorm.eps} == {1e-3}
    assert program.segments[-1].block.children()["norm"].eps == 1e-3  # type: ignore[attr-defined]
    assert (program.vocab_size, program.max_positions) == (spec.model.vocab_size, spec.model.max_positions)
