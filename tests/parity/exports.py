"""Random builds of random specs: any target, placement, precision, fusion and quantization, as a user's file has them.

`python -m tests.parity.exports SEED` runs the checks of one and prints its file.
"""

import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from archwright.compiler.interpreters.onnx_dialects import dialect_of
from archwright.compiler.passes import build_program, lower
from archwright.compiler.passes.fuse import fuse
from archwright.compiler.passes.quantize import INPUT_SCALE
from archwright.compiler.targets.onnx_graph import export_graphs
from archwright.compiler.weights.quantized import built_weights
from archwright.compiler.weights.streaming import PRECISIONS
from archwright.runtime.artifact import Artifact
from archwright.runtime.verification import Check, content_checks
from archwright.spec import Spec, dump
from archwright.spec.models import MoeFfn
from tests.parity.cases import TestWeights, make_case
from tests.parity.strategies import Tree, layers_of, legal_degrees, load_tree, random_tree

GROUP = 32
MOST_RANKS = 8


def random_export(seed: int, folder: Path) -> Spec:
    """A spec with a build section, read from a file."""
    rng, tree = random.Random(f"export {seed}"), random_tree(seed)
    tree["parallel"], tree["build"] = {}, {}
    quantized = rng.random() < 1 / 3
    if quantized:
        _widen(tree, rng)
    folder.mkdir(parents=True, exist_ok=True)
    spec = load_tree(tree, folder / "plain.yaml")
    build: Tree = {
        "target": rng.choice(("portable", "tensorrt", "onnxruntime")),
        "fuse": rng.choice(("auto", "all", "all") if quantized else ("none", "auto", "all")),
        "precision": rng.choice(("float32", "float32", "float16", "bfloat16")),
        "parallel": _placement(spec, rng),
        "logits": rng.choice(("all", "all", "last")),
        "moe": {"kind": rng.choice(("dense", "gathered"))},
    }
    if quantized:
        build["quantize"] = {"rules": _rules(spec, rng)}
    if rng.random() < 0.5:
        build["max_positions"] = rng.randrange(40, spec.model.max_positions + 1)
    tree["build"] = build
    return load_tree(tree, folder / "export.yaml")


def _widen(tree: Tree, rng: random.Random) -> None:
    """Widths that groups of input channels divide on every rank."""
    model = tree["model"]
    model["hidden_size"] = rng.choice((32, 64))
    for run in model["layers"] if isinstance(model["layers"], list) else [model]:
        attention, ffn = run["layer"]["attention"], run["layer"]["ffn"]
        attention["head_dim"], ffn["hidden_size"] = GROUP, 4 * GROUP
        if ffn.get("shared"):
            ffn["shared"]["hidden_size"] = 4 * GROUP


def _placement(spec: Spec, rng: random.Random) -> Tree:
    moes = [layer.ffn for layer in layers_of(spec) if isinstance(layer.ffn, MoeFfn)]
    degrees = {
        "tensor": [degree for degree in legal_degrees(spec) if degree <= 4],
        "pipeline": list(range(1, min(3, spec.model.num_layers) + 1)),
        "expert": [n for n in (1, 2, 3) if moes and all(moe.experts % n == 0 for moe in moes)] or [1],
    }
    while True:
        chosen = {axis: rng.choice(values) for axis, values in degrees.items()}
        if chosen["tensor"] * chosen["pipeline"] * chosen["expert"] <= MOST_RANKS:
            return chosen


def _rules(spec: Spec, rng: random.Random) -> list[Tree]:
    int4: Tree = {"kind": "int4", "group_size": GROUP}
    plain, rules = (int4, {"kind": "int8"}), []
    if rng.random() < 0.5:
        rules.append({**rng.choice(plain), "match": "model.embed_tokens"})
    if not spec.model.tied_embeddings and rng.random() < 0.5:
        rules.append({**rng.choice((*plain, {"kind": "fp8"})), "match": "lm_head"})
    rules.append({**rng.choice((*plain, {"kind": "fp8"}, {"kind": "keep"})), "match": "*.o_proj"})
    unlike = rng.random()  # what would be one matrix with others, stored in another way or with rounded inputs
    if unlike < 0.25:
        rules.append({**rng.choice((*plain, {"kind": "keep"})), "match": "*.k_proj"})
    elif unlike < 0.4:
        rules.append({"kind": "fp8", "match": "*.self_attn.*"})
    return [*rules, dict(rng.choice(plain))]


def fused_storages(spec: Spec) -> set[str]:
    """How quantized matrices that the build joins are stored; `not alike` where there are some that it cannot join."""
    fused = fuse(build_program(spec), dialect_of(spec.build).fusions)
    stored = {param.storage for name, param in fused.program.params().items() if len(fused.weights.get(name, ())) > 1}
    return {storage for storage in stored if storage is not None} | ({"not alike"} if fused.unfused else set())


def check_export(spec: Spec, seed: int, folder: Path) -> Sequence[Check]:
    """Write the artifact's graphs and weights, and let `verify` judge them; weights make every part matter."""
    dtype, rng = PRECISIONS[spec.build.precision], random.Random(seed)
    base = TestWeights(
        tensors={name: array.astype(dtype) for name, array in make_case(lower(spec), seed).weights.tensors.items()}
    )
    scales = {n: rng.choice((0.002, 0.01, 0.05)) for n in build_program(spec).params() if n.endswith(INPUT_SCALE)}
    weights, artifact = built_weights(spec, base, scales), Artifact(folder, spec)
    export_graphs(
        artifact.plan,
        weights,
        folder,
        precision=artifact.precision,
        capacity=artifact.capacity,
        options=artifact.options,
    )
    return list(content_checks(artifact, source=weights))


def failures(spec: Spec, checks: Sequence[Check], seed: int) -> str:
    """What is wrong, with the file and the command that repeats it; empty where nothing is."""
    problems = [f"{check.code} {problem}" for check in checks for problem in check.problems]
    if not problems:
        return ""
    return "\n".join([f"python -m tests.parity.exports {seed}", *problems, dump(spec)])


def main(seed: int) -> int:
    with tempfile.TemporaryDirectory() as name:
        spec = random_export(seed, Path(name) / "spec")
        checks = check_export(spec, seed, Path(name) / "artifact")
    for check in checks:
        error = "" if check.error is None else f"{check.error:.1e}"
        print(f"{check.name:<20} {check.result:<8} {error:>8}  {'; '.join(check.problems) or check.detail}")
    print(dump(spec))
    return int(any(check.problems for check in checks))


def largest(checks: Sequence[Check]) -> float:
    return float(np.max([check.error for check in checks if check.error is not None], initial=0.0))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
