"""spec or folder → `nn.Module`."""

from pathlib import Path

import numpy as np
import torch

from archwright.compiler.interpreters.torch_module import TorchProgram
from archwright.compiler.interpreters.torch_ops import TorchOps
from archwright.compiler.ir import Degrees, Program
from archwright.compiler.passes import run_passes
from archwright.compiler.weights.folder import open_folder
from archwright.compiler.weights.initialization import draw
from archwright.spec import Spec

DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")}


def compile_module(
    source: Spec | str | Path, device: str | torch.device = "cpu", *, dtype: str = "float32", seed: int = 0
) -> TorchProgram:
    """The model of `source` as a plain `nn.Module`: initialised from a spec, loaded from a model folder or a run.

    dtype: of parameters and computation. seed: of the initial weights; ignored where weights are loaded.
    Raises SpecError or ArchwrightError where the spec or the folder is not usable.
    """
    if isinstance(source, Spec):
        module = build_module(run_passes(source, Degrees()).program, dtype=DTYPES[dtype], device=device)
        initialize(module, seed)
        return module
    folder = open_folder(Path(source))
    module = build_module(run_passes(folder.spec, Degrees()).program, dtype=DTYPES[dtype], device=device)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(as_torch(folder.weights.read(name)))
    return module


def build_module(program: Program, *, dtype: torch.dtype, device: str | torch.device) -> TorchProgram:
    """An uninitialised module that computes in the dtype of its parameters."""
    return TorchProgram(program, TorchOps(dtype=dtype), dtype=dtype, device=device)


def initialize(module: TorchProgram, seed: int) -> None:
    """Fill plain parameters with the plan-independent initial values."""
    params = module.program.params()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.from_numpy(draw(params[name], name, seed)))


def as_torch(array: np.ndarray) -> torch.Tensor:
    """A torch view of an array; arrays of ml_dtypes' bfloat16 and float8 are reinterpreted: NumPy has no such types."""
    if array.dtype.name == "float8_e4m3fn":
        return torch.from_numpy(array.view(np.uint8).copy()).view(torch.float8_e4m3fn)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16)
    # A memory map is read-only, and torch has no such tensors: that one is copied.
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))
