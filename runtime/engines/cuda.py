"""The device and the peers of a rank on an NVIDIA GPU: memory and stream through PyTorch, the engine through TensorRT.

Written against TensorRT 11's interface. It has not been run: no machine at hand had both a GPU that TensorRT for RTX
serves, or full TensorRT, and a driver. What calls it has been, with host memory (tests/runtime/engines).
"""

import ctypes
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from archwright.compiler.targets.tensorrt_loader import Flavor, load_tensorrt, tensorrt_title
from archwright.compiler.targets.tensorrt_progress import shared_logger
from archwright.runtime.engines.device import Array, Place
from archwright.spec import ArchwrightError

CONNECT_TIMEOUT = timedelta(minutes=10)


class TorchMemory:
    """Bytes in a tensor, which owns them."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    @property
    def address(self) -> int:
        return self.tensor.data_ptr()

    @property
    def num_bytes(self) -> int:
        return self.tensor.numel()


class CudaDevice:
    """A GPU with a stream of its own: TensorRT synchronizes more on the default one."""

    def __init__(self, index: int) -> None:
        torch.cuda.set_device(index)
        self.device = torch.device("cuda", index)
        self.torch_stream = torch.cuda.Stream(self.device)
        self.description = torch.cuda.get_device_name(index)
        self._runtime: Any = None

    @property
    def stream(self) -> int:
        return self.torch_stream.cuda_stream

    def allocate(self, num_bytes: int) -> TorchMemory:
        with torch.cuda.stream(self.torch_stream):
            return TorchMemory(torch.zeros(num_bytes, dtype=torch.uint8, device=self.device))

    def write(self, memory: TorchMemory, array: Array) -> None:
        content = torch.from_numpy(array.reshape(-1).view(np.uint8))
        with torch.cuda.stream(self.torch_stream):
            memory.tensor[: content.numel()].copy_(content)

    def read(self, memory: TorchMemory, shape: Sequence[int], dtype: np.dtype[Any]) -> Array:
        num_bytes = int(np.prod(shape)) * dtype.itemsize
        with torch.cuda.stream(self.torch_stream):
            content = memory.tensor[:num_bytes].cpu()
        self.torch_stream.synchronize()
        return content.numpy().view(dtype).reshape(shape)

    def deserialize(self, content: bytes, *, library: Flavor, host_code: bool) -> Any:
        trt = load_tensorrt(library)
        logger = shared_logger(trt)
        logger.messages.clear()
        self._runtime = trt.Runtime(logger)  # engines need it to live
        if host_code:
            self._runtime.engine_host_code_allowed = True
        engine = self._runtime.deserialize_cuda_engine(content)
        if engine is None:
            reasons = "; ".join(logger.messages) or "TensorRT gave no reason"
            message = f"{tensorrt_title(trt)} refuses the engine: {reasons}"
            raise ArchwrightError("RUN045", message, help="build the engines again on this machine")
        return engine

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.torch_stream, capture_error_mode="thread_local"):
            enqueue()

        def replay() -> None:
            with torch.cuda.stream(self.torch_stream):
                graph.replay()

        return replay


class TorchPeers:
    """The other ranks through torch.distributed: NCCL among GPUs; with gloo the same calls serve CPUs."""

    def __init__(self, place: Place, world: int, rendezvous: str, device: CudaDevice | None) -> None:
        self._device = device
        dist.init_process_group(
            "gloo" if device is None else "nccl",
            init_method=f"file://{rendezvous}",
            rank=place.rank,
            world_size=world,
            timeout=CONNECT_TIMEOUT,
            device_id=None if device is None else device.device,
        )
        groups = [tuple(range(first, first + place.per_stage)) for first in range(0, world, place.per_stage)]
        # Every rank takes part in making every group, in this order.
        self.groups = {ranks: dist.new_group(list(ranks)) for ranks in groups}

    def communicator(self, ranks: Sequence[int]) -> Any:
        """A PyCapsule of the ncclComm_t that PyTorch holds for the group."""
        assert self._device is not None, "gloo has no communicators"
        group: Any = self.groups[tuple(ranks)]
        dist.all_reduce(torch.zeros(1, device=self._device.device), group=group)  # makes the communicator
        torch.cuda.synchronize(self._device.device)
        pointer = group._get_backend(self._device.device)._comm_ptr()
        new_capsule = ctypes.pythonapi.PyCapsule_New
        new_capsule.restype = ctypes.py_object
        new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return new_capsule(pointer, None, None)

    def send(self, memory: TorchMemory, num_bytes: int, to: int) -> None:
        with self._on_stream():
            dist.send(memory.tensor[:num_bytes], to)

    def receive(self, memory: TorchMemory, num_bytes: int, source: int) -> None:
        with self._on_stream():
            dist.recv(memory.tensor[:num_bytes], source)

    def _on_stream(self) -> Any:
        return torch.cuda.stream(None if self._device is None else self._device.torch_stream)


class NoPeers:
    """For an artifact of one rank."""

    def communicator(self, ranks: Sequence[int]) -> Any:
        raise AssertionError("a rank alone has no communicator")

    def send(self, memory: TorchMemory, num_bytes: int, to: int) -> None:
        raise AssertionError("a rank alone sends nothing")

    def receive(self, memory: TorchMemory, num_bytes: int, source: int) -> None:
        raise AssertionError("a rank alone receives nothing")


def machine(place: Place, world: int, rendezvous: str) -> tuple[CudaDevice, TorchPeers | NoPeers]:
    """Rank r on GPU r."""
    device = CudaDevice(place.rank)
    return device, NoPeers() if world == 1 else TorchPeers(place, world, rendezvous, device)
