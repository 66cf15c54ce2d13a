"""Control tokens come from the template and the tokenizer, never out of what a user wrote."""

import chat_templates as templates
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import make_byte_level, make_first_prefixing, make_space_prefixing
from tokenizers import AddedToken
from transformers import ByT5Tokenizer

from lora_engine.data.control import ControlTokens
from lora_engine.data.dataset import prepare
from lora_engine.data.records import Record
from lora_engine.data.render import Example, tokenize
from lora_engine.errors import UserError

SPELLED = "encoded as plain text, not as control tokens"


def chat(*texts: str) -> Record:
    """Texts of user and assistant in turn."""
    return Record(
        "messages",
        messages=tuple(
            {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)
        ),
        origin="chat.jsonl:1",
    )


def controls(example: Example, tokenizer) -> list[str]:
    """The control tokens among the example's, in order."""
    ids = ControlTokens(tokenizer).ids
    return [tokenizer.convert_ids_to_tokens(i) for i in example.input_ids if i in ids]


def learned(example: Example, tokenizer) -> str:
    pairs = zip(example.input_ids, example.supervised, strict=True)
    return tokenizer.decode([token for token, on in pairs if on])


TEMPLATES = {
    "chatml": (templates.CHATML_DEFAULT_SYSTEM, "<|im_end|>"),
    "llama3": (templates.LLAMA3, "<|eot_id|>"),
    "llama2": (templates.LLAMA2, "</s>"),
    "qwen3": (templates.QWEN3, "<|im_end|>"),
    "phi3": (templates.PHI3, "</s>"),
    "plain": (templates.PLAIN, "</s>"),
}


@pytest.mark.parametrize(("template", "eos"), TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("loss_on", ["assistant", "all"])
def test_what_messages_say_is_plain_text(template, eos, loss_on):
    tokenizer = make_byte_level(template, eos)
    said = ("Is <|im_end|> an</s>end?", "<|eot_id|><|end|> is.", "<|im_start|>user", "a<s>b")
    example = tokenize(chat(*said), tokenizer, loss_on=loss_on)
    quiet = tokenize(chat("One", "Two", "Three", "Four"), tokenizer, loss_on=loss_on)
    assert controls(example, tokenizer) == controls(quiet, tokenizer)
    rendered = tokenizer.apply_chat_template(list(chat(*said).messages), tokenize=False)
    assert tokenizer.decode(example.input_ids) == rendered
    assert any(SPELLED in note for note in example.notes)
    assert not quiet.notes


@pytest.mark.parametrize("kind", ["messages", "completion", "text"])
def test_text_without_control_tokens_is_encoded_as_ever(tokenizer, kind):
    record = {
        "messages": chat("What < is | it >", "im_end"),
        "completion": Record("completion", prompt="im_start|", completion=" <|im"),
        "text": Record("text", text="a <| b |>"),
    }[kind]
    if kind == "messages":
        whole = tokenizer.apply_chat_template(list(record.messages), tokenize=False)
    else:
        whole = record.prompt + record.completion + record.text + "<|im_end|>"
    example = tokenize(record, tokenizer)
    assert tokenizer.decode(example.input_ids) == whole
    if kind != "completion":  # whose two halves are encoded each by itself
        assert example.input_ids == tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert not example.notes


def test_control_tokens_in_every_string_of_a_message_are_plain_text():
    tokenizer = make_byte_level(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] or '' }}"
        "{{ (m['tool_calls'] or []) | tojson }}<|im_end|>\n{% endfor %}"
    )
    call = {"name": "f<|im_end|>", "arguments": {"<|im_start|>": ["</s>", 1, None]}}
    record = Record(
        "messages",
        messages=(
            {"role": "user<|im_end|>", "content": "a"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ),
    )
    example = tokenize(record, tokenizer)
    assert controls(example, tokenizer) == ["<|im_start|>", "<|im_end|>"] * 2
    rendered = tokenizer.apply_chat_template(list(record.messages), tokenize=False)
    assert tokenizer.decode(example.input_ids) == rendered


REWRITING = {
    "trim": "{{ m['content'] | trim }}",
    "replace": "{{ m['content'].replace('ne', 'NE') }}",
    "removes-it": "{{ m['content'].replace('<|im_end|>', '') }}",
    "splits-at-it": "{{ m['content'].split('<|im_end|>')[-1] }}",
    "json": "{{ m['content'] | tojson(ensure_ascii=True) }}",
    "upper": "{{ m['content'] | upper }}",
}


@pytest.mark.parametrize("content", REWRITING.values(), ids=REWRITING)
def test_templates_that_rewrite_the_text(content):
    tokenizer = make_byte_level(
        "{% for m in messages %}<|im_start|>" + content + "<|im_end|>{% endfor %}"
    )
    record = chat("  one <|im_end|> two ", " three")
    example = tokenize(record, tokenizer, loss_on="all")
    assert controls(example, tokenizer) == ["<|im_start|>", "<|im_end|>"] * 2
    rendered = tokenizer.apply_chat_template(list(record.messages), tokenize=False)
    assert tokenizer.decode(example.input_ids) == rendered


TEXT = st.text(st.sampled_from("ab <|>/s.\n"), max_size=5)
PIECES = st.lists(TEXT | st.sampled_from(templates.SPECIAL_TOKENS), max_size=6).map("".join)


@settings(max_examples=80, deadline=None)
@given(turns=st.lists(st.tuples(PIECES, PIECES), min_size=1, max_size=3))
def test_no_text_makes_a_control_token(tokenizer, turns):
    texts = [text for turn in turns for text in turn]
    texts[1::2] = [text.rstrip() + "." for text in texts[1::2]]  # not an end of the turn
    example = tokenize(chat(*texts), tokenizer)
    rendered = tokenizer.apply_chat_template(list(chat(*texts).messages), tokenize=False)
    assert tokenizer.decode(example.input_ids) == rendered
    marks = ["<|im_start|>", "<|im_end|>"]
    assert controls(example, tokenizer) == marks * (len(texts) + 1)  # and a system prompt
    assert learned(example, tokenizer) == "".join(text + "<|im_end|>" for text in texts[1::2])


def test_a_prompt_and_its_completion_are_plain_text(tokenizer):
    record = Record("completion", prompt="a<|im_end|>b", completion=" <|im_start|>c")
    example = tokenize(record, tokenizer)
    assert controls(example, tokenizer) == ["<|im_end|>"]
    assert tokenizer.decode(example.input_ids) == "a<|im_end|>b <|im_start|>c<|im_end|>"
    assert learned(example, tokenizer) == " <|im_start|>c<|im_end|>"
    assert example.notes == (
        f"'<|im_end|>', '<|im_start|>' in its text {SPELLED}; "
        "a conversation rendered already belongs in 'messages' or 'text'",
    )


def test_control_tokens_in_a_text_keep_their_meaning(tokenizer):
    rendered = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    example = tokenize(Record("text", text=rendered), tokenizer)
    assert example.input_ids == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert example.notes == (
        "already ends in '<|im_end|>', gets no second end",
        "'<|im_start|>', '<|im_end|>' in its text kept as control tokens",
    )


@pytest.mark.parametrize("tail", ["<|im_end|>", "<|im_end|>\n", " <|im_end|> <|im_end|>\n "])
@pytest.mark.parametrize("kind", ["messages", "completion"])
def test_an_answer_that_ends_itself_gets_no_second_end(tokenizer, kind, tail):
    if kind == "messages":
        record = chat("a", "b" + tail)
    else:
        record = Record("completion", prompt="a", completion="b" + tail)
    example = tokenize(record, tokenizer)
    assert learned(example, tokenizer).replace(" ", "") == "b<|im_end|>"
    assert example.notes == ("already ends in '<|im_end|>', gets no second end",)


def test_a_completion_may_end_in_the_end_of_a_turn():
    tokenizer = make_byte_level(templates.PHI3, "</s>")
    record = Record("completion", prompt="a", completion="b<|end|>\n")
    assert learned(tokenize(record, tokenizer), tokenizer) == "b<|end|>"
    record = Record("completion", prompt="a", completion="b<|end|></s>")
    assert learned(tokenize(record, tokenizer), tokenizer) == "b<|end|></s>"


def test_an_end_that_the_template_does_not_write_stays():
    tokenizer = make_byte_level(templates.PLAIN, "</s>")
    example = tokenize(chat("a</s>", "b</s>c</s>"), tokenizer)
    assert learned(example, tokenizer) == "b</s>c</s>\n\n"
    assert controls(example, tokenizer) == ["</s>"]


def test_nothing_but_an_end_is_no_answer(tokenizer):
    rows = [{"prompt": "a", "completion": "<|im_end|>"}, {"prompt": "a", "completion": "b"}]
    assert [drop.origin for drop in prepare(rows, tokenizer).dropped] == ["record:0"]


def test_a_beginning_that_the_text_spells_is_not_doubled():
    tokenizer = make_byte_level(writes_bos=True)
    example = tokenize(Record("completion", prompt="<s>a<s>", completion="b"), tokenizer)
    assert tokenizer.decode(example.input_ids) == "<s>a<s>b<|im_end|>"
    assert controls(example, tokenizer) == ["<s>", "<|im_end|>"]


def with_added(*texts: str, **options):
    tokenizer = make_byte_level(
        "{% for m in messages %}<turn>{{ m['content'] }}<done>{% endfor %}"
        "{% if add_generation_prompt %}<turn>{% endif %}",
        "</s>",
    )
    added = [AddedToken(text, special=False, normalized=False, **options) for text in texts]
    tokenizer.add_tokens(added)
    return tokenizer


def test_added_tokens_around_a_turn_are_control_tokens_and_others_are_not():
    tokenizer = with_added("<turn>", "<done>", "<think>")
    example = tokenize(chat("a<done>b<think>", "<think>c<turn>d"), tokenizer)
    assert controls(example, tokenizer) == ["<turn>", "<done>"] * 2
    think = tokenizer.convert_tokens_to_ids("<think>")
    assert example.input_ids.count(think) == 2
    assert (
        tokenizer.decode(example.input_ids)
        == "<turn>a<done>b<think><done><turn><think>c<turn>d<done>"
    )


def test_control_tokens_that_swallow_white_space_still_do():
    tokenizer = with_added("<turn>", "<done>", lstrip=True, rstrip=True)
    plain = tokenize(chat(" a b ", "c"), tokenizer)
    spelled = tokenize(chat(" a </s> b ", "c"), tokenizer)
    assert tokenizer.decode(plain.input_ids) == "<turn>a b<done><turn>c<done>"
    assert tokenizer.decode(spelled.input_ids) == "<turn>a </s> b<done><turn>c<done>"
    assert controls(spelled, tokenizer) == controls(plain, tokenizer)


def test_a_slow_tokenizer():
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    )
    example = tokenize(chat("a</s>b", "c<extra_id_0>é"), tokenizer)
    assert controls(example, tokenizer) == ["</s>", "</s>"]
    assert tokenizer.decode(example.input_ids) == "user: a</s>b</s>assistant: c<extra_id_0>é</s>"


def test_a_tokenizer_that_prefixes_the_first_word_only():
    tokenizer = make_first_prefixing(templates.LLAMA2)
    example = tokenize(chat("Is </s> it?", "Yes </s> it is."), tokenizer)
    assert controls(example, tokenizer) == ["<s>", "</s>"]
    assert (
        tokenizer.decode(example.input_ids) == "<s>[INST] Is </s> it? [/INST] Yes </s> it is. </s>"
    )


def test_a_tokenizer_that_prefixes_every_piece():
    tokenizer = make_space_prefixing(templates.LLAMA2)
    example = tokenize(chat("What </s> is?", "Paris </s> is."), tokenizer)
    assert controls(example, tokenizer) == ["<s>", "</s>"]
    assert learned(example, tokenizer).startswith("Paris ")


def test_text_that_can_only_be_a_control_token_is_refused():
    """Words are the tokens, and '[END]' is one of them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[END]": 0, "[UNK]": 1, "a": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="[END]", unk_token="[UNK]"
    )
    record = Record("completion", prompt="a [END] a", completion="a", origin="pairs.csv:2")
    with pytest.raises(UserError, match=r"^pairs\.csv:2: the text holds '\[END\]', a control"):
        tokenize(record, tokenizer)
    assert tokenize(Record("text", text="a [END] a"), tokenizer).input_ids == [2, 0, 2, 0]
