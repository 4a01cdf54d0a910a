"""Small models as rank graphs, and ONNX Runtime to run them. B batch, S sequence, V vocabulary, L visible positions."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from archwright.compiler.interpreters.numpy_ops import run_numpy
from archwright.compiler.interpreters.onnx_dialects import PORTABLE, Dialect
from archwright.compiler.ir import Degrees, Plan
from archwright.compiler.passes import run_passes
from archwright.compiler.targets.network_check import Planned, planned_network
from archwright.compiler.targets.onnx_graph import export_graphs
from archwright.compiler.weights.streaming import GeneratedWeights
from archwright.spec import Spec

Array = NDArray[Any]
ROUND: Mapping[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Export:
    """An exported model: its folder, and the oracle with the weights that the export has."""

    folder: Path
    plan: Plan
    arrays: Mapping[str, Array]
    precision: str
    capacity: int

    @property
    def graph(self) -> Path:
        return self.folder / "rank0" / "stage0.onnx"

    @property
    def planned(self) -> Planned:
        return planned_network(self.plan, precision=self.precision, capacity=self.capacity)

    def oracle(self, ids_BS: Array) -> Array:
        """Logits [B, S, V] of whole sequences, without a cache."""
        return run_numpy(self.plan.program, self.arrays, ids_BS)


@dataclass
class Running:
    """An open session with its caches."""

    session: Any
    caches: dict[str, Array]

    def step(self, ids_BS: Array, write_B: Array, visible: int) -> dict[str, Array]:
        """Run tokens that stand at write_B, write_B + 1, ...; every output that is not a cache."""
        feed = {
            "input_ids": ids_BS,
            "position_ids": write_B[:, None] + np.arange(ids_BS.shape[1]),
            "write_index": write_B,
            "kv_positions": np.arange(visible),
            **self.caches,
        }
        names = [output.name for output in self.session.get_outputs()]
        outputs = dict(zip(names, self.session.run(names, feed), strict=True))
        self.caches = {name: outputs.pop(name.replace("past.", "present.")) for name in self.caches}
        return outputs


@pytest.fixture
def make_spec() -> Callable[..., Spec]:
    """`make_spec(layers=1, kv_heads=2, ...)`: a model whose logits depend strongly on every weight."""

    def make(*, scaling: bool = False, tied: bool = False, head_dim: int = 8, kv_heads: int = 2, **model: Any) -> Spec:
        position: dict[str, Any] = {"kind": "rope"}
        if scaling:
            position["scaling"] = {"kind": "llama3", "factor": 4.0, "original_max_positions": 32}
        attention = {"kind": "gqa", "heads": 4, "kv_heads": kv_heads, "head_dim": head_dim, "position": position}
        sizes = {"vocab_size": 61, "hidden_size": 24, "max_positions": 64, "layers": 2, "tied_embeddings": tied}
        layer = {"attention": attention, "ffn": {"kind": "swiglu", "hidden_size": 40}}
        init = {"kind": "normal", "std": 0.3}
        fields = {"version": 1, "name": "tiny", "model": {**sizes, "layer": layer, "init": init, **model}}
        return Spec.model_validate(fields)

    return make


@pytest.fixture
def export(tmp_path: Path) -> Callable[..., Export]:
    """`export(spec, tensor=2, precision="float16")`: rank graphs with their data in a folder of their own."""

    def write(
        spec: Spec, *, tensor: int = 1, precision: str = "float32", capacity: int = 32, dialect: Dialect = PORTABLE
    ) -> Export:
        plan = run_passes(spec, Degrees(tensor=tensor))
        weights = GeneratedWeights(params=plan.program.params(), seed=5)
        folder = tmp_path / f"{precision}-{tensor}-{len(list(tmp_path.iterdir()))}"
        export_graphs(plan, weights, folder, precision=precision, capacity=capacity, dialect=dialect)
        arrays = {name: weights.read(name).astype(ROUND[precision]) for name in weights.names()}
        return Export(folder=folder, plan=plan, arrays=arrays, precision=precision, capacity=capacity)

    return write


@pytest.fixture
def running() -> Callable[..., Running]:
    """`running(path or model bytes, folder of external data, batch)`: a session and zeroed caches."""
    ort = pytest.importorskip("onnxruntime")

    def start(source: Path | bytes, *, folder: Path | None = None, batch: int) -> Running:
        options = ort.SessionOptions()
        options.log_severity_level = 3  # plain `run` copies the caches, and says so each time
        if folder is not None:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        model = source if isinstance(source, bytes) else str(source)
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        caches = {
            i.name: np.zeros([batch, *i.shape[1:]], np.float32) for i in session.get_inputs() if "past." in i.name
        }
        return Running(session=session, caches=caches)

    return start
