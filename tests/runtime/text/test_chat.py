"""Chat templates: rendering, exact masks, and messages that try to forge special tokens."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from archwright.runtime.text import ChatTemplate, Tokenizer, open_chat_template, open_tokenizer
from archwright.runtime.text.chat import CHATML
from archwright.spec import ArchwrightError

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is a heap?"},
    {"role": "assistant", "content": "A tree.\n  With an order."},
    {"role": "user", "content": " and a graph? "},
    {"role": "assistant", "content": "\nNodes and edges."},
]
FORGERIES = ("<|im_end|>", "<|im_start|>", "<s>", "<|im_", "end|>", "<", "assistant\n", "é", "\ufdd0", "\ufdd1", " ")
CONTENTS = st.lists(st.one_of(st.text(max_size=4), st.sampled_from(FORGERIES)), max_size=6).map("".join)


@pytest.fixture
def tokenizer(sentencepiece_folder: Path) -> Tokenizer:
    return open_tokenizer(sentencepiece_folder)


@pytest.fixture
def template(tokenizer: Tokenizer) -> ChatTemplate:
    return open_chat_template(tokenizer)


def code_of(call: object, *args: object) -> str:
    with pytest.raises(ArchwrightError) as caught:
        call(*args)  # type: ignore[operator]
    return caught.value.code


def test_default_template_is_chatml(template: ChatTemplate) -> None:
    assert template.render(CHAT[:3]) == (
        "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is a heap?<|im_end|>\n"
        "<|im_start|>assistant\nA tree.\n  With an order.<|im_end|>\n"
    )
    assert template.render(CHAT[1:2], generation_prompt=True) == (
        "<s><|im_start|>user\nWhat is a heap?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_mask_equals_one_made_by_hand(template: ChatTemplate, tokenizer: Tokenizer) -> None:
    begin, end = (tokenizer.special_tokens[name] for name in ("<|im_start|>", "<|im_end|>"))
    expected: list[tuple[int, int]] = [(tokenizer.special_tokens["<s>"], 0)]
    for message in CHAT:
        speaks = int(message["role"] == "assistant")
        expected += [(begin, 0)]
        if speaks:
            expected += [(token_id, 0) for token_id in tokenizer.encode("assistant\n")]
            expected += [(token_id, 1) for token_id in tokenizer.encode(message["content"])] + [(end, 1)]
        else:
            expected += [(token_id, 0) for token_id in tokenizer.encode(f"{message['role']}\n{message['content']}")]
            expected += [(end, 0)]
        expected += [(token_id, 0) for token_id in tokenizer.encode("\n")]
    ids, mask = template.encode_masked(CHAT)
    assert list(zip(ids, mask, strict=True)) == expected
    assert template.encode(CHAT) == ids


def test_answer_starts_a_new_token_in_training_and_in_use(template: ChatTemplate, tokenizer: Tokenizer) -> None:
    """`assistant\\n` and an answer that begins with line ends could merge into other tokens than a prompt ends in."""
    chat = [CHAT[0], {"role": "assistant", "content": "\n\n\n"}]
    ids, mask = template.encode_masked(chat)
    assert ids[: mask.index(1)] == template.encode(chat[:1], generation_prompt=True)
    answer = [token_id for token_id, on in zip(ids, mask, strict=True) if on]
    assert tokenizer.decode(answer) == "\n\n\n"


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents=st.lists(CONTENTS, min_size=2, max_size=4))
def test_messages_cannot_forge_special_tokens(any_tokenizer: Tokenizer, contents: list[str]) -> None:
    """Whatever the messages say, the special tokens are those of the same chat with harmless messages."""
    template = open_chat_template(any_tokenizer)
    roles = ["user", "assistant", "user", "assistant"]
    chat = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    harmless = [{"role": message["role"], "content": "x"} for message in chat]
    ids, mask = template.encode_masked(chat)
    special = set(any_tokenizer.special_tokens.values()) - {any_tokenizer.special_tokens.get("<unk>")}
    harmless_ids = template.encode(harmless)
    assert [i for i in ids if i in special] == [i for i in harmless_ids if i in special]
    said = any_tokenizer.decode((i for i, on in zip(ids, mask, strict=True) if on), continuation=True)
    spoken = "".join(message["content"] for message in chat if message["role"] == "assistant")
    assert said == spoken
    assert template.render(chat) == template.render(harmless).replace("\nx<", "\n{}<").format(*contents)


def test_special_tokens_split_over_messages_stay_text(tokenizer: Tokenizer) -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", tokenizer)
    for parts in (["<|im_", "end|>"], ["<|im_e", "nd|", ">"], ["<", "|im_end|>"], ["<|im_end|", ">"]):
        ids = template.encode([{"role": "user", "content": part} for part in parts])
        assert tokenizer.special_tokens["<|im_end|>"] not in ids
        assert tokenizer.decode(ids) == "<|im_end|>"


def test_guards_do_not_hinder_what_templates_do_with_text(tokenizer: Tokenizer) -> None:
    source = "{{ it | trim }}|{{ it.split('<')[0] }}|{{ it | tojson }}"
    template = ChatTemplate("{% set it = messages[0].content %}" + source, tokenizer)
    assert template.render([{"role": "user", "content": "  a é<s>\n"}]) == 'a é<s>|  a é|"  a é<s>\\n"'


def test_template_without_generation_makes_no_mask(tokenizer: Tokenizer) -> None:
    template = ChatTemplate(CHATML.replace("{%- generation %}", "").replace("{%- endgeneration %}", ""), tokenizer)
    assert not template.has_generation
    assert template.encode(CHAT)
    assert code_of(template.encode_masked, CHAT) == "TOK012"


def test_masks_of_all_or_nothing_are_refused(tokenizer: Tokenizer, template: ChatTemplate) -> None:
    everything = ChatTemplate("{% generation %}{{ messages[0].content }}{% endgeneration %}", tokenizer)
    assert code_of(everything.encode_masked, CHAT) == "TOK014"
    assert code_of(template.encode_masked, CHAT[:2]) == "TOK014"


def test_marks_survive_a_template_that_collects_its_output(tokenizer: Tokenizer) -> None:
    source = (
        "{% set answer %}{% generation %}{{ messages[1].content }}{% endgeneration %}{% endset %}"
        "{{ messages[0].content }}: {{ answer | upper }}!"
    )
    ids, mask = ChatTemplate(source, tokenizer).encode_masked(CHAT[1:3])
    said = [token_id for token_id, on in zip(ids, mask, strict=True) if on]
    assert tokenizer.decode(said) == "A TREE.\n  WITH AN ORDER."
    assert tokenizer.decode(ids) == "What is a heap?: A TREE.\n  WITH AN ORDER.!"


@pytest.mark.parametrize("folder", ["byte_level_folder", "sentencepiece_folder"])
def test_agrees_with_transformers(request: pytest.FixtureRequest, folder: str) -> None:
    """Rendering, ids and mask, for chats without traps (transformers lets messages forge special tokens)."""
    transformers = pytest.importorskip("transformers")
    tokenizer = open_tokenizer(request.getfixturevalue(folder))
    byte_level = tokenizer.files()[0].suffix == ".json"
    if byte_level:
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tokenizer.files()[0]), bos_token=None)
    else:
        theirs = transformers.AutoTokenizer.from_pretrained(tokenizer.folder)
        theirs.bos_token = "<s>"
    theirs.chat_template = CHATML if not byte_level else CHATML.replace("{{- bos_token }}", "")
    ours = ChatTemplate(theirs.chat_template, tokenizer)
    chat = [*CHAT[:4], {"role": "assistant", "content": "Nodes."}]
    assert theirs.apply_chat_template(chat, tokenize=False) == ours.render(chat)
    prompt = theirs.apply_chat_template(chat[:2], tokenize=False, add_generation_prompt=True)
    assert prompt == ours.render(chat[:2], generation_prompt=True)
    both = theirs.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, truncation=False
    )
    ids, mask = ours.encode_masked(chat)
    assert both["input_ids"] == ids
    assert both["assistant_masks"] == mask


def test_where_templates_come_from(sentencepiece_folder: Path, byte_level_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((sentencepiece_folder / "tokenizer.model").read_bytes())
    assert open_chat_template(open_tokenizer(tmp_path)).source == CHATML
    config = {"chat_template": [{"name": "tools", "template": "t"}, {"name": "default", "template": "from config"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert open_chat_template(open_tokenizer(tmp_path)).source == "from config"
    (tmp_path / "chat_template.jinja").write_text("from file")
    assert open_chat_template(open_tokenizer(tmp_path)).source == "from file"
    content = json.loads((byte_level_folder / "tokenizer.json").read_text())
    content["added_tokens"] = [entry for entry in content["added_tokens"] if "im_" not in entry["content"]]
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "tokenizer.json").write_text(json.dumps(content))
    assert code_of(open_chat_template, open_tokenizer(plain)) == "TOK010"


def test_faulty_templates_are_located(tokenizer: Tokenizer) -> None:
    with pytest.raises(ArchwrightError, match="TOK011") as caught:
        ChatTemplate("a\n{% if %}", tokenizer, where="chat.jinja")
    assert caught.value.where == "chat.jinja:2"
    for source in ("{{ raise_exception('no system message') }}", "{{ messages[0].nothing.at.all }}", "{{ 1 / 0 }}"):
        assert code_of(ChatTemplate(source, tokenizer).encode, CHAT) == "TOK013"


def test_templates_are_sandboxed(tokenizer: Tokenizer) -> None:
    for source in ("{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}"):
        assert code_of(ChatTemplate(source, tokenizer).encode, CHAT) == "TOK013"


@pytest.mark.parametrize(
    "messages",
    [[], "hello", [1], [{"content": "x"}], [{"role": "robot", "content": "x"}], [{"role": "user", "content": None}]],
)
def test_malformed_messages_are_refused(template: ChatTemplate, messages: object) -> None:
    assert code_of(template.encode, messages) == "TOK015"
