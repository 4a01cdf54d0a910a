"""spec → Program."""

import math
from dataclasses import dataclass, replace

from archwright.compiler.blocks import (
    GELU,
    DecoderLayer,
    Embedding,
    Experts,
    FeedForward,
    GroupedQueryAttention,
    Head,
    LanguageModelHead,
    LayerNorm,
    Linear,
    MixtureOfExperts,
    MoeDecoderLayer,
    NoPosition,
    Norm,
    Position,
    PositionedEmbedding,
    RMSNorm,
    Rope,
    SwiGLU,
)
from archwright.compiler.ir import (
    Axis,
    Causal,
    Mask,
    Normal,
    Ones,
    Param,
    Penalties,
    Program,
    RopeTable,
    Routing,
    Segment,
    Window,
    Zeros,
)
from archwright.spec.models import GeluFfn, GqaAttention, Layer, Llama3Scaling, Model, MoeFfn, Spec, SwiGluFfn
from archwright.spec.models import Mask as MaskSpec
from archwright.spec.models import Norm as NormSpec


def lower(spec: Spec) -> Program:
    """The Program of a spec's model: one segment for the embedding, one a layer, one for the head."""
    model = spec.model
    build = _Lowering(model)
    table = build.matrix(("vocab", model.vocab_size), ("embed", model.hidden_size))
    if model.tied_embeddings:
        table = replace(table, share="embedding")
    layers = [layer for run in model.runs for layer in [build.layer(run.layer)] * run.repeat]
    head = LanguageModelHead(norm=build.norm(model.runs[-1].layer.norm), lm_head=Head(weight=table))
    return Program(
        segments=(
            build.embedding(table),
            *(Segment(path=f"model.layers.{index}", block=layer) for index, layer in enumerate(layers)),
            Segment(path="", block=head),
        ),
        vocab_size=model.vocab_size,
        max_positions=model.max_positions,
    )


@dataclass(frozen=True)
class _Lowering:
    """Makes blocks of a model's sections."""

    model: Model

    def embedding(self, table: Param) -> Segment:
        model = self.model
        if model.positions is None:
            return Segment(path="model.embed_tokens", block=Embedding(weight=table))
        positions = self.matrix(("positions", model.max_positions), ("embed", model.hidden_size))
        block = PositionedEmbedding(embed_tokens=Embedding(weight=table), embed_positions=Embedding(weight=positions))
        return Segment(path="model.embeddings", block=block)

    def matrix(
        self, rows: tuple[Axis, int], columns: tuple[Axis, int], *, grain: tuple[int, int] = (1, 1), std: float = 0
    ) -> Param:
        """[rows, columns]; std: the model's unless given."""
        return Param(
            shape=(rows[1], columns[1]),
            axes=(rows[0], columns[0]),
            init=Normal(std=std or self.model.init.std),
            grain=grain,
        )

    def linear(
        self,
        columns: tuple[Axis, int],
        rows: tuple[Axis, int],
        *,
        bias: bool,
        grain: tuple[int, int] = (1, 1),
        std: float = 0,
    ) -> Linear:
        """From `columns` to `rows`."""
        weight = self.matrix(rows, columns, grain=grain, std=std)
        vector = Param(shape=(rows[1],), axes=(rows[0],), init=Zeros(), grain=grain[:1])
        return Linear(weight=weight, bias=vector if bias else None)

    @property
    def residual_std(self) -> float:
        """Of the matrices that write to the residual stream."""
        model = self.model
        return model.init.std / math.sqrt(2 * model.num_layers) if model.init.kind == "depth_scaled" else model.init.std

    def norm(self, norm: NormSpec) -> Norm:
        hidden = self.model.hidden_size
        weight = Param(shape=(hidden,), axes=("embed",), init=Ones())
        if norm.kind == "rmsnorm":
            return RMSNorm(weight=weight, eps=norm.eps)
        bias = Param(shape=(hidden,), axes=("embed",), init=Zeros())
        return LayerNorm(weight=weight, bias=bias if norm.bias else None, eps=norm.eps)

    def layer(self, layer: Layer) -> DecoderLayer:
        norm, attention = self.norm(layer.norm), self.attention(layer.attention)
        if isinstance(layer.ffn, MoeFfn):
            return MoeDecoderLayer(
                input_layernorm=norm, self_attn=attention, post_attention_layernorm=norm, mlp=self.moe(layer.ffn)
            )
        return DecoderLayer(
            input_layernorm=norm, self_attn=attention, post_attention_layernorm=norm, mlp=self.ffn(layer.ffn)
        )

    def attention(self, attention: GqaAttention) -> GroupedQueryAttention:
        width, kv_heads = self.model.head_dim(attention), attention.kv_heads or attention.heads
        embed: tuple[Axis, int] = ("embed", self.model.hidden_size)
        queries: tuple[Axis, int] = ("heads", attention.heads * width)
        keys: tuple[Axis, int] = ("kv_heads", kv_heads * width)
        bias, rows = attention.bias != "none", (width, 1)
        return GroupedQueryAttention(
            q_proj=self.linear(embed, queries, bias=bias, grain=rows),
            k_proj=self.linear(embed, keys, bias=bias, grain=rows),
            v_proj=self.linear(embed, keys, bias=bias, grain=rows),
            o_proj=self.linear(queries, embed, bias=attention.bias == "all", grain=(1, width), std=self.residual_std),
            position=self.position(attention, width),
            mask=_mask(attention.mask),
            head_dim=width,
        )

    def position(self, attention: GqaAttention, width: int) -> Position:
        if attention.position.kind == "none":
            return NoPosition()
        theta, limit = attention.position.theta, self.model.max_positions
        table = RopeTable(head_dim=width, theta=theta, max_positions=limit)
        return Rope(table=_scaled(table, attention.position.scaling))

    def moe(self, moe: MoeFfn) -> MixtureOfExperts:
        hidden, router = self.model.hidden_size, moe.router
        widen = Param(
            shape=(moe.experts, moe.hidden_size, hidden),
            axes=("expert", "ffn", "embed"),
            init=Normal(std=self.model.init.std),
        )
        narrow = Param(
            shape=(moe.experts, hidden, moe.hidden_size),
            axes=("expert", "embed", "ffn"),
            init=Normal(std=self.residual_std),
        )
        shared = moe.shared and self.swiglu(moe.shared.hidden_size, bias=False)
        return MixtureOfExperts(
            gate=self.linear(("embed", hidden), ("router", moe.experts), bias=False),
            experts=Experts(gate_proj=widen, up_proj=widen, down_proj=narrow),
            shared_experts=shared,
            routing=Routing(
                experts_per_token=moe.experts_per_token,
                score=router.score,
                normalize=router.normalize,
                scale=router.scale,
            ),
            penalties=Penalties(balance=moe.balance_loss, z=moe.z_loss),
        )

    def ffn(self, ffn: SwiGluFfn | GeluFfn) -> FeedForward:
        if ffn.kind == "swiglu":
            return self.swiglu(ffn.hidden_size, bias=ffn.bias)
        widen, narrow = self.widen_and_narrow(ffn.hidden_size, bias=ffn.bias)
        return GELU(fc1=widen, fc2=narrow, approximation=ffn.approximation)

    def swiglu(self, width: int, *, bias: bool) -> SwiGLU:
        widen, narrow = self.widen_and_narrow(width, bias=bias)
        return SwiGLU(gate_proj=widen, up_proj=widen, down_proj=narrow)

    def widen_and_narrow(self, width: int, *, bias: bool) -> tuple[Linear, Linear]:
        embed: tuple[Axis, int] = ("embed", self.model.hidden_size)
        inner: tuple[Axis, int] = ("ffn", width)
        return (
            self.linear(embed, inner, bias=bias),
            self.linear(inner, embed, bias=bias, std=self.residual_std),
        )


def _mask(mask: MaskSpec) -> Mask:
    return Causal() if mask.kind == "causal" else Window(mask.size)


def _scaled(table: RopeTable, scaling: Llama3Scaling | None) -> RopeTable:
    if scaling is None:
        return table
    return replace(
        table,
        factor=scaling.factor,
        low=scaling.low_frequency_factor,
        high=scaling.high_frequency_factor,
        original_positions=scaling.original_max_positions,
    )
