"""Exact boundaries between what the model is given and what it learns to write."""

from itertools import groupby

import chat_templates as templates
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import make_byte_level, make_space_prefixing

from lora_engine.data.records import Record
from lora_engine.data.render import Example, tokenize
from lora_engine.errors import UserError


def chat(*texts: str, system: str | None = None) -> Record:
    """Texts of user and assistant in turn."""
    messages = [{"role": "system", "content": system}] if system is not None else []
    for index, text in enumerate(texts):
        messages.append({"role": ("user", "assistant")[index % 2], "content": text})
    return Record("messages", messages=tuple(messages), origin="chat.jsonl:1")


def supervised_runs(example: Example, tokenizer) -> list[str]:
    pairs = zip(example.input_ids, example.supervised, strict=True)
    return [
        tokenizer.decode([token for token, _ in run])
        for supervised, run in groupby(pairs, key=lambda pair: pair[1])
        if supervised
    ]


TURNS = ("Hello there", "How are you?", "  fine, \n", "Sure. ")

# name -> template, eos token, what the model learns to write in TURNS
KNOWN = {
    "chatml": (
        templates.CHATML_DEFAULT_SYSTEM,
        "<|im_end|>",
        ["How are you?<|im_end|>", "Sure. <|im_end|>"],
    ),
    "llama3": (templates.LLAMA3, "<|eot_id|>", ["How are you?<|eot_id|>", "Sure.<|eot_id|>"]),
    "llama2": (templates.LLAMA2, "</s>", [" How are you? </s>", " Sure. </s>"]),
    "qwen3": (
        templates.QWEN3,
        "<|im_end|>",
        ["How are you?<|im_end|>", "<think>\n\n</think>\n\nSure. <|im_end|>"],
    ),
    "phi3": (templates.PHI3, "</s>", ["How are you?<|end|>", "Sure. <|end|>"]),
    "thinks-aloud": (
        templates.THINKS_ALOUD,
        "<|im_end|>",
        ["How are you?<|im_end|>", "Sure. <|im_end|>"],
    ),
    "plain": (templates.PLAIN, "</s>", ["How are you?\n\n", "Sure. \n\n"]),
}


@pytest.mark.parametrize(("template", "eos", "expected"), KNOWN.values(), ids=KNOWN)
def test_chat_learns_from_exactly_the_assistants_turns(template, eos, expected):
    tokenizer = make_byte_level(template, eos)
    example = tokenize(chat(*TURNS), tokenizer)
    assert supervised_runs(example, tokenizer) == expected
    rendered = tokenizer.apply_chat_template(list(chat(*TURNS).messages), tokenize=False)
    assert tokenizer.decode(example.input_ids) == rendered


@pytest.mark.parametrize("system", [None, "You are terse."], ids=["default-system", "own-system"])
def test_tokens_before_the_answer_are_those_of_the_generation_prompt(tokenizer, system):
    record = chat("What is\n", "\n\nParis.", system=system)
    example = tokenize(record, tokenizer)
    prompt = tokenizer.apply_chat_template(
        list(record.messages[:-1]), add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert example.input_ids[: len(prompt)] == prompt
    assert example.supervised.index(True) == len(prompt)


text = st.text(
    st.one_of(st.sampled_from("ab \n.é漢🙂"), st.characters(exclude_categories=["Cs"])),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(
    turns=st.lists(st.tuples(text, text), min_size=1, max_size=4),
    system=st.none() | text,
)
def test_any_conversation_is_masked_exactly(tokenizer, turns, system):
    record = chat(*[part for turn in turns for part in turn], system=system)
    example = tokenize(record, tokenizer)
    rendered = tokenizer.apply_chat_template(list(record.messages), tokenize=False)
    assert tokenizer.decode(example.input_ids) == rendered
    learned = "".join(supervised_runs(example, tokenizer))
    assert learned == "".join(answer + "<|im_end|>" for _, answer in turns)


def test_an_answer_that_repeats_the_question_is_not_confused_with_it(tokenizer):
    example = tokenize(chat("Yes", "Yes", "Yes", "Yes"), tokenizer)
    assert supervised_runs(example, tokenizer) == ["Yes<|im_end|>"] * 2
    assert sum(example.supervised) == 2 * len(tokenizer("Yes<|im_end|>")["input_ids"])


def test_a_conversation_may_begin_with_the_assistant(tokenizer):
    record = Record("messages", messages=({"role": "assistant", "content": "Hello"},))
    assert supervised_runs(tokenize(record, tokenizer), tokenizer) == ["Hello<|im_end|>"]


def test_tool_calls_are_learned_from():
    tokenizer = make_byte_level(templates.CHATML_TOOLS)
    record = Record(
        "messages",
        messages=(
            {"role": "user", "content": "add"},
            {"role": "assistant", "content": "", "tool_calls": [{"name": "add"}]},
            {"role": "tool", "content": "3"},
            {"role": "assistant", "content": "Three"},
        ),
    )
    assert supervised_runs(tokenize(record, tokenizer), tokenizer) == [
        "\n<tool_call>add</tool_call><|im_end|>",
        "Three<|im_end|>",
    ]


def test_loss_on_all_supervises_every_token_and_changes_none(tokenizer):
    every = tokenize(chat(*TURNS), tokenizer, loss_on="all")
    assert all(every.supervised)
    assert every.input_ids == tokenize(chat(*TURNS), tokenizer).input_ids


def test_a_chat_without_an_assistant_has_no_targets(tokenizer):
    assert tokenize(chat("Hello"), tokenizer).num_targets == 0


def test_truncation_keeps_the_beginning(tokenizer):
    whole = tokenize(chat(*TURNS), tokenizer)
    cut = tokenize(chat(*TURNS), tokenizer, max_length=7)
    assert (cut.input_ids, cut.truncated) == (whole.input_ids[:7], True)
    exact = tokenize(chat(*TURNS), tokenizer, max_length=len(whole))
    assert not exact.truncated and not whole.truncated


def test_a_template_that_rewrites_the_answer_is_refused():
    tokenizer = make_byte_level(templates.NO_EXACT_MASK)
    with pytest.raises(UserError, match=r"^chat\.jsonl:1: .* writes message 2 .*loss_on: all"):
        tokenize(chat("Hello", "yes", "Hello", "no"), tokenizer)
    assert all(tokenize(chat("Hello", "yes"), tokenizer, loss_on="all").supervised)


def test_a_conversation_the_template_refuses_names_its_place():
    tokenizer = make_byte_level(templates.LLAMA2, "</s>")
    with pytest.raises(UserError, match=r"chat\.jsonl:1: .*only user and assistant roles"):
        tokenize(chat("Hello", "Yes", system="no"), tokenizer)


def test_messages_need_a_chat_template():
    with pytest.raises(UserError, match=r"chat\.jsonl:1: .*no chat template"):
        tokenize(chat("Hello", "Yes"), make_byte_level(None))


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("Answer:", " yes"), ("Answer: ", "yes"), ("a\n", "\nb"), ("", "yes"), ("def add(a", ", b)")],
    ids=["space-after", "space-before", "newlines", "no-prompt", "within-a-word"],
)
def test_completion_boundary_is_a_token_boundary(tokenizer, prompt, completion):
    record = Record("completion", prompt=prompt, completion=completion)
    example = tokenize(record, tokenizer)
    start = len(tokenizer(prompt)["input_ids"])
    assert example.input_ids[:start] == tokenizer(prompt)["input_ids"]
    assert tokenizer.decode(example.input_ids[start:]) == completion + "<|im_end|>"
    assert example.supervised == [False] * start + [True] * (len(example) - start)


def test_plain_text_is_supervised_whole_and_ends(tokenizer):
    example = tokenize(Record("text", text="Hello there"), tokenizer)
    assert tokenizer.decode(example.input_ids) == "Hello there<|im_end|>"
    assert all(example.supervised)


def test_plain_text_begins_as_the_tokenizer_begins_it():
    tokenizer = make_byte_level(writes_bos=True)
    text = tokenize(Record("text", text="Hello"), tokenizer)
    assert text.input_ids[:-1] == tokenizer("Hello")["input_ids"]
    record = Record("completion", prompt="Hello", completion=" there")
    completion = tokenize(record, tokenizer)
    assert completion.input_ids.count(tokenizer.bos_token_id) == 1
    assert completion.input_ids[0] == tokenizer.bos_token_id
    assert not completion.supervised[0]


def test_tokens_written_out_in_the_text_are_not_doubled():
    tokenizer = make_byte_level(writes_bos=True)
    example = tokenize(Record("text", text="<s>Hello<|im_end|>"), tokenizer)
    assert tokenizer.decode(example.input_ids) == "<s>Hello<|im_end|>"


def test_plain_text_needs_an_end_token():
    tokenizer = make_byte_level()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        tokenize(Record("text", text="Hello"), tokenizer)


class TestTokenizerThatPrefixesASpace:
    """Segments cannot be encoded by themselves: each would get a space of its own."""

    def test_chat(self):
        tokenizer = make_space_prefixing(templates.LLAMA2)
        record = chat("What is the capital?", "Paris.", "Thanks!", "Sure.")
        example = tokenize(record, tokenizer)
        rendered = tokenizer.apply_chat_template(list(record.messages), tokenize=False)
        assert example.input_ids == tokenizer(rendered, add_special_tokens=False)["input_ids"]
        tokens = tokenizer.convert_ids_to_tokens(example.input_ids)
        learned = [t for t, s in zip(tokens, example.supervised, strict=True) if s]
        assert "".join(learned) == "▁Paris.▁</s>▁Sure.▁</s>"

    def test_completion(self):
        tokenizer = make_space_prefixing()
        record = Record("completion", prompt="Question: no?", completion=" yes")
        example = tokenize(record, tokenizer)
        tokens = tokenizer.convert_ids_to_tokens(example.input_ids)
        learned = [t for t, s in zip(tokens, example.supervised, strict=True) if s]
        assert "".join(tokens) == "▁Question:▁no?▁yes</s>"
        assert "".join(learned) == "▁yes</s>"

    def test_a_boundary_inside_a_token_is_refused(self):
        tokenizer = make_space_prefixing()
        merged = next(
            token
            for token in tokenizer.get_vocab()
            if token.startswith("▁") and token[1:].isalpha() and len(token) > 3
        )
        record = Record("completion", prompt="no? ", completion=merged[1:], origin="pairs.csv:2")
        with pytest.raises(UserError, match=r"^pairs\.csv:2: .*merges the end of 'no\? '"):
            tokenize(record, tokenizer)
