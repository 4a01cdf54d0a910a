"""The number of parameters of an architecture, from its sizes alone; the compiler's own count must agree."""

from archwright.spec.models import Spec


def num_parameters(spec: Spec) -> int:
    """Embedding, layers, final norm, and a head unless it is tied.

    A layer: q and o are hidden x heads * head_dim, k and v hidden x kv_heads * head_dim, the three matrices of the
    feed-forward hidden x ffn, and two norms of hidden.
    """
    model, attention = spec.model, spec.model.layer.attention
    hidden = model.hidden_size
    head_dim = attention.head_dim or hidden // attention.heads
    kv_heads = attention.kv_heads or attention.heads
    layer = 2 * hidden * head_dim * (attention.heads + kv_heads) + 3 * hidden * model.layer.ffn.hidden_size + 2 * hidden
    embeddings = model.vocab_size * hidden * (1 if model.tied_embeddings else 2)
    return embeddings + model.layers * layer + hidden
