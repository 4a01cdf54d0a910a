"""Hugging Face's `config.json` for the families that we share with `transformers`."""

from typing import Any

from archwright.compiler.passes.lower import head_dim
from archwright.spec.models import Spec


def config_json(spec: Spec, dtype: str) -> dict[str, Any]:
    """The `LlamaConfig` of a spec (transformers 5 spelling: `rope_parameters`, `dtype`)."""
    model, layer = spec.model, spec.model.layer
    attention, rope = layer.attention, layer.attention.position
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": rope.theta}
    if rope.scaling is not None:
        parameters |= {
            "rope_type": "llama3",
            "factor": rope.scaling.factor,
            "low_freq_factor": rope.scaling.low_frequency_factor,
            "high_freq_factor": rope.scaling.high_frequency_factor,
            "original_max_position_embeddings": rope.scaling.original_max_positions,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": layer.ffn.hidden_size,
        "num_hidden_layers": model.layers,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads or attention.heads,
        "head_dim": head_dim(model, attention),
        "hidden_act": "silu",
        "max_position_embeddings": model.max_positions,
        "initializer_range": model.init.std,
        "rms_norm_eps": layer.norm.eps,
        "rope_parameters": parameters,
        "tie_word_embeddings": model.tied_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": dtype,
    }
