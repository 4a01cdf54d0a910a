"""The verbs that need nothing but the language: init, validate, show, schema, presets."""

import json
import sys
from pathlib import Path
from typing import Any

from archwright.spec.cli import add_output_format, add_set, parser
from archwright.spec.dump import dump
from archwright.spec.errors import ArchwrightError
from archwright.spec.files import atomic_write
from archwright.spec.load import load, resolve
from archwright.spec.merge import PRESET, preset_names, preset_text
from archwright.spec.parameters import num_parameters


def init(arguments: list[str]) -> int:
    """Writes a preset's YAML, comments and all, as a spec of the user's own."""
    args = parser("init", "Write a complete spec to start from.")
    args.add_argument("--preset", default="tiny", metavar="NAME", help="default: tiny; `archwright presets` lists them")
    args.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the spec to write")
    args.add_argument("--force", action="store_true", help="overwrite FILE")
    chosen = args.parse_args(arguments)
    text = preset_text(chosen.preset)
    if chosen.output.is_dir():
        raise ArchwrightError("SPEC090", f"`{chosen.output}` is a folder", help="name the file to write")
    if chosen.output.exists() and not chosen.force:
        raise ArchwrightError("SPEC090", f"`{chosen.output}` exists already", help="use --force to overwrite it")
    atomic_write(chosen.output, text)
    print(f"wrote {chosen.output}")
    return 0


def validate(arguments: list[str]) -> int:
    """Says that a spec is sound, or everything that is wrong with it."""
    args = parser("validate", "Check a spec: every mistake at once, each with its place and the nearest legal value.")
    args.add_argument("spec", metavar="SPEC", help="a YAML file, or preset:NAME")
    add_set(args)
    add_output_format(args)
    chosen = args.parse_args(arguments)
    spec = load(chosen.spec, chosen.overrides)
    if chosen.output_format == "json":
        print(json.dumps({"ok": True, "name": spec.name, "diagnostics": []}, indent=2))
    else:
        print(f"{chosen.spec}: ok ({spec.name})")
    return 0


def show(arguments: list[str]) -> int:
    """Prints the resolved spec, which loads again."""
    args = parser("show", "Print a spec with its parents, the class defaults and --set merged in.")
    args.add_argument("spec", metavar="SPEC", help="a YAML file, or preset:NAME")
    args.add_argument("--provenance", action="store_true", help="add where each value comes from, as comments")
    add_set(args)
    chosen = args.parse_args(arguments)
    resolved = resolve(chosen.spec, chosen.overrides)
    print(dump(resolved.spec, resolved.tree if chosen.provenance else None), end="")
    return 0


def schema(arguments: list[str]) -> int:
    """Prints the JSON Schema of the language."""
    from archwright.spec.schema import json_schema

    args = parser("schema", "Print the JSON Schema of the language, for editors and other tools.")
    args.add_argument("-o", "--output", type=Path, metavar="FILE", help="write it there instead")
    chosen = args.parse_args(arguments)
    text = json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"
    if chosen.output:
        atomic_write(chosen.output, text)
    else:
        sys.stdout.write(text)
    return 0


def presets(arguments: list[str]) -> int:
    """Lists the presets."""
    args = parser("presets", "List the presets that come with archwright.")
    add_output_format(args, ("text", "json"))
    chosen = args.parse_args(arguments)
    listing: list[dict[str, Any]] = [_describe(name) for name in preset_names()]
    if chosen.output_format == "json":
        print(json.dumps(listing, indent=2))
    else:
        for preset in listing:
            print(f"{preset['name']:<16} {preset['parameters']:>16,} parameters  {preset['summary']}")
    return 0


def _describe(name: str) -> dict[str, Any]:
    spec = load(PRESET + name)
    summary = preset_text(name).partition("\n")[0].removeprefix("#").strip()
    return {"name": name, "summary": summary, "parameters": num_parameters(spec)}
