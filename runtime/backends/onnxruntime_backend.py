"""Artifacts through ONNX Runtime on the CPU. B batch, S sequence, L visible cache positions, V vocabulary."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from archwright.compiler.targets.merge import merge_ranks
from archwright.compiler.targets.retype import as_float32
from archwright.runtime.artifact import Artifact
from archwright.runtime.backends.base import Backend, Ids, Logits
from archwright.spec import ArchwrightError

BUCKET = 64
"""The visible positions L grow in these steps: a decode step costs O(L), and shapes rarely change."""


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


@dataclass(frozen=True)
class OrtCache:
    """Caches bound once as input and as output of the graph, so that it updates them where they lie.

    Two different OrtValues would make ONNX Runtime copy every cache at every step.
    """

    binding: Any
    values: dict[str, Any]
    """Input name (`past.0.key`) → OrtValue."""

    def pointers(self) -> dict[str, int]:
        """Addresses of the caches: they never change."""
        return {name: value.data_ptr() for name, value in self.values.items()}


class OnnxRuntimeBackend(Backend[OrtCache]):
    """One session: the graph of one rank, or the graphs of all ranks joined."""

    def __init__(self, session: Any, *, max_batch: int | None, description: str) -> None:
        self._ort = load_onnxruntime()
        self._session = session
        outputs = {output.name: output for output in session.get_outputs()}
        self._outputs = ["logits", *(name for name in outputs if "present." in name)]
        self._caches = {item.name: item.shape for item in session.get_inputs() if "past." in item.name}
        self.vocab_size = outputs["logits"].shape[2]
        self.capacity = next(iter(self._caches.values()))[2]
        self.max_batch = max_batch
        self.description = description

    def new_cache(self, batch: int, positions: int) -> OrtCache:
        assert positions <= self.capacity, "the caches of a graph have one size"
        binding = self._session.io_binding()
        values: dict[str, Any] = {}
        for name, (_, kv_heads, capacity, head_dim) in self._caches.items():
            # Zeros, not fresh memory: a masked position has weight 0, but 0 · NaN would be NaN.
            zeros = np.zeros((batch, kv_heads, capacity, head_dim), np.float32)
            values[name] = self._ort.OrtValue.ortvalue_from_numpy(zeros)
            binding.bind_ortvalue_input(name, values[name])
        return OrtCache(binding, values)

    def forward(self, cache: OrtCache, ids_BS: Ids, positions_BS: Ids, write_index_B: Ids, visible: int) -> Logits:
        return self.forward_with(cache, ids_BS, positions_BS, write_index_B, visible, ())[0]

    def forward_with(
        self, cache: OrtCache, ids_BS: Ids, positions_BS: Ids, write_index_B: Ids, visible: int, more: Sequence[str]
    ) -> list[Any]:
        """The logits, then the outputs that are called `more`."""
        binding = cache.binding
        feeds = {
            "input_ids": ids_BS,
            "position_ids": positions_BS,
            "write_index": write_index_B,
            "kv_positions": np.arange(bucketed(visible, self.capacity)),
        }
        for name, array in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array, np.int64))
        # The logits' shape changes; outputs of an earlier call would be written again.
        binding.clear_binding_outputs()
        for name in ("logits", *more):
            binding.bind_output(name)
        for name, value in cache.values.items():
            binding.bind_ortvalue_output(name.replace("past.", "present."), value)
        self._session.run_with_iobinding(binding)
        return [value.numpy() for value in binding.get_outputs()[: 1 + len(more)]]


def bucketed(visible: int, capacity: int) -> int:
    """L: the cache rows that a step is handed, at least the visible ones."""
    return min(capacity, -(-visible // BUCKET) * BUCKET)


def open_onnxruntime(artifact: Artifact, device: str, precision: str) -> OnnxRuntimeBackend:
    """Open the graphs of an artifact. Raises ArchwrightError RUN021 to RUN023."""
    if device not in ("auto", "cpu"):
        help = "use auto or cpu; a run or a model folder runs on a GPU, through PyTorch"
        raise ArchwrightError("RUN021", f"artifacts do not run on `{device}`", where=str(artifact.path), help=help)
    if precision not in ("auto", artifact.precision):
        help = f"leave the precision out, or build with build.precision={precision}"
        message = f"the artifact is {artifact.precision}, not {precision}"
        raise ArchwrightError("RUN022", message, where=str(artifact.path), help=help)
    return open_graphs(
        artifact.path, ranks=len(artifact.graphs), precision=artifact.precision, max_batch=artifact.max_batch
    )


def open_graphs(folder: Path, *, ranks: int, precision: str, max_batch: int | None = None) -> OnnxRuntimeBackend:
    """Open the rank graphs in `folder`: one float32 rank as the file itself, anything else as one joined float32
    graph.
    """
    ort = load_onnxruntime()
    title = f"ONNX Runtime {ort.__version__}, CPU, {ranks} rank{'s' if ranks > 1 else ''}"
    if ranks == 1 and precision == "float32":
        source: Any = str(folder / "rank0" / "stage0.onnx")
        title += ", float32"
    else:
        title += " joined" if ranks > 1 else ""
        title += ", float32" if precision == "float32" else f", {precision} weights computed in float32"
        source = as_float32(merge_ranks(folder)).SerializeToString()
    session = (
        open_session(source, session_options(), folder) if isinstance(source, str) else open_joined(source, folder)
    )
    return OnnxRuntimeBackend(session, max_batch=max_batch, description=title)


def session_options() -> Any:
    options = load_onnxruntime().SessionOptions()
    # By default a product with few-bit weights rounds its other factor to 8 bits, without a word in the graph.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return options


def open_joined(source: bytes, folder: Path) -> Any:
    """A session over a graph made in memory, which has no place of its own: its weights are looked for from `folder`.

    Raises ArchwrightError RUN016.
    """
    options = session_options()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.resolve()))
    return open_session(source, options, folder)


def open_session(source: str | bytes, options: Any, folder: Path) -> Any:
    """A session over a graph that comes from `folder`. Raises ArchwrightError RUN016 where it is refused."""
    try:
        return load_onnxruntime().InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises its own classes, which derive from Exception alone
        message, help = f"ONNX Runtime refuses the graph: {error}", "`archwright verify` says which file is wrong"
        raise ArchwrightError("RUN016", message, where=str(folder), help=help) from error
