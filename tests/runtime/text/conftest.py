"""Small tokenizers of every kind that `open_tokenizer` reads, trained on a few files of the standard library."""

import io
import json
import sysconfig
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Fast

from archwright.runtime.text import Tokenizer, open_tokenizer

CHAT_TOKENS = ["<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="session")
def stdlib_texts() -> list[str]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    names = ("argparse", "ast", "calendar", "difflib", "heapq", "random", "textwrap", "uuid")
    return [(folder / f"{name}.py").read_text(encoding="utf-8") for name in names]


def train_sentencepiece(folder: Path, texts: list[str], **options: object) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text[i : i + 4000] for text in texts for i in range(0, len(text), 4000)),
        model_writer=model,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        model_type="bpe",
        minloglevel=2,
        max_sentence_length=1 << 16,
        **{"vocab_size": 700, "add_dummy_prefix": False, "control_symbols": CHAT_TOKENS, **options},
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


@pytest.fixture(scope="session")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory, stdlib_texts: list[str]) -> Path:
    return train_sentencepiece(tmp_path_factory.mktemp("sentencepiece"), stdlib_texts)


@pytest.fixture(scope="session")
def prefix_folder(tmp_path_factory: pytest.TempPathFactory, stdlib_texts: list[str]) -> Path:
    """As Llama 2: a space is put before every text, and the chat tokens are user-defined symbols."""
    folder = tmp_path_factory.mktemp("prefix")
    options = {"add_dummy_prefix": True, "control_symbols": [], "user_defined_symbols": CHAT_TOKENS}
    train_sentencepiece(folder, stdlib_texts, **options)
    (folder / "tokenizer_config.json").write_text(json.dumps({"additional_special_tokens": CHAT_TOKENS}))
    return folder


@pytest.fixture(scope="session")
def byte_level_folder(tmp_path_factory: pytest.TempPathFactory, stdlib_texts: list[str]) -> Path:
    """As GPT-2 and Llama 3."""
    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", *CHAT_TOKENS]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    fast.train_from_iterator(stdlib_texts, trainer)
    fast.add_tokens([AddedToken("<think>", special=False)])
    fast.enable_truncation(5)  # a trap found in published files: a text must not be cut
    folder = tmp_path_factory.mktemp("byte_level")
    fast.save(str(folder / "tokenizer.json"))
    config = {"eos_token": {"content": "<|im_end|>"}, "pad_token": "<|endoftext|>", "bos_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def metaspace_folder(tmp_path_factory: pytest.TempPathFactory, stdlib_texts: list[str]) -> Path:
    """As Llama 2 in Hugging Face's format: pieces of sentencepiece, bytes where there is none."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    specials = ["<unk>", "<s>", "</s>", *CHAT_TOKENS]
    fast = Fast(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    fast.decoder = decoders.Sequence(steps)
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=specials + byte_tokens, max_token_length=12, show_progress=False
    )
    fast.train_from_iterator(["\n".join(text.split("\n")[:120]) for text in stdlib_texts], trainer)
    folder = tmp_path_factory.mktemp("metaspace")
    content = json.loads(fast.to_str())
    # Bytes are ordinary entries of the vocabulary, not added tokens.
    content["added_tokens"] = [entry for entry in content["added_tokens"] if entry["content"] in specials]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(params=["sentencepiece_folder", "prefix_folder", "byte_level_folder", "metaspace_folder"])
def any_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return open_tokenizer(request.getfixturevalue(request.param))
