"""The identity of an architecture."""

import hashlib
import json

from archwright.spec.models import Spec


def spec_digest(spec: Spec) -> str:
    """SHA-256 of the model section's canonical JSON, in hexadecimal: equal for specs whose models compute the same.

    Defaults are written out (`kv_heads`, `head_dim` too), keys sorted. Name, paths, training and build do not count,
    nor does `init`, which says how weights begin and not what they mean.
    """
    model = spec.model
    section = model.model_dump(mode="json", exclude={"init"})
    attention = section["layer"]["attention"]
    attention["kv_heads"] = attention["kv_heads"] or attention["heads"]
    attention["head_dim"] = attention["head_dim"] or model.hidden_size // model.layer.attention.heads
    text = json.dumps(section, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
