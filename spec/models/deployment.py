"""`parallel:`, `build:` and `serve:` — where things run."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from archwright.spec.models.base import Node


class Parallel(Node):
    """Degrees of the training mesh."""

    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    context: PositiveInt = 1
    expert: PositiveInt = 1
    data_shard: PositiveInt | Literal["auto"] = "auto"
    data_replicate: PositiveInt = 1
    sequence: bool = False
    """Sequence parallelism on the tensor axis."""


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
