"""A spec made small: the same kinds of blocks and the same sharding, at a size where everything can be computed."""

from archwright.compiler.passes.lower import head_dim
from archwright.spec import Spec
from archwright.spec.models import Parallel

MAX_HIDDEN = 512
MAX_FFN = 1024
MAX_VOCAB = 1024
MAX_POSITIONS = 1024
LAYERS = 2


def reduced(spec: Spec) -> Spec:
    """`spec` with two layers, hidden size ≤ 512, vocabulary ≤ 1,024, feed-forward ≤ 1,024 and ≤ 1,024 positions.

    Kept are the width of a head, the query heads to each key/value head, and how key/value heads meet the tensor
    degree of `build`: split (one to each rank is enough) or replicated (all of them are needed). Sections that
    building does not read are left out.
    """
    model, attention = spec.model, spec.model.layer.attention
    degree = spec.build.parallel.tensor
    kv_heads = attention.kv_heads or attention.heads
    few = degree if kv_heads % degree == 0 else kv_heads
    sizes = {
        "heads": attention.heads // kv_heads * few,
        "kv_heads": few,
        "head_dim": head_dim(model, attention),
    }
    ffn = model.layer.ffn
    inner = min(ffn.hidden_size, MAX_FFN // degree * degree)
    layer = model.layer.model_copy(
        update={
            "attention": attention.model_copy(update=sizes),
            "ffn": ffn.model_copy(update={"hidden_size": inner}),
        }
    )
    small = model.model_copy(
        update={
            "layers": min(LAYERS, model.layers),
            "hidden_size": min(model.hidden_size, MAX_HIDDEN),
            "vocab_size": min(model.vocab_size, MAX_VOCAB),
            "max_positions": min(model.max_positions, MAX_POSITIONS),
            "layer": layer,
        }
    )
    capacity = spec.build.max_positions and min(spec.build.max_positions, MAX_POSITIONS)
    build = spec.build.model_copy(update={"max_positions": capacity, "profiles": ()})
    rest = {"extends": None, "tokenizer": None, "data": None, "train": None, "parallel": Parallel()}
    return Spec.model_validate(spec.model_copy(update=rest | {"model": small, "build": build}).model_dump())
