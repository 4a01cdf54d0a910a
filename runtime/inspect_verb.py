"""`archwright inspect`."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from archwright.spec.cli import add_output_format, parser

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def inspect(arguments: list[str]) -> int:
    """Prints what a folder is: parameters, shapes, precision, ranks, checkpoints, tokenizer, files and sizes."""
    args = parser("inspect", "Say what a run, a model folder, an artifact, a tokenizer or a data folder holds.")
    args.add_argument("path", metavar="PATH", type=Path)
    add_output_format(args, ("text", "json"))
    chosen = args.parse_args(arguments)
    from archwright.runtime.inspection import inspect_folder  # after parsing, so that --help is quick

    facts = inspect_folder(chosen.path)
    text = json.dumps(facts, indent=2, ensure_ascii=False) if chosen.output_format == "json" else _as_text(facts)
    print(text)
    return 0


def _as_text(facts: dict[str, Any]) -> str:
    """A line a fact, then the tensors and the files."""
    plain = {name: value for name, value in facts.items() if name not in ("tensors", "files")}
    lines = list(_lines(plain, ""))
    if "tensors" in facts:
        stages = (facts.get("degrees") or {}).get("pipeline", 1)
        whose = f" (of rank 0{' and the first rank of each further stage' if stages > 1 else ''})"
        lines += ["", "tensors" + (whose if facts["kind"] == "artifact" else "")]
        lines += list(_tensors(facts["tensors"]))
    width = max(map(len, facts["files"]), default=0)
    lines += ["", f"files, {_size(sum(facts['files'].values()))}"]
    lines += [f"  {name:<{width}}  {_size(size):>12}" for name, size in facts["files"].items()]
    return "\n".join(lines)


def _lines(facts: dict[str, Any], indent: str) -> Iterator[str]:
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        if isinstance(value, dict) and value:
            yield f"{indent}{name}"
            yield from _lines(value, indent + "  ")
        elif value not in (None, [], {}):
            yield f"{indent}{name:<{width}}  {_value(value)}"


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _tensors(shapes: dict[str, list[int]]) -> Iterator[str]:
    """Equal layers are one line: `model.layers.0..15.mlp.up_proj.weight`."""
    layers: dict[tuple[str, str, tuple[int, ...]], list[str]] = {}
    for name, shape in shapes.items():
        match = re.fullmatch(r"(.*\.layers\.)(\d+)(\..*)", name)
        before, number, after = match.groups() if match else (name, "", "")
        layers.setdefault((before, after, tuple(shape)), []).append(number)
    for (before, after, shape), numbers in layers.items():
        span = numbers[0] if len(numbers) == 1 else f"{numbers[0]}..{numbers[-1]}"
        yield f"  {before}{span}{after}  {list(shape)}"


def _size(num_bytes: int) -> str:
    power = min((max(1, num_bytes).bit_length() - 1) // 10, len(_UNITS) - 1)
    return f"{num_bytes} bytes" if power == 0 else f"{num_bytes / 1024**power:.1f} {_UNITS[power]}"
