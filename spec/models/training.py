"""`train:` — what the trainers do with the model and the data."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from archwright.spec.models.base import Node


class AdamW(Node):
    """AdamW (Loshchilov & Hutter 2019); weight decay acts on matrices only, never on norms."""

    kind: Literal["adamw"]
    learning_rate: PositiveFloat = 3e-4
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]], Field(strict=False)
    ] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1


class Muon(Node):
    """Orthogonal updates for the matrices of the layers (Jordan et al. 2024), AdamW for everything else."""

    kind: Literal["muon"]
    learning_rate: PositiveFloat = 0.02
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    weight_decay: NonNegativeFloat = 0.1
    adamw: AdamW = AdamW(kind="adamw", learning_rate=3e-3)
    """Of embeddings, head, norms and biases."""


Optimizer = Annotated[AdamW | Muon, Field(discriminator="kind")]


class Cosine(Node):
    """Linear warmup, then half a cosine down to `final_fraction` of the learning rate."""

    kind: Literal["cosine"]
    warmup_steps: NonNegativeInt | None = None
    """Default: 2% of the steps, at least 1."""
    final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1


class Evaluate(Node):
    """Held-out loss during training."""

    every: PositiveInt = 500
    """Steps between evaluations; the last step always evaluates."""
    batches: PositiveInt = 16
    """Batches an evaluation, always the same ones."""


class Checkpoint(Node):
    """Complete or absent: written beside, then renamed."""

    every: PositiveInt = 500
    """Steps between checkpoints; the last step always writes one."""
    keep: PositiveInt = 2


class KeepAll(Node):
    """Every activation that the backward needs is kept."""

    kind: Literal["none"]


class FullRecompute(Node):
    """Of each layer only the input is kept; the backward runs its forward again (Chen et al. 2016)."""

    kind: Literal["full"]


class SelectiveRecompute(Node):
    """The outputs of the operations in `keep` are kept, the cheap ones between them recomputed."""

    kind: Literal["selective"]
    keep: Annotated[tuple[Literal["attention", "linear"], ...], Field(strict=False)] = ("attention", "linear")


Recompute = Annotated[KeepAll | FullRecompute | SelectiveRecompute, Field(discriminator="kind")]


class _TrainBase(Node):
    steps: PositiveInt = 1000
    """Optimizer steps."""
    batch_size: PositiveInt = 8
    """Sequences an optimizer step, over all ranks and micro-batches."""
    micro_batches: PositiveInt = 1
    """Gradient accumulation: pieces that one rank computes one after the other."""
    sequence_length: PositiveInt = 512
    precision: Literal["float64", "float32", "bfloat16"] = "float32"
    """Of the computation. bfloat16 keeps float32 master weights and optimizer states."""
    seed: NonNegativeInt = 0
    optimizer: Optimizer = AdamW(kind="adamw")
    schedule: Cosine = Cosine(kind="cosine")
    clip_norm: PositiveFloat | None = 1.0
    evaluate: Evaluate = Evaluate()
    checkpoint: Checkpoint = Checkpoint()
    log_every: PositiveInt = 10
    """Steps between lines on the console; metrics.jsonl has every step."""
    activation_checkpointing: Recompute = KeepAll(kind="none")
    compile: bool | Literal["auto"] = "auto"
    """torch.compile per layer; auto: on a GPU."""
    base: str | None = None
    """Model folder or run whose weights are the start."""


class Pretrain(_TrainBase):
    """Next-token prediction over packed documents."""

    kind: Literal["pretrain"]


class Sft(_TrainBase):
    """Supervised finetuning on prompts and responses; the loss is on the responses only."""

    kind: Literal["sft"]


Train = Annotated[Pretrain | Sft, Field(discriminator="kind")]
