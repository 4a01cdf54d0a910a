"""Fake engines in processes of their own, on PyTorch's memory, with PyTorch's groups and hand-offs through gloo."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from archwright.runtime.engines.cuda import TorchMemory, TorchPeers
from archwright.runtime.engines.device import Array, Place
from tests.runtime.engines.fake import FakeDevice, FakeEngine
from tests.runtime.engines.models import fake_engine


@dataclass
class GlooCommunicator:
    group: Any

    def meet(self) -> None:
        dist.barrier(self.group)

    def all_reduce(self, x: Array) -> Array:
        tensor = torch.from_numpy(x.copy())
        dist.all_reduce(tensor, group=self.group)
        return tensor.numpy()


class GlooPeers(TorchPeers):
    def communicator(self, ranks: Any) -> GlooCommunicator:
        return GlooCommunicator(self.groups[tuple(ranks)])


class TorchDevice(FakeDevice):
    def allocate(self, num_bytes: int) -> Any:
        return TorchMemory(torch.zeros(num_bytes, dtype=torch.uint8))

    def deserialize(self, content: bytes, *, library: str, host_code: bool) -> FakeEngine:
        self.engine = fake_engine(content)
        return super().deserialize(content, library=library, host_code=host_code)


def machine(place: Place, world: int, rendezvous: str) -> tuple[TorchDevice, GlooPeers]:
    nothing: Any = None
    return TorchDevice(engine=nothing), GlooPeers(place, world, rendezvous, None)
