"""spec or folder → rank graphs, as its `build` section says."""

from pathlib import Path

from archwright.compiler.passes import build_plan, lower
from archwright.compiler.passes.quantize import calibrated_by
from archwright.compiler.targets import onnx_graph
from archwright.compiler.targets.stages import graph_options
from archwright.compiler.weights.folder import open_folder
from archwright.compiler.weights.quantized import built_weights
from archwright.compiler.weights.streaming import GeneratedWeights, Weights
from archwright.spec import ArchwrightError, Spec, spec_digest


def export_graphs(source: Spec | str | Path, folder: str | Path, *, write_weights: bool = True) -> list[Path]:
    """Write the ONNX graphs of every rank, `rank{r}/stage{s}.onnx` with its `.data`, and return their paths.

    source: a model folder or a run, or a spec whose `build.weights` are generated. Precision, degrees, dialect and
    cache length are those of the `build` section. Nothing is run or verified; `archwright build` does that. Needs no
    torch.
    write_weights: False writes the graphs alone.
    Raises ArchwrightError BUILD006 where a spec has weights to come from a model, BUILD060 where they would have to be
    calibrated, which runs the model, and what opening a folder raises.
    """
    weights: Weights | None = None
    if isinstance(source, Spec):
        spec = source
    else:
        opened = open_folder(Path(source))
        spec, weights = opened.spec, opened.weights
    needed = calibrated_by(spec.build.quantize)
    if needed is not None and write_weights:
        help = "use archwright.runtime.build, or write_weights=False for the graphs alone"
        raise ArchwrightError("BUILD060", f"`{needed}` needs calibration, and nothing is run here", help=help)
    plan = build_plan(spec)
    chosen, precision = spec.build.weights, spec.build.precision
    if chosen.kind == "generated":
        weights = GeneratedWeights(params=lower(spec).params(), seed=chosen.seed, precision=precision)
    elif weights is None and write_weights:
        help = "give a model folder or a run, or set build.weights to {kind: generated}"
        raise ArchwrightError("BUILD006", "a spec has no weights", help=help)
    export = onnx_graph.export_graphs(
        plan,
        built_weights(spec, weights) if weights is not None and write_weights else None,
        Path(folder),
        precision=precision,
        capacity=spec.build.max_positions or spec.model.max_positions,
        options=graph_options(spec.build),
        spec_digest=spec_digest(spec),
    )
    return list(export.graphs)
