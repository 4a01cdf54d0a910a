"""Our safetensors reader and writer against the `safetensors` library, and against broken files."""

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from archwright.compiler.module import as_torch
from archwright.compiler.weights.streaming import (
    INDEX,
    PRECISIONS,
    SafetensorsWeights,
    Tensor,
    write_safetensors,
    write_weights,
)
from archwright.spec import ArchwrightError

ARRAYS = {
    "a": np.linspace(-3, 3, 35, dtype=np.float32).reshape(5, 7),
    "b": np.array([1e-8, 1.0, 65504.0, -2.5], np.float32),
    "empty": np.empty((0, 4), np.float32),
    "cube": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
}


def tensors(precision: str) -> dict[str, Tensor]:
    return {
        name: Tensor(shape=array.shape, dtype=PRECISIONS[precision], produce=lambda array=array: array)
        for name, array in ARRAYS.items()
    }


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_library_reads_what_we_write(precision: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, tensors(precision))
    loaded = safetensors.torch.load_file(path)
    assert set(loaded) == set(ARRAYS)
    for name, array in ARRAYS.items():
        expected = torch.from_numpy(array).to(getattr(torch, precision))
        assert loaded[name].dtype == expected.dtype and torch.equal(loaded[name], expected)
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}, "transformers insists on it"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_we_read_what_the_library_writes(precision: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    expected = {name: torch.from_numpy(array).to(getattr(torch, precision)) for name, array in ARRAYS.items()}
    safetensors.torch.save_file(expected, path)
    weights = SafetensorsWeights(tmp_path)
    assert set(weights.names()) == set(ARRAYS)
    for name, tensor in expected.items():
        assert weights.shape(name) == tuple(tensor.shape) and weights.dtype(name) == PRECISIONS[precision]
        assert torch.equal(as_torch(weights.read(name)), tensor)
    part = weights.read("cube", (slice(1, 2), slice(None), slice(1, 3)))
    np.testing.assert_array_equal(part.astype(np.float32), ARRAYS["cube"][1:2, :, 1:3])


def test_data_begin_aligned_and_reading_copies_nothing(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", tensors("float32"))
    (length,) = struct.unpack("<Q", (tmp_path / "model.safetensors").read_bytes()[:8])
    assert (8 + length) % 64 == 0
    view = SafetensorsWeights(tmp_path).read("a")
    assert not view.flags.writeable and view.base is not None


def test_rounding_is_to_nearest_even_in_slabs(tmp_path: Path) -> None:
    large = np.random.default_rng(0).standard_normal((5000, 1000)).astype(np.float32)  # over one slab of 16 MiB
    tensor = Tensor(shape=(1000, 5000), dtype=PRECISIONS["bfloat16"], produce=lambda: large.T)
    write_safetensors(tmp_path / "model.safetensors", {"w": tensor})
    stored = SafetensorsWeights(tmp_path).read("w")
    np.testing.assert_array_equal(stored, large.T.astype(ml_dtypes.bfloat16))
    torch_rounded = torch.from_numpy(large.T.copy()).bfloat16()
    assert torch.equal(as_torch(stored), torch_rounded)


def test_many_files_with_hugging_faces_index(tmp_path: Path) -> None:
    write_weights(tmp_path, tensors("float32"), max_file_bytes=150)
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert (
        names == [f"model-{i:05d}-of-{len(names):05d}.safetensors" for i in range(1, len(names) + 1)] and len(names) > 1
    )
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in ARRAYS.values())
    for name, file in index["weight_map"].items():
        np.testing.assert_array_equal(safetensors.numpy.load_file(tmp_path / file)[name], ARRAYS[name])
    weights = SafetensorsWeights(tmp_path)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(weights.read(name), array)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    write_weights(tmp_path, tensors("float32"))
    write_weights(tmp_path, tensors("float32"), max_file_bytes=150)
    with pytest.raises(ArchwrightError, match=r"RUN010 .*is also in"):
        SafetensorsWeights(tmp_path)


def test_a_tensor_that_is_not_what_was_announced_is_refused(tmp_path: Path) -> None:
    tensor = Tensor(shape=(2, 2), dtype=PRECISIONS["float32"], produce=lambda: np.ones((4,), np.float32))
    with pytest.raises(AssertionError, match="announced"):
        write_safetensors(tmp_path / "model.safetensors", {"w": tensor})


def refused(path: Path) -> str:
    with pytest.raises(ArchwrightError, match="RUN010") as caught:
        SafetensorsWeights(path)
    return caught.value.message


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, tensors("float16"))
    whole = path.read_bytes()
    for length in (0, 5, 8, 9, 60, 200, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(path)
    path.write_bytes(whole)
    SafetensorsWeights(path)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header",
    [
        "{", "[]", "null", "7", '"text"', "\xff", "[" * 100_000,
        {"w": 3}, {"w": []}, {"w": {"dtype": "F32"}},
        {"w": {**ENTRY, "dtype": "F8_E4M3"}}, {"w": {**ENTRY, "dtype": 3}}, {"w": {**ENTRY, "dtype": []}},
        {"w": {**ENTRY, "shape": [3]}}, {"w": {**ENTRY, "shape": [-1, -2]}}, {"w": {**ENTRY, "shape": ["2"]}},
        {"w": {**ENTRY, "shape": [2.0]}}, {"w": {**ENTRY, "shape": 2}},
        {"w": {**ENTRY, "data_offsets": [0]}}, {"w": {**ENTRY, "data_offsets": [-8, 0]}},
        {"w": {**ENTRY, "data_offsets": [8, 16]}}, {"w": {**ENTRY, "data_offsets": [0.0, 8.0]}},
        {"w": {**ENTRY, "data_offsets": None}},
    ],
)  # fmt: skip
def test_a_wrong_header_is_refused(header: Any, tmp_path: Path) -> None:
    text = header.encode("latin1") if isinstance(header, str) else json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    assert "not a whole safetensors file" in refused(path)


def test_a_header_said_to_be_longer_than_the_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    assert "its header is said to have" in refused(path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    assert "holds no model*.safetensors" in refused(tmp_path)
