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
    symmetric_memory: bool | Literal["auto"] = "auto"
    """With `sequence`: tokens travel by copies between GPUs' memories. auto: where they can; by NCCL otherwise."""
    pipeline: Degree = 1
    """Ranks that each hold some of the layers."""
    schedule: Schedule = OneForwardOneBackward(kind="1f1b")
    """In which order a pipeline's ranks do the micro-batches."""
    context: Degree = 1
    """Ranks that share each sequence; attention gathers the keys and values."""
    ring: bool = False
    """Context ranks pass keys and values around a ring instead (Liu et al. 2023): their memory does not grow."""
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
    """Ranks that share each matrix product."""
    pipeline: PositiveInt = 1
    """Stages that each hold some of the layers, one behind the other."""
    expert: PositiveInt = 1
    """Ranks that share the experts of mixture-of-experts layers; each has all tokens, and the results are added up."""


class DenseExperts(Node):
    """Every expert computes every token: large matrix products, which read all weights however few tokens there are."""

    kind: Literal["dense"]


class GatheredExperts(Node):
    """Each token's experts are gathered and multiplied alone: reads fewer weights where a step has few tokens, and
    copies the experts' weights for every token where it has many."""

    kind: Literal["gathered"]


ExpertForm = Annotated[DenseExperts | GatheredExperts, Field(discriminator="kind")]


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
    workspace_gib: Annotated[float, Field(gt=0, le=65536)] = 4.0
    timing_cache: str | None = None
    """A file of kernel timings that builds read and add to, all ranks alike. TensorRT for RTX times nothing."""
    version_compatible: bool = False
    """Run also with later versions of the same major version of TensorRT."""
    hardware_compatibility: Literal["none", "same_compute_capability", "ampere_plus"] = "none"
    """Run also on other GPUs than the one that is built on: of its compute capability, or of Ampere and later."""
    compute_capabilities: Annotated[tuple[PositiveFloat, ...], Field(strict=False)] = ()
    """What TensorRT for RTX builds for, `[8.9, 12.0]`. Default: one engine for all that it serves."""


class Build(Node):
    """What `archwright build` writes."""

    target: Literal["portable", "tensorrt", "onnxruntime"] = "portable"
    """The dialect of the graphs. portable: read alike by ONNX Runtime and TensorRT. tensorrt, onnxruntime: in operators
    that only the one has, where a layer can be said in them."""
    fuse: Literal["auto", "none", "all"] = "auto"
    """Which matrices are joined, and whether attention's scale is folded into them. auto: what pays on the target; all:
    wherever nothing is rounded differently."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    parallel: BuildParallel = BuildParallel()
    logits: Literal["all", "last"] = "all"
    """Of every token, or of one token a row, which the input `logit_index` names: a prefill then makes no others."""
    moe: ExpertForm = DenseExperts(kind="dense")
    """How graphs compute mixtures of experts."""
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
