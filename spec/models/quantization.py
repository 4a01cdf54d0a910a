"""`build.quantize:` — matrices stored in fewer bits than the build's precision."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from archwright.spec.models.base import Node

EVERY_LAYER = "model.layers.*"
"""The matrices between embedding and head."""


class Keep(Node):
    """Leave what `match` names in the precision of the build."""

    kind: Literal["keep"]
    match: str = EVERY_LAYER
    """Names such as `model.layers.0.mlp.down_proj`, `lm_head`, `model.embed_tokens`; `*` stands for anything."""


class Int8(Node):
    """Weights as whole numbers of 8 bits, each output channel with a scale of its own, symmetric around 0."""

    kind: Literal["int8"]
    match: str = EVERY_LAYER
    """Names such as `model.layers.0.mlp.down_proj`, `lm_head`, `model.embed_tokens`; `*` stands for anything."""


class Int4(Node):
    """Weights as whole numbers of 4 bits, each group of neighbouring input channels with a scale of its own."""

    kind: Literal["int4"]
    match: str = EVERY_LAYER
    """Names such as `model.layers.0.mlp.down_proj`, `lm_head`, `model.embed_tokens`; `*` stands for anything."""
    group_size: Literal[32, 64, 128] = 128
    """Input channels that share a scale; must divide those that a rank has."""
    method: Literal["rtn", "awq"] = "rtn"
    """rtn: round to nearest. awq: first scale up the channels that matter to the calibration text (Lin et al. 2023)."""


class Fp8(Node):
    """Weights and inputs as 8-bit floats (E4M3), with a scale an output channel and a calibrated one for the input."""

    kind: Literal["fp8"]
    match: str = EVERY_LAYER
    """Names such as `model.layers.0.mlp.down_proj`, `lm_head`, `model.embed_tokens`; `*` stands for anything."""


QuantizeRule = Annotated[Keep | Int8 | Int4 | Fp8, Field(discriminator="kind")]


class Calibration(Node):
    """The tokens that the model sees while it is quantized, and those that its quality is measured on."""

    path: str
    """A folder written by `archwright data build`, a .npy of token ids, or a .jsonl of `tokens` or `text`."""
    samples: PositiveInt = 128
    """Sequences from the beginning, for activation statistics."""
    evaluation: PositiveInt = 16
    """Sequences from the end, for the quality table."""
    sequence_length: Annotated[int, Field(ge=2)] = 512


class QualityLimit(Node):
    """The loss of quality, on the evaluation sequences, above which the build is refused."""

    perplexity: Annotated[float, Field(ge=1)] | None = None
    """Largest ratio of the perplexities after and before."""
    kl: NonNegativeFloat | None = None
    """Largest mean of the Kullback-Leibler divergence from the unquantized model's tokens, in nats."""


class Quantize(Node):
    """What is quantized, and how: the first rule that matches a matrix decides; without one it is kept."""

    rules: Annotated[tuple[QuantizeRule, ...], Field(strict=False, min_length=1)]
    calibration: Calibration | None = None
    limit: QualityLimit | None = None
