"""ONNX Runtime's sessions, on a CPU or on one GPU."""

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from archwright.spec import ArchwrightError

CUDA = "CUDAExecutionProvider"
STORED = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(bfloat16)": np.float16}
"""A session's name of a type → NumPy's type of that size: it has no bfloat16, whose zeros are float16's."""
ELEMENTS = {
    "tensor(float)": TensorProto.FLOAT,
    "tensor(float16)": TensorProto.FLOAT16,
    "tensor(bfloat16)": TensorProto.BFLOAT16,
}
_ON_HOST = {
    *("Add", "Cast", "Concat", "Constant", "Equal", "Expand", "Gather", "Identity", "Max", "Min", "Mul", "Range"),
    *("Reshape", "Shape", "Slice", "Squeeze", "Sub", "Unsqueeze", "Where"),
}
"""Operators that make shapes and lengths, which ONNX Runtime itself puts on the CPU of a graph that runs on a GPU."""


def load_onnxruntime() -> ModuleType:
    """Raises ArchwrightError RUN023 where ONNX Runtime is not installed or does not load."""
    try:
        import onnxruntime
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "onnxruntime"
        found = "it is not installed" if missing else f"it does not load: {error}"
        raise ArchwrightError(
            "RUN023",
            f"graphs run on ONNX Runtime, and {found}",
            help='pip install "archwright[cpu]"; a run or a model folder runs without it, on PyTorch',
        ) from error
    return onnxruntime


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where graphs run. gpu: the number of a GPU, None for the CPU."""

    gpu: int | None = None

    @property
    def kind(self) -> str:
        return "cpu" if self.gpu is None else "cuda"

    @property
    def index(self) -> int:
        return self.gpu or 0

    def __str__(self) -> str:
        return "CPU" if self.gpu is None else f"cuda:{self.gpu}"

    def providers(self) -> list[Any]:
        """In TF32 the GPU would round the factors of float32 products to 10 bits."""
        own = [] if self.gpu is None else [(CUDA, {"device_id": str(self.gpu), "use_tf32": "0"})]
        return [*own, "CPUExecutionProvider"]

    def zeros(self, shape: Sequence[int], kind: str) -> Any:
        """An OrtValue that holds as many bytes as the type that a session names, `tensor(float16)`, takes."""
        source = np.zeros(shape, STORED[kind])
        return load_onnxruntime().OrtValue.ortvalue_from_numpy(source, self.kind, self.index)


CPU = Place()


@cache
def cuda_problem(gpu: int = 0) -> str | None:
    """Why ONNX Runtime cannot run graphs on a GPU of this machine, None where it can: it has run one."""
    ort = load_onnxruntime()
    if CUDA not in ort.get_available_providers():
        return f"ONNX Runtime {ort.__version__} is built without CUDA; onnxruntime-gpu has it"
    ort.set_default_logger_severity(3)  # 1.31 warns at every session that its CUDA provider is no plug-in
    with redirect_stdout(io.StringIO()):  # it prints what it does not find, which may be found elsewhere
        ort.preload_dlls()
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "probe", [value], [
        helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    ])  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what is wrong is said here
    try:
        providers = Place(gpu=gpu).providers()
        session = ort.InferenceSession(model.SerializeToString(), options, providers=providers, enable_fallback=0)
        if CUDA not in session.get_providers():
            return "its CUDA provider does not load: CUDA's libraries or the driver are missing or of another version"
        session.run(None, {"x": np.ones(1, np.float32)})
    except Exception as error:  # ONNX Runtime raises its own classes, which derive from Exception alone
        return " ".join(str(error).split())[:300]
    return None


def session_options() -> Any:
    options = load_onnxruntime().SessionOptions()
    # By default a product with few-bit weights rounds its other factor to 8 bits, without a word in the graph.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return options


def open_joined(source: bytes, folder: Path, place: Place = CPU) -> Any:
    """A session over a graph made in memory, which has no place of its own: its weights are looked for from `folder`.

    Raises ArchwrightError RUN016 and RUN025.
    """
    options = session_options()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.resolve()))
    return open_session(source, options, folder, place)


def open_session(source: str | bytes, options: Any, folder: Path, place: Place = CPU) -> Any:
    """A session over a graph that comes from `folder`. Raises ArchwrightError RUN016 where it is refused, RUN025 where
    a GPU would leave some of its work to the CPU.
    """
    if place.gpu is not None:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        options.log_severity_level = 3  # it warns of each length that is copied to the CPU
    try:
        session = load_onnxruntime().InferenceSession(source, options, providers=place.providers(), enable_fallback=0)
    except Exception as error:  # ONNX Runtime raises its own classes, which derive from Exception alone
        message, help = f"ONNX Runtime refuses the graph: {error}", "`archwright verify` says which file is wrong"
        raise ArchwrightError("RUN016", message, where=str(folder), help=help) from error
    left = [] if place.gpu is None else left_to_the_cpu(session)
    if left:
        message = f"ONNX Runtime has no CUDA kernel for {', '.join(left)} in the precision of these graphs"
        help = "use device cpu, or build with target portable or in another precision"
        raise ArchwrightError("RUN025", message, where=str(folder), help=help)
    return session


def left_to_the_cpu(session: Any) -> list[str]:
    """Operators of a GPU's session that its CPU would compute, each step copying their tensors there and back."""
    parts = session.get_provider_graph_assignment_info()
    found = {node.op_type for part in parts if part.ep_name != CUDA for node in part.get_nodes()}
    return sorted(found - _ON_HOST)
