"""The plans that must train alike, the models that they train, and what a training tells of itself."""

from dataclasses import dataclass, field

Overrides = dict[str, object]

BASE: Overrides = {
    "model.vocab_size": 91,  # no degree divides it: pieces of the vocabulary are filled up
    "tokenizer.vocab_size": 91,
    "model.hidden_size": 32,
    "model.layers": 4,
    "parallel.data_shard": 1,
    "train.batch_size": 8,
    "train.sequence_length": 16,
    "train.micro_batches": 2,
    "train.precision": "float64",
    "train.clip_norm": 0.5,
    "train.optimizer.learning_rate": 3e-3,
}
MODELS: dict[str, Overrides] = {
    "tied": {"model.layer.ffn.hidden_size": 48},
    "untied": {
        "model.layers": 2,
        "model.tied_embeddings": False,
        "model.positions": {"kind": "learned"},
        "model.layer.norm": {"kind": "layernorm"},
        "model.layer.attention.bias": "all",
        "model.layer.attention.position": {"kind": "none"},
        "model.layer.attention.mask": {"kind": "window", "size": 5},
        "model.layer.ffn": {"kind": "gelu", "hidden_size": 48},
    },
}


MOE: Overrides = {
    "model.layer.ffn": {
        "kind": "moe",
        "experts": 4,
        "experts_per_token": 2,
        "hidden_size": 16,
        "shared": {"hidden_size": 24},
        "balance_loss": 0.05,
        "z_loss": 0.01,
    }
}
MODELS |= {"moe": MOE, "moe, untied": {"model.layers": 2, "model.tied_embeddings": False, **MOE}}


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """A plan of some processes. settings: overrides of the spec."""

    processes: int
    settings: Overrides = field(default_factory=dict[str, object])


def _mesh(processes: int, **degrees: object) -> Mesh:
    return Mesh(processes=processes, settings={f"parallel.{axis}": degree for axis, degree in degrees.items()})


FULL: Overrides = {"train.activation_checkpointing": {"kind": "full"}}
SELECTIVE: Overrides = {"train.activation_checkpointing": {"kind": "selective"}}
MESHES: dict[str, Mesh] = {
    "one": Mesh(processes=1),
    "one, accumulated": Mesh(processes=1, settings={"train.micro_batches": 4}),
    "one, checkpointing": Mesh(processes=1, settings=FULL),
    "one, selective": Mesh(processes=1, settings=SELECTIVE),
    "data_replicate 2": _mesh(2, data_replicate=2),
    "data_shard 2": _mesh(2, data_shard=2),
    "data_shard 2, accumulated": Mesh(processes=2, settings={"parallel.data_shard": 2, "train.micro_batches": 4}),
    "data_shard 2, checkpointing": Mesh(processes=2, settings={"parallel.data_shard": 2, **FULL}),
    "tensor 2": _mesh(2, tensor=2),
    "tensor 2, sequence": _mesh(2, tensor=2, sequence=True),
    "tensor 2, sequence, single rows": Mesh(
        processes=2, settings={"parallel.tensor": 2, "parallel.sequence": True, "train.micro_batches": 8}
    ),
    "tensor 2, sequence, selective": Mesh(
        processes=2, settings={"parallel.tensor": 2, "parallel.sequence": True, **SELECTIVE}
    ),
    "context 2": _mesh(2, context=2),
    "context 2, ring": _mesh(2, context=2, ring=True),
    "context 2, ring, selective": Mesh(
        processes=2, settings={"parallel.context": 2, "parallel.ring": True, **SELECTIVE}
    ),
    "expert 2": _mesh(2, expert=2),
    "pipeline 2, 1f1b": _mesh(2, pipeline=2),
    "pipeline 2, gpipe": _mesh(2, pipeline=2, schedule={"kind": "gpipe"}),
    "pipeline 2, interleaved": _mesh(2, pipeline=2, schedule={"kind": "interleaved"}),
    "data_shard 4": _mesh(4, data_shard=4),
    "tensor 4": _mesh(4, tensor=4),
    "data_shard 2, tensor 2": _mesh(4, data_shard=2, tensor=2),
    "data_shard 2, tensor 2, sequence, checkpointing": Mesh(
        processes=4,
        settings={"parallel.data_shard": 2, "parallel.tensor": 2, "parallel.sequence": True, **FULL},
    ),
    "pipeline 2, tensor 2": _mesh(4, pipeline=2, tensor=2),
    "pipeline 2, tensor 2, sequence": _mesh(4, pipeline=2, tensor=2, sequence=True),
    "pipeline 2, data_shard 2": _mesh(4, pipeline=2, data_shard=2),
    "pipeline 4, 1f1b": Mesh(processes=4, settings={"parallel.pipeline": 4, "train.micro_batches": 4}),
    "data_replicate 2, data_shard 2": _mesh(4, data_replicate=2, data_shard=2),
    "context 2, tensor 2, sequence": _mesh(4, context=2, tensor=2, sequence=True),
    "context 2, data_shard 2": _mesh(4, context=2, data_shard=2),
    "context 4, ring": _mesh(4, context=4, ring=True),
    "context 2, ring, tensor 2, sequence": _mesh(4, context=2, ring=True, tensor=2, sequence=True),
    "expert 2, tensor 2, sequence": _mesh(4, expert=2, tensor=2, sequence=True),
    "expert 2, data_shard 2": _mesh(4, expert=2, data_shard=2),
    "pipeline 2, expert 2": _mesh(4, pipeline=2, expert=2),
}

NUM_STEPS = 100


def legal(model: str, mesh: str) -> bool:
    """Whether the mesh can train the model: only some have experts or as many as 4 layers; a ring knows no windows."""
    if "expert" in mesh and not model.startswith("moe"):
        return False
    if ("interleaved" in mesh or "pipeline 4" in mesh) and "untied" in model:
        return False
    return "ring" not in mesh or model != "untied"


COVERING = [
    ("tied", "one, accumulated"),
    ("untied", "one, checkpointing"),
    ("moe, untied", "one, selective"),
    ("untied", "data_replicate 2"),
    ("tied", "data_shard 2, checkpointing"),
    ("untied", "tensor 2, sequence"),
    ("tied", "context 2"),
    ("moe, untied", "context 2, ring"),
    ("moe", "expert 2"),
    ("tied", "pipeline 2, 1f1b"),
    ("moe", "pipeline 2, interleaved"),
    ("untied", "tensor 4"),
    ("untied", "data_shard 2, tensor 2"),
    ("moe", "pipeline 2, tensor 2, sequence"),
    ("tied", "pipeline 4, 1f1b"),
    ("moe, untied", "data_replicate 2, data_shard 2"),
]
"""What `make test` trains, by number of processes, so that a world is started once; `make test-slow` trains every model
on every mesh."""
