"""A model that was trained for seconds, with channels planted that plain rounding cannot stand."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from archwright.compiler import compile_module
from archwright.compiler.weights.folder import write_model_folder
from archwright.compiler.weights.streaming import PRECISIONS, Tensor
from archwright.spec import Spec, load

SPEC = """\
version: 1
name: trained
model:
  vocab_size: 96
  hidden_size: 64
  max_positions: 64
  layers: 2
  layer:
    norm: {kind: rmsnorm}
    attention: {kind: gqa, heads: 4, kv_heads: 2, head_dim: 16, mask: {kind: causal}, position: {kind: rope}}
    ffn: {kind: swiglu, hidden_size: 128}
  init: {kind: normal, std: 0.05}
"""
STEPS, BATCH, LENGTH = 220, 16, 32
OUTLIERS = {"input_layernorm": (3, 41), "post_attention_layernorm": (11, 60), "norm": (7,)}
FACTOR = 64.0


def markov(number: int, length: int, seed: int) -> NDArray[np.int64]:
    """Sequences of a chain in which each token has four successors, of unlike probabilities."""
    chooser = np.random.default_rng(99)
    successors_V4 = chooser.integers(0, 96, (96, 4))
    steps = np.random.default_rng(seed)
    ids_NS = np.empty((number, length), np.int64)
    ids_NS[:, 0] = steps.integers(0, 96, number)
    for position in range(1, length):
        choice = steps.choice(4, number, p=[0.55, 0.25, 0.15, 0.05])
        ids_NS[:, position] = successors_V4[ids_NS[:, position - 1], choice]
    return ids_NS


def trained_model(folder: Path, *, outliers: bool) -> Path:
    """A model folder. outliers: some channels behind each norm are FACTOR times as large, and the columns that read
    them as much smaller: the model computes the same."""
    (folder / "trained.yaml").write_text(SPEC)
    spec = load(folder / "trained.yaml")
    state = {name: value.detach().double().numpy() for name, value in _train(spec).items()}
    if outliers:
        plant(state)
    tensors = {
        name: Tensor(shape=array.shape, dtype=PRECISIONS["float32"], produce=lambda array=array: array)
        for name, array in state.items()
    }
    write_model_folder(folder / "model", spec, tensors, (), details={})
    return folder / "model"


def _train(spec: Spec) -> Mapping[str, torch.Tensor]:
    module = compile_module(spec, seed=1)
    optimizer = torch.optim.AdamW(module.parameters(), lr=4e-3)
    ids = torch.from_numpy(markov(STEPS * BATCH, LENGTH + 1, seed=0))
    for step in range(STEPS):
        rows = ids[step * BATCH : (step + 1) * BATCH]
        loss_sum, num_tokens = module(rows[:, :-1], rows[:, 1:])
        optimizer.zero_grad()
        (loss_sum / num_tokens).backward()
        optimizer.step()
    return dict(module.named_parameters())


def plant(state: dict[str, NDArray[np.float64]]) -> None:
    """Scale channels up in the norms' weights, and down where they are read."""
    readers = {
        "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    }
    for layer in range(2):
        for norm, names in readers.items():
            for channel in OUTLIERS[norm]:
                state[f"model.layers.{layer}.{norm}.weight"][channel] *= FACTOR
                for name in names:
                    state[f"model.layers.{layer}.{name}.weight"][:, channel] /= FACTOR
    for channel in OUTLIERS["norm"]:
        state["model.norm.weight"][channel] *= FACTOR
        state["lm_head.weight"][:, channel] /= FACTOR
