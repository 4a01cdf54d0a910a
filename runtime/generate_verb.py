"""`archwright generate`."""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from archwright.spec import ArchwrightError
from archwright.spec.cli import add_output_format, parser

if TYPE_CHECKING:
    from archwright.runtime.conversation import Conversation
    from archwright.runtime.generation import Answer, Piece

EXIT = "/exit"


def generate(arguments: list[str]) -> int:
    """Prints text as it comes; notes about the run go to stderr."""
    args = _parser()
    chosen = args.parse_args(arguments)
    if not chosen.prompt and not chosen.chat:
        args.error("give --prompt TEXT (it may be repeated), or --chat")
    if chosen.system is not None and not chosen.chat:
        args.error("--system goes with --chat")
    from archwright.runtime.conversation import Conversation  # after parsing, so that --help is quick
    from archwright.runtime.model import open_model

    model = open_model(chosen.path, chosen.backend, chosen.device)
    _note(model.describe())
    options = {name: getattr(chosen, name) for name in ("max_tokens", "temperature", "top_k", "top_p", "seed", "stop")}
    as_json = chosen.output_format == "json"
    if chosen.chat:
        conversation = Conversation(model=model, options=options, system=chosen.system)
        _converse(conversation, chosen.prompt, as_json=as_json)
    elif as_json:
        answers = model.generate(chosen.prompt, **options)
        records = [_record(prompt, answer) for prompt, answer in zip(chosen.prompt, answers, strict=True)]
        print(json.dumps(records[0] if len(records) == 1 else records, indent=2, ensure_ascii=False))
    elif len(chosen.prompt) == 1:
        _note(_summary(_show(model.stream(chosen.prompt, **options))))
    else:
        for prompt, answer in zip(chosen.prompt, model.generate(chosen.prompt, **options), strict=True):
            print(f"== {prompt}\n{answer.text}")
            _note(_summary(answer))
    return 0


def _parser() -> argparse.ArgumentParser:
    args = parser("generate", "Write text with a run (its newest checkpoint), a model folder or an artifact.")
    args.add_argument("path", metavar="PATH", help="a run, a model folder or an artifact")
    args.add_argument("--prompt", metavar="TEXT", action="append", default=[], help="may be repeated: one batch")
    args.add_argument("--chat", action="store_true", help=f"questions from stdin, a line each, until {EXIT} or its end")
    args.add_argument("--system", metavar="TEXT", help="the chat's system message")
    args.add_argument("--max-tokens", metavar="N", type=int, default=128, help="length of an answer (default 128)")
    args.add_argument("--temperature", metavar="T", type=float, default=0.0, help="0 (default): the most likely token")
    args.add_argument("--top-k", metavar="K", type=int, help="only the K most likely tokens")
    args.add_argument("--top-p", metavar="P", type=float, help="only the most likely tokens that sum to P")
    args.add_argument("--seed", metavar="N", type=int, help="the same seed gives the same text")
    args.add_argument("--stop", metavar="TEXT", action="append", default=[], help="ends an answer; may be repeated")
    args.add_argument("--backend", choices=("auto", "torch", "onnxruntime", "tensorrt"), default="auto")
    args.add_argument("--device", metavar="DEVICE", default="auto", help="auto (default), cpu, cuda or cuda:N")
    add_output_format(args, ("text", "json"))
    return args


def _converse(conversation: "Conversation", prompts: Iterable[str], *, as_json: bool) -> None:
    """Answer the prompts and then stdin, line by line. At a terminal a question that fails is reported and left out."""
    forgotten = 0
    for question in _questions(prompts):
        try:
            pieces = conversation.ask(question)
            if as_json:
                answer = next(piece.answer for piece in pieces if piece.answer is not None)
                print(json.dumps(_record(question, answer), ensure_ascii=False), flush=True)
            else:
                _show(pieces)
        except ArchwrightError as error:
            if not sys.stdin.isatty():
                raise
            print(error, file=sys.stderr)
        if conversation.forgotten > forgotten:
            forgotten = conversation.forgotten
            capacity = conversation.model.capacity
            _note(f"the chat is longer than the model's {capacity} tokens: forgot the oldest {forgotten} questions")


def _questions(prompts: Iterable[str]) -> Iterator[str]:
    yield from prompts
    terminal = sys.stdin.isatty()
    while True:
        if terminal:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() == EXIT:
            return
        if line.strip():
            yield line.rstrip("\r\n")


def _show(pieces: Iterable["Piece"]) -> "Answer":
    """Print the one answer as it comes."""
    answer = None
    for piece in pieces:
        print(piece.text, end="", flush=True)
        answer = piece.answer
    print(flush=True)
    assert answer is not None, "the last piece has the answer"
    return answer


def _record(prompt: str, answer: "Answer") -> dict[str, Any]:
    return {"prompt": prompt, **asdict(answer)}


def _summary(answer: "Answer") -> str:
    timings = answer.timings
    return (
        f"{len(answer.tokens)} tokens ({answer.finish_reason}), prompt of {answer.num_prompt_tokens} in "
        f"{timings.prefill_s:.3f} s, then {timings.tokens_per_s:.0f} tokens/s"
    )


def _note(text: str) -> None:
    print(f"generate: {text}", file=sys.stderr, flush=True)
