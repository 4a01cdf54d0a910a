"""spec → Program."""

import math

from archwright.compiler.blocks import (
    DecoderLayer,
    Embedding,
    GroupedQueryAttention,
    LanguageModelHead,
    Linear,
    RMSNorm,
    Rope,
    SwiGLU,
)
from archwright.compiler.ir import Axis, Causal, Normal, Ones, Param, Program, RopeTable, Segment
from archwright.spec.models import GqaAttention, Layer, Model, Spec


def lower(spec: Spec) -> Program:
    """The Program of a spec's model: one segment for the embedding, one a layer, one for the head."""
    model = spec.model
    layer = _layer(model, model.layer)
    table = _matrix(model.vocab_size, model.hidden_size, ("vocab", "embed"), model.init.std)
    if model.tied_embeddings:
        table = Param(shape=table.shape, axes=table.axes, init=table.init, share="embedding")
    return Program(
        segments=(
            Segment(path="model.embed_tokens", block=Embedding(weight=table)),
            *(Segment(path=f"model.layers.{index}", block=layer) for index in range(model.layers)),
            Segment(path="", block=LanguageModelHead(norm=_norm(model, model.layer), lm_head=Linear(weight=table))),
        ),
        vocab_size=model.vocab_size,
        max_positions=model.max_positions,
    )


def head_dim(model: Model, attention: GqaAttention) -> int:
    return attention.head_dim or model.hidden_size // attention.heads


def _matrix(rows: int, columns: int, axes: tuple[Axis, Axis], std: float, grain: tuple[int, int] = (1, 1)) -> Param:
    return Param(shape=(rows, columns), axes=axes, init=Normal(std=std), grain=grain)


def _norm(model: Model, layer: Layer) -> RMSNorm:
    return RMSNorm(weight=Param(shape=(model.hidden_size,), axes=("embed",), init=Ones()), eps=layer.norm.eps)


def _layer(model: Model, layer: Layer) -> DecoderLayer:
    std = model.init.std
    residual_std = std / math.sqrt(2 * model.layers) if model.init.kind == "depth_scaled" else std
    return DecoderLayer(
        input_layernorm=_norm(model, layer),
        self_attn=_attention(model, layer.attention, std, residual_std),
        post_attention_layernorm=_norm(model, layer),
        mlp=_ffn(model.hidden_size, layer.ffn.hidden_size, std, residual_std),
    )


def _attention(model: Model, attention: GqaAttention, std: float, residual_std: float) -> GroupedQueryAttention:
    hidden, width = model.hidden_size, head_dim(model, attention)
    q_rows = attention.heads * width
    kv_rows = (attention.kv_heads or attention.heads) * width
    rows, columns = (width, 1), (1, width)
    return GroupedQueryAttention(
        q_proj=Linear(weight=_matrix(q_rows, hidden, ("heads", "embed"), std, rows)),
        k_proj=Linear(weight=_matrix(kv_rows, hidden, ("kv_heads", "embed"), std, rows)),
        v_proj=Linear(weight=_matrix(kv_rows, hidden, ("kv_heads", "embed"), std, rows)),
        o_proj=Linear(weight=_matrix(hidden, q_rows, ("embed", "heads"), residual_std, columns)),
        position=Rope(table=_rope(model, attention, width)),
        mask=Causal(),
        head_dim=width,
    )


def _rope(model: Model, attention: GqaAttention, width: int) -> RopeTable:
    rope, scaling = attention.position, attention.position.scaling
    if scaling is None:
        return RopeTable(head_dim=width, theta=rope.theta, max_positions=model.max_positions)
    return RopeTable(
        head_dim=width,
        theta=rope.theta,
        max_positions=model.max_positions,
        factor=scaling.factor,
        low=scaling.low_frequency_factor,
        high=scaling.high_frequency_factor,
        original_positions=scaling.original_max_positions,
    )


def _ffn(hidden: int, inner: int, std: float, residual_std: float) -> SwiGLU:
    return SwiGLU(
        gate_proj=Linear(weight=_matrix(inner, hidden, ("ffn", "embed"), std)),
        up_proj=Linear(weight=_matrix(inner, hidden, ("ffn", "embed"), std)),
        down_proj=Linear(weight=_matrix(hidden, inner, ("embed", "ffn"), residual_std)),
    )
