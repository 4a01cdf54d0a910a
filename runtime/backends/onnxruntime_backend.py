"""Artifacts through ONNX Runtime on the CPU. B batch, S sequence, L visible cache positions, V vocabulary."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from archwright.compiler.targets.merge import merge_ranks
from archwright.compiler.targets.onnx_graph import graph_path
from archwright.compiler.targets.portable_form import as_portable
from archwright.compiler.targets.retype import as_float32
from archwright.compiler.targets.stages import HIDDEN, IDS, LOGIT_INDEX, LOGITS, result_name
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
    """Caches bound once as input and as output of their stage's graph, so that it updates them where they lie.

    Two different OrtValues would make ONNX Runtime copy every cache at every step. bindings: of each stage.
    """

    bindings: tuple[Any, ...]
    values: dict[str, Any]
    """Input name (`past.0.key`), of all stages → OrtValue."""

    def pointers(self) -> dict[str, int]:
        """Addresses of the caches: they never change."""
        return {name: value.data_ptr() for name, value in self.values.items()}


class OnnxRuntimeBackend(Backend[OrtCache]):
    """A session for each pipeline stage, run one behind the other: the graph of one rank, or of all ranks of the stage
    joined.
    """

    def __init__(
        self,
        sessions: Sequence[Any],
        *,
        max_batch: int | None,
        description: str,
        gathered_bytes: int = 0,
        more: Sequence[Sequence[str]] = (),
    ) -> None:
        """gathered_bytes: what the graphs copy of experts' weights for each token of a call. more: of each stage the
        outputs that `_seen` is told of besides.
        """
        self._ort = load_onnxruntime()
        self._sessions = tuple(sessions)
        self._inputs = [{item.name: item.shape for item in session.get_inputs()} for session in sessions]
        self._caches = [{name: shape for name, shape in each.items() if "past." in name} for each in self._inputs]
        self._takes_index = LOGIT_INDEX in self._inputs[-1]
        self._gathered_bytes = gathered_bytes
        self._more = more or [()] * len(self._sessions)
        (logits,) = (output for output in sessions[-1].get_outputs() if output.name == LOGITS)
        self.vocab_size = logits.shape[2]
        self.capacity = next(iter(self._caches[0].values()))[2]
        self.max_batch = max_batch
        self.description = description

    @property
    def token_bytes(self) -> int:
        return self._gathered_bytes + (0 if self._takes_index else 4 * self.vocab_size)

    def new_cache(self, batch: int, positions: int) -> OrtCache:
        assert positions <= self.capacity, "the caches of a graph have one size"
        bindings = tuple(session.io_binding() for session in self._sessions)
        values: dict[str, Any] = {}
        for binding, caches in zip(bindings, self._caches, strict=True):
            for name, (_, kv_heads, capacity, head_dim) in caches.items():
                # Zeros, not fresh memory: a masked position has weight 0, but 0 · NaN would be NaN.
                zeros = np.zeros((batch, kv_heads, capacity, head_dim), np.float32)
                values[name] = self._ort.OrtValue.ortvalue_from_numpy(zeros)
                binding.bind_ortvalue_input(name, values[name])
        return OrtCache(bindings, values)

    def forward(self, cache: OrtCache, ids_BS: Ids, positions_BS: Ids, write_index_B: Ids, visible: int) -> Logits:
        """Graphs that give the logits of one token a row are run token by token here."""
        batch, length = ids_BS.shape
        size = length
        if self._takes_index:
            size = 1
        elif self._gathered_bytes:
            size = self.call_tokens(batch)
        if length > size:
            return self.in_pieces(cache, ids_BS, positions_BS, write_index_B, visible, size)
        return self._run(cache, ids_BS, positions_BS, write_index_B, visible, np.zeros(batch, np.int64))

    def forward_last(
        self, cache: OrtCache, ids_BS: Ids, positions_BS: Ids, write_index_B: Ids, visible: int, index_B: Ids
    ) -> Logits:
        if not self._takes_index:
            return super().forward_last(cache, ids_BS, positions_BS, write_index_B, visible, index_B)
        return self._run(cache, ids_BS, positions_BS, write_index_B, visible, index_B)[:, 0]

    def _run(
        self, cache: OrtCache, ids_BS: Ids, positions_BS: Ids, write_index_B: Ids, visible: int, index_B: Ids
    ) -> Logits:
        """One call of every stage."""
        feeds = {
            IDS: ids_BS,
            "position_ids": positions_BS,
            "write_index": write_index_B,
            "kv_positions": np.arange(bucketed(visible, self.capacity)),
            LOGIT_INDEX: index_B,
        }
        result: Any = None
        for number, (session, binding, inputs) in enumerate(
            zip(self._sessions, cache.bindings, self._inputs, strict=True)
        ):
            for name in feeds.keys() & inputs.keys():
                binding.bind_cpu_input(name, np.ascontiguousarray(feeds[name], np.int64))
            if HIDDEN in inputs:
                binding.bind_ortvalue_input(HIDDEN, result)
            # The result's shape changes; outputs of an earlier call would be written again.
            binding.clear_binding_outputs()
            binding.bind_output(result_name(number, len(self._sessions)))
            for name in self._more[number]:
                binding.bind_output(name)
            for name in self._caches[number]:
                binding.bind_ortvalue_output(name.replace("past.", "present."), cache.values[name])
            session.run_with_iobinding(binding)
            result, *more = binding.get_outputs()[: 1 + len(self._more[number])]
            self._seen(number, more)
        return result.numpy()

    def _seen(self, stage: int, values: Sequence[Any]) -> None:
        """Told of what a stage gave of its `more` outputs."""


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
    return open_artifact_graphs(artifact)


def open_artifact_graphs(artifact: Artifact) -> OnnxRuntimeBackend:
    """The same without questions of device and precision: also for a folder that has only the graphs."""
    return open_graphs(
        artifact.path,
        ranks=len(artifact.graphs),
        stages=artifact.num_stages,
        precision=artifact.precision,
        max_batch=artifact.max_batch,
        gathered_bytes=artifact.gathered_bytes,
        target=artifact.dialect.target,
    )


def open_graphs(
    folder: Path,
    *,
    ranks: int,
    precision: str,
    stages: int = 1,
    max_batch: int | None = None,
    gathered_bytes: int = 0,
    target: str = "portable",
) -> OnnxRuntimeBackend:
    """Open the rank graphs in `folder`: of each stage one float32 rank as the file itself, anything else as one joined
    float32 graph.

    ranks: in all; each of the `stages` has equally many. gathered_bytes: see `OnnxRuntimeBackend`. target: of their
    dialect; what only TensorRT has is said in ONNX Runtime's words (`targets.portable_form`).
    """
    ort = load_onnxruntime()
    title = f"ONNX Runtime {ort.__version__}, CPU, {ranks} rank{'s' if ranks > 1 else ''}"
    each = ranks // stages
    title += f" in {stages} stages" if stages > 1 else ""
    title += " joined" if each > 1 else ""
    title += ", float32" if precision == "float32" else f", {precision} weights computed in float32"
    rewritten = target == "tensorrt"
    title += ", TensorRT's operators in portable form" if rewritten else ""
    as_files = each == 1 and precision == "float32" and not rewritten
    sessions: list[Any] = []
    for stage in range(stages):
        if as_files:
            sessions.append(open_session(str(graph_path(folder, stage, stage)), session_options(), folder))
            continue
        joined = merge_ranks(folder, stage=stage, ranks=range(stage * each, (stage + 1) * each))
        sessions.append(open_joined(as_float32(as_portable(joined)).SerializeToString(), folder))
    return OnnxRuntimeBackend(sessions, max_batch=max_batch, description=title, gathered_bytes=gathered_bytes)


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
