"""Weights on disk as safetensors, read by memory map and written one tensor at a time, without torch.

The format: 8 bytes little-endian length, that many bytes of JSON (name → dtype, shape, data_offsets), then the data.
https://github.com/huggingface/safetensors#format
"""

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from archwright.compiler.ir import Param
from archwright.compiler.weights.initialization import draw
from archwright.spec import ArchwrightError
from archwright.spec.json_text import parse_json

Array = NDArray[Any]
DTYPES: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
}
PRECISIONS: Mapping[str, np.dtype[Any]] = {
    "float64": DTYPES["F64"],
    "float32": DTYPES["F32"],
    "float16": DTYPES["F16"],
    "bfloat16": DTYPES["BF16"],
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_ALIGNMENT = 64
SLAB_BYTES = 1 << 20
"""Of a tensor that is rounded or made contiguous while it is written: what a processor's cache holds."""
MAX_FILE_BYTES = 5 << 30
INDEX = "model.safetensors.index.json"


class Sink(Protocol):
    """What bytes are appended to."""

    def write(self, data: Any, /) -> object: ...


class Weights(Protocol):
    """Named tensors, read whole or in part."""

    def names(self) -> Iterable[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> Array:
        """The tensor or a part of it; may be a read-only view of a memory map."""
        ...


@dataclass(frozen=True, kw_only=True)
class GeneratedWeights:
    """The initial weights of a Program, drawn when they are read. precision: that they are rounded to."""

    params: Mapping[str, Param]
    seed: int
    precision: str = "float32"

    def names(self) -> Iterable[str]:
        return self.params

    def shape(self, name: str) -> tuple[int, ...]:
        return self.params[name].shape

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> Array:
        return draw(self.params[name], name, self.seed, slices, dtype=PRECISIONS[self.precision])


@dataclass(frozen=True, kw_only=True)
class _Entry:
    path: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int


class SafetensorsWeights:
    """The tensors of one safetensors file, or of all files of a folder.

    Raises ArchwrightError RUN010 where a file is not safetensors or ends early.
    """

    def __init__(self, path: Path) -> None:
        self._entries: dict[str, _Entry] = {}
        files = [path] if path.is_file() else sorted(path.glob("model*.safetensors"))
        if not files:
            help = "copy the folder again; a model folder has its weights in model*.safetensors"
            raise ArchwrightError("RUN010", "holds no model*.safetensors", where=str(path), help=help)
        for file in files:
            entries = _read_header(file)
            if twice := entries.keys() & self._entries.keys():
                name = min(twice)
                help = "keep the files of one model only"
                message = f"`{name}` is also in {self._entries[name].path.name}"
                raise ArchwrightError("RUN010", message, where=str(file), help=help)
            self._entries.update(entries)

    def names(self) -> Iterable[str]:
        return self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> np.dtype[Any]:
        return self._entries[name].dtype

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> Array:
        entry = self._entries[name]
        if not prod(entry.shape):
            return np.empty(entry.shape, entry.dtype)
        whole = np.memmap(entry.path, entry.dtype, "r", offset=entry.offset, shape=entry.shape)
        return np.asarray(whole if slices is None else whole[slices])


def _read_header(path: Path) -> dict[str, _Entry]:
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise ValueError(f"its header is said to have {length} bytes, the file has {size}")
            header: dict[str, Any] = parse_json(file.read(length))
        header.pop("__metadata__", None)
        entries: dict[str, _Entry] = {}
        for name, item in header.items():
            shape, (start, stop) = tuple(item["shape"]), item["data_offsets"]
            if item["dtype"] not in DTYPES:
                raise ValueError(f"`{name}` has dtype {item['dtype']}; known are {', '.join(DTYPES)}")
            dtype = DTYPES[item["dtype"]]
            if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
                raise ValueError(f"`{name}` has shape {item['shape']} at {item['data_offsets']}")
            if stop - start != prod(shape) * dtype.itemsize or 8 + length + stop > size:
                raise ValueError(f"`{name}` lies outside the file or its size is wrong")
            entries[name] = _Entry(path=path, dtype=dtype, shape=shape, offset=8 + length + start)
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        help = "copy the file again; it is broken or cut short"
        raise ArchwrightError("RUN010", f"not a whole safetensors file: {error}", where=str(path), help=help) from error
    return entries


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """A tensor to be written: what it will be, and how to get it when its turn comes."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    produce: Callable[[], Array]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one file, holding one tensor in memory at a time. The caller renames it into place (spec.files)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        stop = offset + tensor.num_bytes
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": tensor.shape, "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors.items():
            write_array(file, tensor.produce(), tensor.dtype, tensor.shape, name)


def write_array(file: Sink, array: Array, dtype: np.dtype[Any], shape: tuple[int, ...], name: str) -> None:
    """Append an array's bytes in `dtype`, rounding in slabs so that no second copy of a large tensor is made."""
    assert array.shape == shape, f"{name} is {array.shape}, announced as {shape}"
    rows = max(1, SLAB_BYTES // max(1, array[:1].nbytes))
    for start in range(0, max(1, len(array)), rows):
        file.write(np.ascontiguousarray(array[start : start + rows], dtype=dtype).view(np.uint8).data)


def write_weights(folder: Path, tensors: Mapping[str, Tensor], *, max_file_bytes: int = MAX_FILE_BYTES) -> None:
    """Write `model.safetensors`, or files of at most `max_file_bytes` and their index as Hugging Face does."""
    groups: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if groups[-1] and filled + tensor.num_bytes > max_file_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = tensor
        filled += tensor.num_bytes
    if len(groups) == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        write_safetensors(folder / name, group)
        weight_map |= dict.fromkeys(group, name)
    total = sum(tensor.num_bytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
