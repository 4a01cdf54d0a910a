"""A Program run one segment after the other, so that only one layer's weights are in memory. Float32, on the CPU."""

from dataclasses import replace
from typing import Any

import torch

from archwright.compiler.interpreters.torch_module import TorchProgram
from archwright.compiler.ir import Program
from archwright.compiler.module import as_torch, build_module
from archwright.compiler.weights.streaming import Weights


def segment_module(program: Program, weights: Weights, number: int) -> TorchProgram:
    """The segment as a module, for token ids where it is the first and for hidden states elsewhere."""
    module = build_module(replace(program, segments=(program.segments[number],)), dtype=torch.float32, device="cpu")
    sites = program.sites()  # a tied head owns its matrix here, and reads the embedding's
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(as_torch(weights.read(sites[name].name)))
    return module.eval().requires_grad_(False)


def run_rows(module: TorchProgram, x_NSD: torch.Tensor) -> torch.Tensor:
    """The module on each sequence by itself: what comes out of one does not depend on how many there are."""
    with torch.inference_mode():
        rows: list[Any] = [module(x_NSD[row : row + 1]) for row in range(len(x_NSD))]
        return torch.cat(rows)
