"""Model folders and runs through PyTorch. B batch, S sequence, V vocabulary."""

import numpy as np
import torch

from archwright.compiler.interpreters.torch_module import Cache, TorchProgram
from archwright.compiler.module import DTYPES, as_torch, build_module
from archwright.compiler.weights.folder import ModelFolder
from archwright.runtime.backends.base import Backend, Ids, Logits
from archwright.spec import ArchwrightError


class TorchBackend(Backend[Cache]):
    """A TorchProgram that only runs forward."""

    max_batch = None

    def __init__(self, module: TorchProgram, description: str) -> None:
        self._module = module.eval().requires_grad_(False)
        self._device = next(module.parameters()).device
        self.vocab_size = module.program.vocab_size
        self.capacity = module.program.max_positions
        self.description = description

    @torch.inference_mode()
    def new_cache(self, batch: int, positions: int) -> Cache:
        return self._module.make_cache(batch=batch, positions=positions)

    @property
    def token_bytes(self) -> int:
        return 0

    def forward(self, cache: Cache, ids_BS: Ids, positions_BS: Ids, write_index_B: Ids, visible: int) -> Logits:
        return self._run(cache, ids_BS, positions_BS, write_index_B, visible, None)

    def forward_last(
        self, cache: Cache, ids_BS: Ids, positions_BS: Ids, write_index_B: Ids, visible: int, index_B: Ids
    ) -> Logits:
        return self._run(cache, ids_BS, positions_BS, write_index_B, visible, index_B)[:, 0]

    @torch.inference_mode()
    def _run(
        self, cache: Cache, ids_BS: Ids, positions_BS: Ids, write_index_B: Ids, visible: int, index_B: Ids | None
    ) -> Logits:
        self._module.bind_cache(cache)
        logits_BSV = self._module(
            self._tensor(ids_BS),
            positions_BS=self._tensor(positions_BS),
            write_index_B=self._tensor(write_index_B),
            visible=visible,
            logit_index_B=None if index_B is None else self._tensor(index_B),
        )
        return logits_BSV.float().cpu().numpy()

    def _tensor(self, array: Ids) -> torch.Tensor:
        return torch.from_numpy(np.array(array, np.int64)).to(self._device)


def open_torch(folder: ModelFolder, device: str, precision: str) -> TorchBackend:
    """Load the weights of a model folder or checkpoint.

    device: auto | cpu | cuda | cuda:N. precision: auto | float64 | float32 | bfloat16 | float16; auto is the
    precision of the weights on a GPU, and float32 on a CPU, where narrower types are slower. Raises ArchwrightError
    RUN021 or RUN022.
    """
    place = _device(device)
    if precision not in ("auto", *DTYPES):
        help = f"use auto, {', '.join(DTYPES)}"
        raise ArchwrightError("RUN022", f"there is no precision `{precision}`", help=help)
    if precision == "auto":
        stored = str(folder.weights.read(next(iter(folder.program.params()))).dtype)
        precision = stored if place.type == "cuda" and stored in DTYPES else "float32"
    module = build_module(folder.program, dtype=DTYPES[precision], device=place)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(as_torch(folder.weights.read(name)))
    return TorchBackend(module, f"PyTorch {torch.__version__}, {precision}, {place}")


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        message = f"`{device}` is not a device"
        raise ArchwrightError("RUN021", message, help="use auto, cpu, cuda or cuda:N") from error
    found = torch.cuda.device_count()
    if place.type not in ("cpu", "cuda") or (place.type == "cuda" and (place.index or 0) >= found):
        raise ArchwrightError("RUN021", f"PyTorch has no device `{device}` here", help="use auto or cpu")
    return place
