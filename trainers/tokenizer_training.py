"""The verb `archwright tokenizer train`: a sentencepiece vocabulary from `data.sources`.

What is learned from is whole text with its line ends and indentation, cut into chunks at line ends: sentencepiece's
own reading line by line never sees a line end, so that every one costs a token. Runs of spaces may be tokens, and a
token may mix letters and punctuation (`split_by_unicode_script` is off) but reaches over no space.

Bytes per token on the Python standard library (4 MB learned from, 0.9 MB of other files measured, bpe):

    vocabulary                                               1,024    2,048    4,096
    line by line, line end as a byte, no runs of spaces      1.77     1.96     2.11
    line by line, runs of spaces                             2.41     2.79     3.09
    whole text, runs of spaces                               2.52     2.95     3.29
    and letters mixed with punctuation (chosen)              2.56     3.05     3.46
    and tokens that reach over spaces                        2.62     3.21     3.75

The last is not chosen: a model of 2.2 M parameters trained on 0.8 M tokens of each reached 2.508 bits per byte with the
chosen one of 2,048 tokens, 2.525 with the last and 2.529 with the one before. unigram is 2 to 3% behind bpe everywhere,
and takes 20 times as long to train.
"""

import io
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceTrainer

from archwright.runtime.text import Tokenizer, open_tokenizer
from archwright.runtime.text.base import CHAT_TEMPLATE
from archwright.runtime.text.chat import CHATML, TURN_BEGIN, TURN_END, ChatTemplate, read_template
from archwright.runtime.text.special_tokens import CONFIG
from archwright.runtime.text.tokenizer import SENTENCEPIECE_FILE
from archwright.spec import ArchwrightError, Spec, load
from archwright.spec.cli import add_output_format, add_set, parser
from archwright.spec.files import atomic_folder
from archwright.spec.manifest import Manifest, write_manifest
from archwright.spec.models.text import SentencePieceTokenizer
from archwright.trainers.progress import byte_progress
from archwright.trainers.sources import Document, Selection, share_of, total_bytes

REPORT = "report.json"
_BOS, _EOS, _UNKNOWN = "<s>", "</s>", "<unk>"
# sentencepiece drops a sentence over its `max_sentence_length` without a word: no chunk comes near it.
_CHUNK_CHARACTERS = 4096
_MAX_SENTENCE_BYTES = 1 << 16
# Two characters that sentencepiece uses itself: it drops a sentence that holds the first, also without a word, and
# takes the second for a space. Chunks end at them; in the text they are encoded as bytes.
_RESERVED = re.compile("[\u2585\u2581]")
# The unigram trainer adds up floating-point numbers in as many parts as there are threads, so their number is part of
# the result. A fixed one gives the same vocabulary on every machine, and keeps up to 16 cores busy.
_THREADS = 16
# More text changes a vocabulary no more, but sentencepiece keeps all of it in memory.
_MAX_TRAINING_BYTES = 512 << 20
_MAX_CHECKED_BYTES = 64 << 20


def tokenizer(argv: list[str]) -> int:
    """`tokenizer train SPEC -o DIR`."""
    arguments = parser("tokenizer", "Train a sentencepiece tokenizer on the sources of a spec, and check it.")
    arguments.add_argument("action", choices=["train"], help="what to do")
    arguments.add_argument("spec", metavar="SPEC", help="a YAML file, or preset:NAME; needs tokenizer and data.sources")
    arguments.add_argument("-o", "--output", required=True, type=Path, metavar="DIR", help="folder to write")
    add_set(arguments)
    add_output_format(arguments, ("text", "json"))
    args = arguments.parse_args(argv)
    spec = load(args.spec, args.overrides)
    total = total_bytes(spec.data.sources) if spec.data else 0
    with byte_progress("reading", total) as advance:
        manifest = train_tokenizer(spec, args.output, advance=advance)
    result = {"path": str(args.output), **manifest.details["report"], **(manifest.measured or {})}
    print(json.dumps(result, indent=2) if args.output_format == "json" else _summary(result))
    return 0


def train_tokenizer(spec: Spec, out: Path, *, advance: Callable[[int], None] | None = None) -> Manifest:
    """Trains `spec.tokenizer` on the training documents of `spec.data`, checks it on those held out, writes `out`.

    The folder holds tokenizer.model, tokenizer_config.json, chat_template.jinja, report.json and manifest.json; equal
    sources give equal files, but for `measured` in the manifest. It is written completely or not at all.

    Raises TOK020 (no sentencepiece section), TOK021 (a vocabulary too large for the text, or too small), TOK022 (a text
    does not come back from its tokens), TOK023 (no text), TOK025 (more tokens than the model has rows) and the codes of
    the sources (DATA001 to DATA009).
    """
    started = time.perf_counter()
    section, vocab_size = _section(spec)
    template = read_template(Path(section.chat_template)) if section.chat_template else CHATML
    corpus = _read(spec, advance or (lambda num_bytes: None))
    model = _train(section, vocab_size, corpus.chunks)
    trained = time.perf_counter()
    with atomic_folder(out) as folder:
        (folder / SENTENCEPIECE_FILE).write_bytes(model)
        (folder / CONFIG).write_text(json.dumps(_config(), indent=2) + "\n", encoding="utf-8")
        (folder / CHAT_TEMPLATE).write_text(template, encoding="utf-8")
        opened = open_tokenizer(folder)
        ChatTemplate(template, opened, where=section.chat_template or CHAT_TEMPLATE)
        report = {"algorithm": section.algorithm, "vocab_size": vocab_size, **_check(opened, corpus)}
        (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        measured = {"training_s": round(trained - started, 3), "check_s": round(time.perf_counter() - trained, 3)}
        details = {"digest": opened.digest, "report": report}
        return write_manifest(folder, kind="tokenizer", spec=spec, details=details, measured=measured)


@dataclass
class _Corpus:
    """The text to learn from, in chunks, and the documents to measure on."""

    chunks: list[str] = field(default_factory=list)
    training_bytes: int = 0
    training_documents: int = 0
    checked: list[tuple[str, str]] = field(default_factory=list)
    """Pairs (where, text)."""
    held_out: bool = True


def _section(spec: Spec) -> tuple[SentencePieceTokenizer, int]:
    section = spec.tokenizer
    if not isinstance(section, SentencePieceTokenizer):
        found = f"`tokenizer.kind` is {section.kind}" if section else "the spec has no `tokenizer` section"
        help = "set tokenizer: {kind: sentencepiece, algorithm: bpe}"
        raise ArchwrightError("TOK020", f"only sentencepiece tokenizers can be trained; {found}", help=help)
    vocab_size = section.vocab_size or spec.model.vocab_size
    if vocab_size > spec.model.vocab_size:
        raise ArchwrightError(
            "TOK025",
            f"`tokenizer.vocab_size` is {vocab_size}, `model.vocab_size` is {spec.model.vocab_size}",
            help="a model needs a row for every token: lower the first or raise the second",
        )
    return section, vocab_size


def _read(spec: Spec, advance: Callable[[int], None]) -> _Corpus:
    if spec.data is None or not spec.data.sources:
        raise ArchwrightError("DATA001", "the spec has no `data.sources`: nothing to read", help="name a source there")
    corpus = _Corpus()
    share = min(1.0, _MAX_TRAINING_BYTES / max(1, total_bytes(spec.data.sources)))
    trained_on: list[Document] = []
    checked_bytes = 0
    for document, held_out in Selection(spec.data):
        size = document.num_bytes
        advance(size)
        if held_out and checked_bytes < _MAX_CHECKED_BYTES:
            checked_bytes += size
            corpus.checked += [(document.where, text) for text in document.texts()]
        elif not held_out and share_of(document.key, "tokenizer") < share:
            corpus.training_bytes += size
            corpus.training_documents += 1
            corpus.chunks += [chunk for text in document.texts() for chunk in chunks(text)]
            if len(trained_on) < 100:
                trained_on.append(document)
    if not corpus.chunks:
        raise ArchwrightError("TOK023", "the sources hold no text to learn from", help="see data.sources")
    if not corpus.checked:
        corpus.held_out = False
        corpus.checked = [(document.where, text) for document in trained_on for text in document.texts()]
    return corpus


def chunks(text: str) -> Iterator[str]:
    """`text` in pieces of at most `_CHUNK_CHARACTERS`, cut at a line's end where there is one in reach."""
    for section in _RESERVED.split(text):
        start = 0
        while start < len(section):
            stop = start + _CHUNK_CHARACTERS
            if stop < len(section):
                stop = section.rfind("\n", start, stop) + 1 or stop
            yield section[start:stop]
            start = stop


def _train(section: SentencePieceTokenizer, vocab_size: int, texts: Sequence[str]) -> bytes:
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type=section.algorithm,
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_by_unicode_script=False,
            split_digits=section.split_digits,
            control_symbols=[TURN_BEGIN, TURN_END],
            unk_piece=_UNKNOWN,
            bos_piece=_BOS,
            eos_piece=_EOS,
            pad_id=-1,
            max_sentence_length=_MAX_SENTENCE_BYTES,
            num_threads=_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _explain(str(error), vocab_size) from error
    return model.getvalue()


def _explain(message: str, vocab_size: int) -> Exception:
    """What the trainer says about the size of the vocabulary, as an error with the nearest legal value."""
    if match := re.search(r"Please set it to a value <= (\d+)", message):
        found = f"the text is too small for a vocabulary of {vocab_size} tokens"
        return ArchwrightError(
            "TOK021", found, help=f"set tokenizer.vocab_size to at most {match[1]}, or give more text"
        )
    if match := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        found = f"a vocabulary of {vocab_size} tokens has no room for the 256 bytes and the characters of the text"
        return ArchwrightError("TOK021", found, help=f"set tokenizer.vocab_size to at least {int(match[1]) + 1}")
    return RuntimeError(f"sentencepiece failed: {message}")


def _config() -> dict[str, Any]:
    return {
        "bos_token": _BOS,
        "eos_token": _EOS,
        "unk_token": _UNKNOWN,
        "additional_special_tokens": [TURN_BEGIN, TURN_END],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
    }


def _check(opened: Tokenizer, corpus: _Corpus) -> dict[str, Any]:
    """Encodes and decodes every document of the check; raises TOK022 unless each comes back as it was."""
    texts = [text for _, text in corpus.checked]
    encoded = opened.encode_batch(texts)
    for (where, text), ids in zip(corpus.checked, encoded, strict=True):
        decoded = opened.decode(ids)
        if decoded != text:
            at = next((i for i, (a, b) in enumerate(zip(text, decoded, strict=False)) if a != b), len(decoded))
            raise ArchwrightError(
                "TOK022", f"the text differs after encoding and decoding, from character {at} on", where=where
            )
    num_tokens = sum(map(len, encoded))
    num_bytes = sum(len(text.encode()) for text in texts)
    return {
        "training_documents": corpus.training_documents,
        "training_bytes": corpus.training_bytes,
        "checked_on": "held-out documents" if corpus.held_out else "training documents (none is held out)",
        "checked_documents": len(texts),
        "checked_bytes": num_bytes,
        "checked_tokens": num_tokens,
        "bytes_per_token": round(num_bytes / max(1, num_tokens), 4),
        "tokens_used": len(set().union(*encoded)),
        "round_trip": "exact",
    }


def _summary(result: dict[str, Any]) -> str:
    return "\n".join(
        [
            f"trained {result['algorithm']}, {result['vocab_size']} tokens, on {result['training_bytes']} bytes "
            f"({result['training_documents']} documents) in {result['training_s']:.1f} s",
            f"round trip exact on {result['checked_documents']} {result['checked_on']}, "
            f"{result['checked_bytes']} bytes",
            f"{result['bytes_per_token']:.3f} bytes a token; "
            f"{result['tokens_used']} of {result['vocab_size']} tokens used there",
            f"wrote {result['path']}",
        ]
    )
