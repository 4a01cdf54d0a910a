"""The verb `archwright data build`."""

import json
from pathlib import Path
from typing import Any

from archwright.spec import Spec, load
from archwright.spec.cli import add_output_format, add_set, parser
from archwright.spec.manifest import Manifest
from archwright.trainers.data_build import build_data
from archwright.trainers.dataset import SPLITS
from archwright.trainers.progress import byte_progress
from archwright.trainers.sources import total_bytes


def data(argv: list[str]) -> int:
    """`data build SPEC -o DIR`: reads `data.sources`, deduplicates, splits and tokenizes them."""
    arguments = parser("data", "Turn the sources of a spec into shards of tokens, with a manifest.")
    arguments.add_argument("action", choices=["build"], help="what to do")
    arguments.add_argument("spec", help="spec file or preset:NAME; needs tokenizer.path and data.sources")
    arguments.add_argument("-o", "--output", required=True, type=Path, metavar="DIR", help="folder to write")
    add_set(arguments)
    add_output_format(arguments, ("text", "json"))
    args = arguments.parse_args(argv)
    spec = load(args.spec, args.overrides)
    with byte_progress("tokenizing", _total(spec)) as advance:
        manifest = build_data(spec, args.output, advance=advance)
    if args.output_format == "json":
        print(json.dumps({"path": str(args.output), **manifest.details, "measured": manifest.measured}, indent=2))
    else:
        print(_report(manifest, args.output))
    return 0


def _total(spec: Spec) -> int:
    return total_bytes(spec.data.sources) if spec.data else 0


def _report(manifest: Manifest, out: Path) -> str:
    """What was read, what was left out and why, and what was written."""
    details: dict[str, Any] = manifest.details
    lines: list[str] = []
    for source in details["sources"]:
        left_out = [
            f"{source[key]} {key.replace('_', ' ')}" for key in ("duplicates", "empty", "too_short") if source[key]
        ]
        kept = f"{source['train']} for training, {source['validation']} held out"
        lines.append(
            f"{source['kind']} {source['path']}: {source['documents']} documents: {', '.join([kept, *left_out])}"
        )
    for name in SPLITS:
        split = details["splits"][name]
        facts = [f"{split['documents']} documents", f"{split['tokens']} tokens", f"{split['bytes']} bytes of text"]
        if details["masked"]:
            facts.append(f"loss on {split['loss_tokens']} tokens")
        elif split["tokens"]:
            facts.append(f"{split['bytes'] / split['tokens']:.3f} bytes a token")
        lines.append(f"{name}: {', '.join(facts)}")
    if not details["splits"]["validation"]["documents"]:
        lines.append("note: no document is held out; raise data.validation_fraction to measure on unseen text")
    measured = manifest.measured or {}
    lines.append(f"wrote {out} in {measured['seconds']:.1f} s with {measured['workers']} process(es)")
    return "\n".join(lines)
