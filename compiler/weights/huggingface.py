"""Hugging Face's `config.json` for the families that we share with `transformers`."""

from typing import Any

from archwright.spec.models import Layer, Model, Rope, Spec, SwiGluFfn


def config_json(spec: Spec, dtype: str) -> dict[str, Any] | None:
    """The configuration of a spec (transformers 5 spelling: `rope_parameters`, `dtype`); None for no known family.

    Llama: equal layers of RMSNorm, RoPE, causal attention, SwiGLU. Mistral: the same under a sliding window. Qwen2:
    the same with biases on queries, keys and values. `LlamaConfig` refuses a hidden size that is no multiple of the
    heads, even where `head_dim` is given: such a model has no configuration rather than one that fails to load. Nor has
    a mixture of experts, whose matrices `transformers` keeps under other names in its files.
    """
    model = spec.model
    layer = model.runs[0].layer
    family = _family(model, layer)
    if family is None or not isinstance(layer.ffn, SwiGluFfn):
        return None
    attention, mask = layer.attention, layer.attention.mask
    config: dict[str, Any] = {
        "architectures": [f"{family}ForCausalLM"],
        "model_type": family.lower(),
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": layer.ffn.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads or attention.heads,
        "head_dim": model.head_dim(attention),
        "hidden_act": "silu",
        "max_position_embeddings": model.max_positions,
        "initializer_range": model.init.std,
        "rms_norm_eps": layer.norm.eps,
        "rope_parameters": _rope_parameters(layer),
        "tie_word_embeddings": model.tied_embeddings,
        "dtype": dtype,
    }
    if family == "Llama":
        config |= {"attention_bias": attention.bias == "all", "mlp_bias": layer.ffn.bias}
    if family == "Mistral" and mask.kind == "window":
        config["sliding_window"] = mask.size
    return config


def _family(model: Model, layer: Layer) -> str | None:
    attention = layer.attention
    common = (
        all(run.layer == layer for run in model.runs)
        and model.positions is None
        and layer.norm.kind == "rmsnorm"
        and attention.position.kind == "rope"
    )
    if not common or not isinstance(layer.ffn, SwiGluFfn):
        return None
    plain = not layer.ffn.bias and attention.bias == "none"
    if attention.mask.kind == "window":
        return "Mistral" if plain else None
    if attention.bias == "qkv":
        return "Qwen2" if not layer.ffn.bias else None
    return None if model.hidden_size % attention.heads else "Llama"


def _rope_parameters(layer: Layer) -> dict[str, Any]:
    rope = layer.attention.position
    assert isinstance(rope, Rope)
    if rope.scaling is None:
        return {"rope_type": "default", "rope_theta": rope.theta}
    return {
        "rope_type": "llama3",
        "rope_theta": rope.theta,
        "factor": rope.scaling.factor,
        "low_freq_factor": rope.scaling.low_frequency_factor,
        "high_freq_factor": rope.scaling.high_frequency_factor,
        "original_max_position_embeddings": rope.scaling.original_max_positions,
    }
