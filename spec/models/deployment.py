"""`parallel:`, `build:` and `serve:` — where things run."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from archwright.spec.models.base import Node
from archwright.spec.models.quantization import Quantize

Degree = PositiveInt | Literal["auto"]


class GPipe(Node):
    """All forwards, then all backwards (Huang et al. 2019): simple, and holds every micro-batch's activations."""

    kind: Literal["gpipe"]


class OneForwardOneBackward(Node):
    """1F1B (Narayanan et al. 2019): the bubble of GPipe, the activations of at most `pipeline` micro-batches."""

    kind: Literal["1f1b"]


class Interleaved(Node):
    """Interleaved 1F1B (Narayanan et al. 2021): several stages a rank divide the bubble by their number."""

    kind: Literal["interleaved"]
    stages_per_rank: Annotated[int, Field(ge=2)] = 2


Schedule = Annotated[GPipe | OneForwardOneBackward | Interleaved, Field(discriminator="kind")]


class Parallel(Node):
    """Degrees of the training mesh. One of them may be `auto`: it fills the launched world, else this host's GPUs."""

    tensor: Degree = 1
    """Ranks that share each matrix product, and the vocabulary (Shoeybi et al. 2019)."""
    sequence: bool = False
    """Between the matrices, tensor ranks share the sequence instead of all holding it (Korthikanti et al. 2022)."""
    pipeline: Degree = 1
    """Ranks that each hold some of the layers."""
    schedule: Schedule = OneForwardOneBackward(kind="1f1b")
    """In which order a pipeline's ranks do the micro-batches."""
    context: Degree = 1
    """Ranks that share each sequence; attention gathers the keys and values."""
    expert: Degree = 1
    """Data ranks that share the experts of mixture-of-experts layers; each keeps its own sequences."""
    data_shard: Degree = "auto"
    """Data ranks that share parameters, gradients and optimizer states (FSDP)."""
    reshard: bool = True
    """Free a layer's gathered weights between its forward and its backward. false: keep them, gather once (ZeRO-2)."""
    data_replicate: Degree = 1
    """Data ranks that each hold a copy (of what `data_shard` leaves of it)."""


class BuildParallel(Node):
    """Degrees of the inference mesh; one graph and one engine a rank."""

    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    expert: PositiveInt = 1


class ModelWeights(Node):
    """The weights of the model folder or run that is built."""

    kind: Literal["model"]


class GeneratedWeights(Node):
    """The initial weights of the spec: to try shapes and plans before a model exists."""

    kind: Literal["generated"]
    seed: NonNegativeInt = 0


Weights = Annotated[ModelWeights | GeneratedWeights, Field(discriminator="kind")]


class Range(Node):
    """Smallest, typical and largest size of a symbolic dimension."""

    min: PositiveInt
    opt: PositiveInt
    max: PositiveInt


class Profile(Node):
    """One TensorRT optimization profile."""

    batch: Range
    sequence: Range
    positions: Range


class Engine(Node):
    """How TensorRT builds."""

    optimization_level: Annotated[int, Field(ge=0, le=5)] = 3
    workspace_gib: PositiveFloat = 4.0


class Build(Node):
    """What `archwright build` writes."""

    target: Literal["portable"] = "portable"
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    parallel: BuildParallel = BuildParallel()
    weights: Weights = ModelWeights(kind="model")
    quantize: Quantize | None = None
    """Matrices that are stored in fewer bits."""
    max_batch: PositiveInt = 8
    max_positions: PositiveInt | None = None
    """Length of the KV cache. Default: model.max_positions."""
    profiles: Annotated[tuple[Profile, ...], Field(strict=False)] = ()
    """Default: one for prefill and one for decode, from the limits above."""
    engine: Engine = Engine()


class Serve(Node):
    """Where `archwright serve` listens."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    api_key: str | None = None
