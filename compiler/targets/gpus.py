"""The GPUs of this machine, from NVIDIA's driver itself: neither PyTorch nor CUDA's toolkit is needed to ask."""

import ctypes
from dataclasses import dataclass
from typing import Any

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
_NAME_BYTES = 256


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU. capability: `9.0`, of its compute capability."""

    name: str
    capability: str

    def __str__(self) -> str:
        return f"{self.name} (SM {self.capability})"


def visible_gpus(driver: Any = None) -> tuple[Gpu, ...]:
    """In the driver's order, those that CUDA_VISIBLE_DEVICES leaves; none without a driver.

    driver: what answers in place of the system's `libcuda.so.1`.
    """
    if driver is None:
        try:
            driver = ctypes.CDLL("libcuda.so.1")
        except OSError:
            return ()
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    return tuple(_gpu(driver, index) for index in range(count.value))


def _gpu(driver: Any, index: int) -> Gpu:
    device, name = ctypes.c_int(), ctypes.create_string_buffer(_NAME_BYTES)
    numbers: list[int] = []
    driver.cuDeviceGet(ctypes.byref(device), index)
    driver.cuDeviceGetName(name, _NAME_BYTES, device)
    for attribute in (_MAJOR, _MINOR):
        number = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
        numbers.append(number.value)
    return Gpu(name=name.value.decode(errors="replace"), capability=f"{numbers[0]}.{numbers[1]}")
