"""A failing spec made small: it stays legal, and at least one of its comparisons keeps failing."""

import shlex
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

from archwright.spec import SpecError
from tests.parity.comparisons import COMPARISONS, Subject, beyond_tolerance, measure
from tests.parity.ranks import Ranks
from tests.parity.strategies import Tree, load_tree

SIMPLE: dict[str, tuple[Any, ...]] = {
    "norm": ({"kind": "rmsnorm"},),
    "position": ({"kind": "none"}, {"kind": "rope"}),
    "ffn": ({"kind": "swiglu", "hidden_size": 8},),
    "tied_embeddings": (False,),
    "max_positions": (40,),  # the longest generation of a case has 36
    "layers": (1,),
    "repeat": (1,),
    "heads": (2, 4),
    "kv_heads": (1, 2),
    "head_dim": (1, 2, 4),
    "hidden_size": (2, 4, 8),
    "vocab_size": (3, 8),
    "size": (1, 2, 4),
    "experts": (1, 2),
    "experts_per_token": (1,),
    "balance_loss": (0.0,),
    "z_loss": (0.0,),
}
"""Field → values to try in its place, the simplest first."""
MOST_TRIALS = 300
SLIPPAGE = 5
"""An error may shrink by this factor at most: the rounding of a degenerate model is not the bug that was found."""

Fails = Callable[[Tree], bool]


def shrink(tree: Tree, fails: Fails) -> Tree:
    """Take simpler trees as long as one fails. `fails` is false for what is no legal spec."""
    trials, found = 0, True
    while found:
        found = False
        for candidate in _simpler(tree):
            if _weight(candidate) > _weight(tree):  # so that it ends
                continue
            trials += 1
            if trials > MOST_TRIALS:
                return tree
            if fails(candidate):
                tree, found = candidate, True
                break
    return tree


def _simpler(tree: Tree) -> Iterator[Tree]:
    """Trees that are one step simpler or other, the largest steps first."""
    model = tree["model"]
    if isinstance(model["layers"], list):
        for run in model["layers"]:
            yield {**tree, "model": {**model, "layers": 1, "layer": deepcopy(run["layer"])}}
        for index in range(len(model["layers"])):
            if len(model["layers"]) > 2:
                runs = deepcopy(model["layers"])
                del runs[index]
                yield {**tree, "model": {**model, "layers": runs}}
    for path in list(_paths(model)):
        parent, key = _at(model, path[:-1]), path[-1]
        simple = SIMPLE.get(str(key), ())
        if parent[key] in simple:
            simple = simple[: simple.index(parent[key])]
        for value in (_GONE, *simple):
            candidate = deepcopy(tree)
            place = _at(candidate["model"], path[:-1])
            if value is _GONE:
                del place[key]
            else:
                place[key] = deepcopy(value)
            yield candidate


_GONE = object()


def _weight(node: Any) -> tuple[int, int]:
    """(number of leaves, sum of the integers)."""
    if isinstance(node, dict | list):
        parts = [_weight(item) for item in (node.values() if isinstance(node, dict) else node)]
        return sum(leaves for leaves, _ in parts), sum(total for _, total in parts)
    return 1, node if type(node) is int else 0


def _paths(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every field below `node`, parents first; `kind` stays with its siblings."""
    items: Iterable[tuple[Any, Any]] = node.items() if isinstance(node, dict) else ()
    if isinstance(node, list):
        items = enumerate(node)
    for key, value in items:
        if key == "kind":
            continue
        if not isinstance(node, list):
            yield (*path, key)
        yield from _paths(value, (*path, key))


def _at(node: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        node = node[key]
    return node


def explain(tree: Tree, seed: int, wrong: dict[str, float], folder: Path, ranks: Ranks) -> str:
    """Shrink a spec that failed, write it to `folder`, and say how to see it fail again."""
    names = list(wrong)

    def fails(candidate: Tree) -> bool:
        errors = failures(candidate, seed, names, folder, ranks)
        return any(error >= wrong[name] / SLIPPAGE for name, error in errors.items())

    small = shrink(tree, fails)
    path = folder / f"failing-{seed}.yaml"
    load_tree(small, path)
    only = " ".join(f"--only {shlex.quote(name)}" for name in failures(small, seed, names, folder, ranks))
    table = "".join(
        f"  {name}: {error:.3g}, allowed {COMPARISONS[name].tolerance:.1g}\n" for name, error in wrong.items()
    )
    return (
        f"spec {seed} fails:\n{table}The smallest spec that fails is {path}:\n\n{path.read_text()}\n"
        f"Reproduce it with:  python -m tests.parity.reproduce {path} --seed {seed} {only}"
    )


def failures(tree: Tree, seed: int, names: Iterable[str], folder: Path, ranks: Ranks) -> dict[str, float]:
    """The comparisons that fail, a raised error among them; none for what is no legal spec."""
    try:
        spec = load_tree(tree, folder / "candidate.yaml")
    except SpecError:
        return {}
    subject = Subject(spec=spec, seed=seed, folder=folder / "candidate")
    errors: dict[str, float] = {}
    for name in names:
        try:
            errors |= measure(subject, [name], ranks)
        except Exception:  # whatever it is, it is why the spec fails
            errors[name] = float("inf")
    return beyond_tolerance(errors)
