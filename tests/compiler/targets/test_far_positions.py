"""RoPE at position 131,071 in bfloat16: the angle is exact, and what is rounded is x alone.

A bfloat16 has 8 bits and a float32 angle of 131,071 rad is off by up to 2⁻⁸ rad: tables must be formed in float64 and
kept in float32. B batch, S sequence, N heads, H head_dim, P positions.
"""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch

from archwright.compiler.interpreters import torch_ops
from archwright.compiler.interpreters.numpy_ops import NumpyOps
from archwright.compiler.interpreters.onnx_ops import DTYPES, OPSET, OnnxOps, Tensor
from archwright.compiler.ir import RopeTable, Step
from archwright.compiler.targets.retype import as_float32

POSITIONS = 131_072
TABLES = [
    RopeTable(head_dim=64, theta=500_000.0, max_positions=POSITIONS),
    RopeTable(head_dim=64, theta=500_000.0, max_positions=POSITIONS, factor=8.0, low=1.0, high=4.0),
]
FLOAT32 = 2.0**-22
"""Of the largest value: a rounding of the table, of two products and of their sum."""
ONE_ROUNDING = 1.01 * 2.0**-8


def inputs(table: RopeTable) -> tuple[np.ndarray, np.ndarray]:
    """x [1, 2, S, H], already in bfloat16, and the last positions and some before."""
    positions_BS = np.array([[POSITIONS - 1, POSITIONS - 2, 100_003, 65_537, 8_000]])
    x_BNSH = np.random.default_rng(0).standard_normal((1, 2, positions_BS.shape[1], table.head_dim))
    return x_BNSH.astype(ml_dtypes.bfloat16).astype(np.float64), positions_BS


def exact(table: RopeTable) -> np.ndarray:
    x_BNSH, positions_BS = inputs(table)
    return NumpyOps({}).rope(x_BNSH, table, Step(positions_BS=positions_BS))


def onnx_rotation(table: RopeTable) -> bytes:
    """The exporter's rotation in bfloat16 as a graph of its own, its tables inside, retyped for the CPU."""
    shape = ("batch", 2, "sequence", table.head_dim)
    x = ir.Value(name="x", shape=ir.Shape(shape), type=ir.TensorType(DTYPES["bfloat16"]))
    ids = ir.Value(name="ids", shape=ir.Shape(("batch", "sequence")), type=ir.TensorType(ir.DataType.INT64))
    ops = OnnxOps(precision="bfloat16", capacity=POSITIONS, degrees={}, caches={})
    y = ops.rope(Tensor(x, ops), table, Step(positions_BS=Tensor(ids, ops)))
    for external in ops.externals.values():
        assert not isinstance(external.source, str)
        external.value.const_value = ir.tensor(external.source(), name=external.value.name)
    stored = [external.value for external in ops.externals.values()]
    graph = ir.Graph([x, ids], [y.value], nodes=ops.nodes, initializers=stored, opset_imports={"": OPSET}, name="rope")
    return as_float32(ir.to_proto(ir.Model(graph, ir_version=12))).SerializeToString()


@pytest.mark.parametrize("table", TABLES, ids=["plain", "scaled"])
def test_onnx(table: RopeTable) -> None:
    ort = pytest.importorskip("onnxruntime")
    x_BNSH, positions_BS = inputs(table)
    session = ort.InferenceSession(onnx_rotation(table), providers=["CPUExecutionProvider"])
    (actual,) = session.run(None, {"x": x_BNSH.astype(np.float32), "ids": positions_BS})
    expected = exact(table)
    assert np.abs(actual - expected).max() < FLOAT32 * np.abs(expected).max()


@pytest.mark.parametrize("table", TABLES, ids=["plain", "scaled"])
def test_torch(table: RopeTable) -> None:
    x_BNSH, positions_BS = inputs(table)
    ops = torch_ops.TorchOps(dtype=torch.bfloat16)
    step = torch_ops.make_step({table.key: table}, [], ops.dtype, positions_BS=torch.from_numpy(positions_BS))
    angle_B1SH = positions_BS[:, None, :, None] * np.array(table.frequencies())
    for found, function in zip(step.rotations[table.key], (np.cos, np.sin), strict=True):
        assert np.abs(found.double().numpy() - function(angle_B1SH)).max() < 2.0**-24
    actual, expected = ops.rope(torch.from_numpy(x_BNSH).bfloat16(), table, step).double().numpy(), exact(table)
    smallest = 1e-4 * np.abs(expected).max()  # below it, the float32 arithmetic in between shows
    assert np.max(np.abs(actual - expected) / (np.abs(expected) + smallest)) < ONE_ROUNDING


def test_an_angle_in_float32_would_be_seen() -> None:
    """The bounds above tell it apart: it is some thousand times further off."""
    table = TABLES[0]
    _, positions_BS = inputs(table)
    exactly = positions_BS[..., None] * np.array(table.frequencies())
    narrow = positions_BS[..., None].astype(np.float32) * np.array(table.frequencies(), np.float32)
    assert np.abs(np.cos(narrow.astype(np.float64)) - np.cos(exactly)).max() > 1000 * 2.0**-24
