"""The command line: a table of verbs, resolved only when called, so that `archwright validate` never imports torch."""

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from typing import Any, Literal, cast

from archwright.spec.diagnostics import OutputFormat, diagnostics_of, render
from archwright.spec.errors import ArchwrightError
from archwright.spec.merge import SetText
from archwright.spec.structure import nearest

Verb = Callable[[list[str]], int]

VERBS: dict[str, tuple[str, str]] = {
    "init": ("archwright.spec.verbs:init", "write a spec to start from"),
    "validate": ("archwright.spec.verbs:validate", "check a spec"),
    "show": ("archwright.spec.verbs:show", "print a spec with parents, defaults and --set merged in"),
    "schema": ("archwright.spec.verbs:schema", "print the JSON Schema of the language, for editors"),
    "presets": ("archwright.spec.verbs:presets", "list the presets"),
    "plan": ("archwright.compiler.plan_verb:plan", "count parameters, FLOPs and memory"),
    "tokenizer": ("archwright.trainers.tokenizer_training:tokenizer", "train a tokenizer"),
    "data": ("archwright.trainers.data_verb:data", "turn text into shards of tokens"),
    "train": ("archwright.trainers.train_verb:train", "pretrain or finetune a model"),
    "eval": ("archwright.trainers.eval_verb:evaluate", "measure loss, perplexity and bits per byte"),
    "build": ("archwright.runtime.build_verb:build", "write ONNX graphs and TensorRT engines"),
    "verify": ("archwright.runtime.verify_verb:verify", "prove that an artifact computes what its spec says"),
    "inspect": ("archwright.runtime.inspect_verb:inspect", "say what a folder holds"),
    "generate": ("archwright.runtime.generate_verb:generate", "write text with a model or an artifact"),
    "doctor": ("archwright.runtime.doctor:doctor", "say what this machine can run"),
}

EXIT_OK, EXIT_WRONG_INPUT, EXIT_USAGE, EXIT_INTERNAL, EXIT_INTERRUPTED = 0, 1, 2, 3, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb. 0: ok, 1: the user's input is wrong, 2: usage, 3: internal, 130: interrupted."""
    name, *rest = [*(sys.argv[1:] if arguments is None else arguments)] or ["--help"]
    if name in ("-h", "--help"):
        print(_overview())
        return EXIT_OK
    if name == "--version":
        from importlib.metadata import version

        print(f"archwright {version('archwright')}")
        return EXIT_OK
    if name not in VERBS:
        near = nearest(name, VERBS)
        hint = f"did you mean `{near}`?" if near else "`archwright --help` lists the verbs"
        print(f"archwright: there is no verb `{name}`\n  help: {hint}", file=sys.stderr)
        return EXIT_USAGE
    return _run(name, rest)


def parser(verb: str, description: str) -> argparse.ArgumentParser:
    """The parser of one verb, with `--debug`."""
    result = argparse.ArgumentParser(f"archwright {verb}", description=description, allow_abbrev=False)
    result.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return result


def add_set(parser: argparse.ArgumentParser) -> None:
    """Adds `--set PATH=VALUE`, which may be repeated; `args.overrides` goes to `load`."""
    help = "override a value of the spec, e.g. train.steps=10; VALUE is YAML; may be repeated, applied in order"
    parser.add_argument("--set", dest="overrides", metavar="PATH=VALUE", action=_SetAction, default={}, help=help)


def add_output_format(
    parser: argparse.ArgumentParser, choices: tuple[OutputFormat, ...] = ("text", "json", "github")
) -> None:
    """Adds `--output-format`; an error of the verb is printed in that format too."""
    help = "text for people (default), json for tools, github for annotations in a pull request"
    parser.add_argument("--output-format", choices=choices, default="text", help=help if "github" in choices else None)


def parse_overrides(assignments: Sequence[str]) -> dict[str, object]:
    """`["train.steps=10", ...]` as overrides for `load`; of two with the same path the later counts.

    Raises `ValueError` for one without `=`.
    """
    overrides: dict[str, object] = {}
    for assignment in assignments:
        path, equals, value = assignment.partition("=")
        if not equals or not path.strip():
            raise ValueError(f"`{assignment}` is not PATH=VALUE")
        overrides.pop(path.strip(), None)  # the later one also takes its place in the order
        overrides[path.strip()] = SetText(value)
    return overrides


class _SetAction(argparse.Action):
    """Gathers the overrides in a dict."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        try:
            override = parse_overrides([values])
        except ValueError as error:
            parser.error(f"--set: {error}")
        overrides = {path: value for path, value in getattr(namespace, self.dest).items() if path not in override}
        setattr(namespace, self.dest, {**overrides, **override})


def _run(name: str, arguments: list[str]) -> int:
    debug = "--debug" in arguments
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a name of a file may hold what the terminal's encoding does not
            stream.reconfigure(errors="backslashreplace")
    # OpenMP's threads spin while they wait. Where another process wants the core, that made a training on two threads
    # 20 times slower (400 against 8,000 tokens/s); sleeping threads lose little. Read when torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        module, _, function = VERBS[name][0].partition(":")
        verb = cast(Verb, getattr(importlib.import_module(module), function))
        status = verb(arguments)
        sys.stdout.flush()
        return status
    except SystemExit as stop:  # argparse: --help or a usage error
        return stop.code if isinstance(stop.code, int) else EXIT_OK
    except KeyboardInterrupt:
        print("archwright: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, as in `archwright show ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except ArchwrightError as error:
        return _report(error, arguments, debug)
    except OSError as error:
        where = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else None
        reason = error.strerror or str(error)
        help = "check the path, its permissions, and the space on its disk"
        refused = ArchwrightError("SPEC092", f"the system refuses: {reason}", where=where, help=help)
        return _report(refused, arguments, debug)
    except Exception as error:
        if debug:
            traceback.print_exc()
        summary = " ".join(str(error).split())[:300]
        print(f"archwright {name}: internal error: {type(error).__name__}: {summary}", file=sys.stderr)
        if not debug:
            print("  help: run it again with --debug and report the traceback", file=sys.stderr)
        return EXIT_INTERNAL


def _report(error: ArchwrightError, arguments: list[str], debug: bool) -> int:
    if debug:
        traceback.print_exc()
    output_format = _output_format(arguments)
    if output_format == "text":
        print(error, file=sys.stderr)
    else:
        print(render(diagnostics_of(error), output_format))
    return EXIT_WRONG_INPUT


def _output_format(arguments: list[str]) -> Literal["text", "json", "github"]:
    """What the verb's own parser would find: it may have stopped before it told us."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    add_output_format(finder)
    try:
        return finder.parse_known_args(arguments)[0].output_format
    except (argparse.ArgumentError, SystemExit):
        return "text"


def _overview() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {help}" for name, (_, help) in VERBS.items())
    return (
        "usage: archwright VERB ...\n\n"
        "One YAML spec in, a trained model and verified inference engines out.\n\n"
        f"verbs:\n{verbs}\n\n"
        "`archwright VERB --help` explains a verb; `archwright --version` prints the version.\n"
        "Exit status: 0 ok, 1 the input is wrong, 2 usage, 3 internal."
    )
