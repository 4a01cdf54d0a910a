"""`model:` — the architecture of a decoder-only language model."""

from typing import Annotated, Literal

from pydantic import Discriminator, Field, NonNegativeFloat, PositiveFloat, PositiveInt, Tag

from archwright.spec.models.base import Node


class RmsNorm(Node):
    """Root-mean-square normalisation, x / sqrt(mean(x²) + eps) · weight (Zhang & Sennrich 2019)."""

    kind: Literal["rmsnorm"]
    eps: PositiveFloat = 1e-5


class LayerNorm(Node):
    """Layer normalisation, (x - mean(x)) / sqrt(var(x) + eps) · weight + bias (Ba et al. 2016)."""

    kind: Literal["layernorm"]
    eps: PositiveFloat = 1e-5
    bias: bool = True


class CausalMask(Node):
    """A token sees itself and every earlier token."""

    kind: Literal["causal"]


class WindowMask(Node):
    """Sliding window: a token sees itself and the `size - 1` tokens before it (Beltagy et al. 2020)."""

    kind: Literal["window"]
    size: PositiveInt


class Llama3Scaling(Node):
    """Llama 3.1's scaling of RoPE: frequencies of long wavelengths are divided by `factor`, those of short ones kept.

    The ramp lies between wavelengths of original_max_positions / high_frequency_factor and / low_frequency_factor
    (Llama team 2024, arXiv:2407.21783).
    """

    kind: Literal["llama3"]
    factor: PositiveFloat = 8.0
    low_frequency_factor: PositiveFloat = 1.0
    high_frequency_factor: PositiveFloat = 4.0
    original_max_positions: PositiveInt = 8192


class Rope(Node):
    """Rotary position embedding, half-split layout as in Hugging Face's Llama (Su et al. 2021)."""

    kind: Literal["rope"]
    theta: PositiveFloat = 10_000.0
    scaling: Llama3Scaling | None = None


class NoPosition(Node):
    """Attention that does not know where its tokens stand: with `model.positions`, or with none at all."""

    kind: Literal["none"]


Norm = Annotated[RmsNorm | LayerNorm, Field(discriminator="kind")]
Mask = Annotated[CausalMask | WindowMask, Field(discriminator="kind")]
Position = Annotated[Rope | NoPosition, Field(discriminator="kind")]


class GqaAttention(Node):
    """Grouped-query attention (Ainslie et al. 2023). `kv_heads` = `heads` is multi-head, 1 is multi-query."""

    kind: Literal["gqa"]
    heads: PositiveInt
    kv_heads: PositiveInt | None = None
    """Key/value heads; must divide `heads`. Default: `heads`."""
    head_dim: PositiveInt | None = None
    """Width of one head; even under rope. Default: hidden_size / heads."""
    bias: Literal["none", "qkv", "all"] = "none"
    """Which projections add a bias: none, those of queries, keys and values, or the output's as well."""
    mask: Mask = CausalMask(kind="causal")
    position: Position = Rope(kind="rope")


class SwiGluFfn(Node):
    """Gated feed-forward, down(silu(gate(x)) · up(x)) (Shazeer 2020)."""

    kind: Literal["swiglu"]
    hidden_size: PositiveInt
    """Inner width of the feed-forward."""
    bias: bool = False


class GeluFfn(Node):
    """Plain feed-forward, fc2(gelu(fc1(x))) (Hendrycks & Gimpel 2016)."""

    kind: Literal["gelu"]
    hidden_size: PositiveInt
    """Inner width of the feed-forward."""
    bias: bool = True
    approximation: Literal["none", "tanh"] = "none"
    """none: x · Φ(x); tanh: GPT-2's formula for it."""


class Router(Node):
    """How a token's experts are weighed: the highest logits choose them, their scores weigh their outputs."""

    score: Literal["softmax", "sigmoid"] = "softmax"
    """Of a logit: softmax over all experts (Mixtral, Qwen), or each one's sigmoid (DeepSeek-V3)."""
    normalize: bool = True
    """The weights of a token's experts are divided by their sum."""
    scale: PositiveFloat = 1.0
    """The weights are multiplied by this in the end (`routed_scaling_factor`)."""


class SharedExpert(Node):
    """A SwiGLU that every token goes through, beside its experts (Dai et al. 2024)."""

    hidden_size: PositiveInt
    """Inner width; several shared experts are one of their summed width."""


class MoeFfn(Node):
    """Mixture of experts: each token goes through `experts_per_token` of many SwiGLUs (Shazeer et al. 2017).

    y = shared(x) + Σ over the chosen experts of weight · expert(x). No token is dropped, however many choose an expert.
    In training the loss of each layer grows by its penalties, per sequence and weighted by the sequence's targets.
    """

    kind: Literal["moe"]
    experts: PositiveInt
    """The number of experts."""
    experts_per_token: PositiveInt = 2
    """Experts that each token goes through."""
    hidden_size: PositiveInt
    """Inner width of one expert."""
    shared: SharedExpert | None = None
    router: Router = Router()
    balance_loss: NonNegativeFloat = 0.01
    """Times experts · Σ over e of (share of the choices that fall on e) · (mean normalised score of e), which is 1
    where a sequence uses its experts evenly (Fedus et al. 2022; per sequence as in DeepSeek-V3)."""
    z_loss: NonNegativeFloat = 0.001
    """Times the mean of logsumexp(router logits)², which keeps logits small (Zoph et al. 2022)."""


class NormalInit(Node):
    """Every matrix from N(0, std²)."""

    kind: Literal["normal"]
    std: PositiveFloat = 0.02


class DepthScaledInit(Node):
    """As `normal`, but the two projections that write to the residual stream use std / sqrt(2 · layers) (GPT-2)."""

    kind: Literal["depth_scaled"]
    std: PositiveFloat = 0.02


Attention = GqaAttention
Ffn = Annotated[SwiGluFfn | GeluFfn | MoeFfn, Field(discriminator="kind")]
Init = Annotated[NormalInit | DepthScaledInit, Field(discriminator="kind")]


class Layer(Node):
    """One pre-norm decoder layer: x + attention(norm(x)), then x + ffn(norm(x))."""

    norm: Norm = RmsNorm(kind="rmsnorm")
    attention: Attention
    ffn: Ffn


class LayerRun(Node):
    """Equal layers that follow each other, a part of a mixed stack."""

    repeat: PositiveInt = 1
    layer: Layer


class LearnedPositions(Node):
    """A learned vector for each position, added to the token's embedding (GPT-2)."""

    kind: Literal["learned"]


def _form(value: object) -> str:
    return "stack" if isinstance(value, list | tuple) else "number"


Layers = Annotated[
    Annotated[PositiveInt, Tag("number")]
    | Annotated[tuple[LayerRun, ...], Field(strict=False, min_length=1), Tag("stack")],
    Discriminator(_form),
]


class Model(Node):
    """The architecture: what is computed, never where."""

    vocab_size: PositiveInt
    """Rows of the embedding and of the head. The tokenizer may have fewer tokens, never more."""
    hidden_size: PositiveInt
    max_positions: PositiveInt
    """Longest sequence that the model accepts."""
    layers: Layers
    """How often `layer` is repeated; or a mixed stack, `[{repeat: 5, layer: {...}}, {layer: {...}}]`."""
    layer: Layer | None = None
    """The layer that is repeated; absent in a mixed stack. The final norm is of the last layer's kind."""
    positions: LearnedPositions | None = None
    """Positions that are added to the embedding; none where attention turns by `rope`."""
    tied_embeddings: bool = False
    """The head reads the embedding's matrix."""
    init: Init = NormalInit(kind="normal")

    @property
    def runs(self) -> tuple[LayerRun, ...]:
        """The stack as runs of equal layers, whichever way it is written."""
        if isinstance(self.layers, tuple):
            return self.layers
        return () if self.layer is None else (LayerRun(repeat=self.layers, layer=self.layer),)

    @property
    def num_layers(self) -> int:
        return sum(run.repeat for run in self.runs)

    def head_dim(self, attention: GqaAttention) -> int:
        """Width of one head of `attention`."""
        return attention.head_dim or self.hidden_size // attention.heads
