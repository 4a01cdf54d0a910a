"""`model:` — the architecture of a decoder-only language model."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from archwright.spec.models.base import Node


class RmsNorm(Node):
    """Root-mean-square normalisation, x / sqrt(mean(x²) + eps) · weight (Zhang & Sennrich 2019)."""

    kind: Literal["rmsnorm"]
    eps: PositiveFloat = 1e-5


class CausalMask(Node):
    """A token sees itself and every earlier token."""

    kind: Literal["causal"]


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


# One member each today; a second one makes these (and Attention, Ffn) discriminated unions on `kind`.
Norm = RmsNorm
Mask = CausalMask
Position = Rope


class GqaAttention(Node):
    """Grouped-query attention (Ainslie et al. 2023). `kv_heads` = `heads` is multi-head, 1 is multi-query."""

    kind: Literal["gqa"]
    heads: PositiveInt
    kv_heads: PositiveInt | None = None
    """Key/value heads; must divide `heads`. Default: `heads`."""
    head_dim: PositiveInt | None = None
    """Width of one head; even. Default: hidden_size / heads."""
    mask: Mask = CausalMask(kind="causal")
    position: Position = Rope(kind="rope")


class SwiGluFfn(Node):
    """Gated feed-forward, down(silu(gate(x)) · up(x)) (Shazeer 2020)."""

    kind: Literal["swiglu"]
    hidden_size: PositiveInt
    """Inner width of the feed-forward."""


class NormalInit(Node):
    """Every matrix from N(0, std²)."""

    kind: Literal["normal"]
    std: PositiveFloat = 0.02


class DepthScaledInit(Node):
    """As `normal`, but the two projections that write to the residual stream use std / sqrt(2 · layers) (GPT-2)."""

    kind: Literal["depth_scaled"]
    std: PositiveFloat = 0.02


Attention = GqaAttention
Ffn = SwiGluFfn
Init = Annotated[NormalInit | DepthScaledInit, Field(discriminator="kind")]


class Layer(Node):
    """One pre-norm decoder layer: x + attention(norm(x)), then x + ffn(norm(x))."""

    norm: Norm = RmsNorm(kind="rmsnorm")
    attention: Attention
    ffn: Ffn


class Model(Node):
    """The architecture: what is computed, never where."""

    vocab_size: PositiveInt
    """Rows of the embedding and of the head. The tokenizer may have fewer tokens, never more."""
    hidden_size: PositiveInt
    max_positions: PositiveInt
    """Longest sequence that the model accepts."""
    layers: PositiveInt
    layer: Layer
    """The layer that is repeated `layers` times; the final norm is of its kind."""
    tied_embeddings: bool = False
    """The head reads the embedding's matrix."""
    init: Init = NormalInit(kind="normal")
