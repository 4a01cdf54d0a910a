"""Whether the engines of an artifact compute, on this machine, what its spec says: all ranks, on the probe.

B batch, T tokens of the probe, V vocabulary.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from archwright.compiler.tolerances import TOLERANCES, largest_error
from archwright.runtime.artifact import Artifact, read_artifact_manifest
from archwright.runtime.backends.tensorrt_backend import TensorRTBackend, usable_engines
from archwright.runtime.engines.opening import Engines
from archwright.runtime.engines.probe import Probe, read_probe
from archwright.runtime.engines.processes import start_ranks
from archwright.runtime.engines.ranks import Ranks
from archwright.runtime.verification import Check, Progress, Report, file_checks
from archwright.spec import load

DECODE_STEPS = 5
"""Enough that the first prepares a shape, the second is captured as a CUDA graph, and the others are replayed."""


def verify_on_target(
    path: str | Path,
    progress: Progress = lambda message: None,
    find: Callable[[Artifact], Engines] = usable_engines,
    start: Callable[[int], Ranks] = start_ranks,
) -> Report:
    """Check the files, run the engines, and compare every rank's output with the oracle's.

    find, start: what gives the engines and the ranks that run them. Raises ArchwrightError RUN040 to RUN048 where the
    engines cannot run here, with what would be needed; BUILD001 without TensorRT; VERIFY020 without a probe.
    """
    path = Path(path)
    progress("checking the files")
    checks = list(file_checks(path, read_artifact_manifest(path)))
    if any(check.result != "ok" for check in checks):
        return Report(path=path, checks=tuple(checks))
    artifact = Artifact(path, load(path / "spec.yaml"))
    engines = find(artifact)
    probe = read_probe(path, engines.stages, artifact.spec.model)
    progress(f"opening {len(engines.files)} engine{'s' if len(engines.files) > 1 else ''}")
    backend = TensorRTBackend(engines, start(len(engines.files)))
    try:
        progress(f"running on {backend.description}")
        checks += probed(backend, probe, TOLERANCES["tensorrt", artifact.precision])
    finally:
        backend.close()
    return Report(path=path, checks=tuple(checks))


def probed(backend: TensorRTBackend, probe: Probe, tolerance: float) -> Iterator[Check]:
    """One check a rank for whole sequences, and one for a prefill with decode steps at uneven lengths."""
    count = len(backend.tables)
    errors = whole_errors(backend, probe)
    for rank in range(count):
        detail = f"{backend.tables[rank].output}, {' x '.join(map(str, probe.ids_BT.shape))} tokens"
        yield _compared(f"rank {rank}, whole sequences", errors[rank], tolerance, detail)
    error, agreeing, total = decode_error(backend, probe)
    detail = f"{DECODE_STEPS} steps, {agreeing} of {total} most likely tokens are the oracle's"
    yield _compared("prefill and decode", error, tolerance, detail)


def whole_errors(backend: TensorRTBackend, probe: Probe) -> list[float]:
    """The error of each rank's output in one step over the whole probe; where only the last token's logits are given,
    of those.
    """
    rows, tokens = probe.ids_BT.shape
    cache = backend.new_cache(rows, tokens)
    positions_BT = np.broadcast_to(np.arange(tokens), probe.ids_BT.shape)
    outputs = backend.outputs(cache, probe.ids_BT, positions_BT, np.zeros(rows, np.int64), tokens, all_ranks=True)
    errors: list[float] = []
    for rank, output in enumerate(outputs):
        assert output is not None, "every rank was asked"
        expected = probe.outputs[rank // backend.per_stage]
        errors.append(largest_error(output, expected[:, -output.shape[1] :]))
    return errors


def decode_error(backend: TensorRTBackend, probe: Probe) -> tuple[float, int, int]:
    """The largest error of the logits, and how many of their most likely tokens are the oracle's, of how many."""
    rows, tokens = probe.ids_BT.shape
    logits_BTV, row_B = probe.outputs[-1], np.arange(rows)
    steps = min(DECODE_STEPS, tokens - 1)
    lengths_B = np.maximum(1, tokens - steps - row_B)
    cache = backend.new_cache(rows, tokens)
    found = [backend.prefill(cache, probe.ids_BT[:, : int(lengths_B.max())], lengths_B)]
    wanted = [logits_BTV[row_B, lengths_B - 1]]
    for step in range(steps):
        at_B = lengths_B + step
        found.append(backend.decode(cache, probe.ids_BT[row_B, at_B], at_B))
        wanted.append(logits_BTV[row_B, at_B])
    found_NBV, wanted_NBV = np.stack(found), np.stack(wanted)
    agreeing = found_NBV.argmax(-1) == wanted_NBV.argmax(-1)
    return largest_error(found_NBV, wanted_NBV), int(agreeing.sum()), agreeing.size


def _compared(name: str, error: float, tolerance: float, detail: str) -> Check:
    passed = error <= tolerance
    problem = f"{name}: the error is {error:.2e}, allowed is {tolerance:.0e}"
    return Check(
        name=name,
        code="VERIFY020",
        result="ok" if passed else "failed",
        problems=() if passed else (problem,),
        error=error,
        tolerance=tolerance,
        detail=detail,
    )
