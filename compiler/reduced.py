"""A spec made small: the same kinds of blocks and the same sharding, at a size where everything can be computed."""

from collections import Counter

from archwright.spec import Spec
from archwright.spec.models import BuildParallel, Ffn, Layer, LayerRun, Model, MoeFfn, Parallel, Quantize
from archwright.spec.quantization import deciding, matrices

MAX_HIDDEN = 512
MAX_FFN = 1024
MAX_EXPERTS = 4
MAX_EXPERT_FFN = 256
MAX_VOCAB = 1024
MAX_POSITIONS = 1024
LAYERS = 2


def reduced(spec: Spec) -> Spec:
    """`spec` with at most two layers of each kind, in order, and hidden size ≤ 512, vocabulary ≤ 1,024, feed-forward
    ≤ 1,024, ≤ 1,024 positions, and 4 experts (or as many as a token goes through) of ≤ 256.

    Kept are the width of a head, the query heads to each key/value head, and how key/value heads meet the tensor
    degree of `build`: split (one to each rank is enough) or replicated (all of them are needed); experts are as many as
    its expert degree can split, layers at least as many as its pipeline has stages. Where groups of input channels
    share a scale, there are whole groups on each rank. Rules of quantization that then decide about nothing are left
    out, and so are sections that building does not read.
    """
    model, parallel = spec.model, spec.build.parallel
    kinds = Counter({run.layer: 0 for run in model.runs})
    for run in model.runs:
        kinds[run.layer] += run.repeat
    kept = {layer: min(LAYERS, count) for layer, count in kinds.items()}
    for layer, count in kinds.items():
        kept[layer] += min(count - kept[layer], max(0, parallel.pipeline - sum(kept.values())))
    group = _largest_group(spec)
    stack = tuple(LayerRun(repeat=count, layer=_small(model, layer, parallel, group)) for layer, count in kept.items())
    small = model.model_copy(
        update={
            "layers": stack,
            "layer": None,
            "hidden_size": min(model.hidden_size, MAX_HIDDEN),
            "vocab_size": min(model.vocab_size, MAX_VOCAB),
            "max_positions": min(model.max_positions, MAX_POSITIONS),
        }
    )
    capacity = spec.build.max_positions and min(spec.build.max_positions, MAX_POSITIONS)
    quantize = spec.build.quantize and _few_rules(spec.build.quantize, small)
    build = spec.build.model_copy(update={"max_positions": capacity, "profiles": (), "quantize": quantize})
    rest = {"extends": None, "tokenizer": None, "data": None, "train": None, "parallel": Parallel()}
    return Spec.model_validate(spec.model_copy(update=rest | {"model": small, "build": build}).model_dump())


def _largest_group(spec: Spec) -> int:
    """Input channels that the small matrices must have in whole groups on each rank, where groups share a scale."""
    rules = spec.build.quantize.rules if spec.build.quantize else ()
    return max((rule.group_size for rule in rules if rule.kind == "int4"), default=1)


def _few_rules(quantize: Quantize, model: Model) -> Quantize | None:
    """The rules that decide about a matrix of `model`."""
    used = {deciding(quantize, matrix.path) for matrix in matrices(model)}
    rules = tuple(rule for number, rule in enumerate(quantize.rules) if number in used)
    return quantize.model_copy(update={"rules": rules}) if rules else None


def _small(model: Model, layer: Layer, parallel: BuildParallel, group: int) -> Layer:
    attention, degree = layer.attention, parallel.tensor
    kv_heads = attention.kv_heads or attention.heads
    few = degree if kv_heads % degree == 0 else kv_heads
    width = attention.heads // kv_heads * model.head_dim(attention)
    # All of them do, where the spec's own do; fewer may.
    few = next(n for n in range(few, kv_heads + 1, few) if n * width // degree % group == 0 or n == kv_heads)
    sizes = {
        "heads": attention.heads // kv_heads * few,
        "kv_heads": few,
        "head_dim": model.head_dim(attention),
    }
    return layer.model_copy(
        update={
            "attention": attention.model_copy(update=sizes),
            "ffn": _small_ffn(layer.ffn, parallel, group),
        }
    )


def _small_ffn(ffn: Ffn, parallel: BuildParallel, group: int) -> Ffn:
    step = parallel.tensor * group
    widest = max(step, MAX_FFN // step * step)
    sizes: dict[str, object] = {"hidden_size": min(ffn.hidden_size, widest)}
    if isinstance(ffn, MoeFfn):
        sizes["hidden_size"] = min(ffn.hidden_size, max(step, MAX_EXPERT_FFN // step * step))
        few = max(MAX_EXPERTS, ffn.experts_per_token)
        sizes["experts"] = min(ffn.experts, -(-few // parallel.expert) * parallel.expert)
        if ffn.shared is not None:
            sizes["shared"] = ffn.shared.model_copy(update={"hidden_size": min(ffn.shared.hidden_size, widest)})
    return ffn.model_copy(update=sizes)
