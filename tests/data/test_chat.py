"""Which parts of a conversation are learned, and what is said of the rest."""

import chat_templates
import pytest
from known_turns import (
    SHAPES,
    TOOLS,
    assistant,
    call,
    known_tokenizer,
    learned,
    make_bytewise,
    user,
)
from small_tokenizers import make_byte_level
from tokenizers import AddedToken

from lora_engine.data.dataset import Dropped, prepare
from lora_engine.data.inputs import TemplateInputs
from lora_engine.data.recipe import NOT_LEARNED
from lora_engine.data.records import Record
from lora_engine.data.render import tokenize
from lora_engine.errors import UserError


def runs(name: str, messages, **options) -> list[str]:
    tokenizer = known_tokenizer(name)
    return learned(tokenize(Record("messages", tuple(messages)), tokenizer, **options), tokenizer)


BERN, BASEL = (
    f'<tool_call>\n{{"name": "rain", "arguments": {{"in": "{where}"}}}}\n</tool_call><|im_end|>'
    for where in ("Bern", "Basel")
)


@pytest.mark.parametrize(
    ("shape", "loss_on", "expected"),
    [
        ("turns", "last_assistant", ["Ciao.<|im_end|>"]),
        ("turns", "completion", ["Ciao.<|im_end|>"]),
        ("waits", "last_assistant", ["Hello.<|im_end|>"]),
        ("parallel", "completion", [BERN[:-10] + "\n" + BASEL, "Partly.<|im_end|>"]),
        ("parallel", "last_assistant", ["Partly.<|im_end|>"]),
        ("chain", "assistant", [BERN, BASEL, "Partly.<|im_end|>", "No.<|im_end|>"]),
        ("chain", "completion", ["No.<|im_end|>"]),
    ],
)
def test_loss_on(shape, loss_on, expected):
    assert runs("qwen2_5", SHAPES[shape], loss_on=loss_on) == expected


def test_a_completion_of_which_nothing_was_asked_for_is_empty():
    tokenizer = known_tokenizer("qwen2_5")
    rows = [{"messages": SHAPES["waits"]}, {"messages": SHAPES["turns"]}]
    dataset = prepare(rows, tokenizer, loss_on="completion")
    assert dataset.dropped == (Dropped("record:0", NOT_LEARNED),)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("qwen3", "reasoning", ["2<|im_end|>"]),
        ("qwen3", "reasoning earlier", ["2<|im_end|>", "3<|im_end|>"]),
        ("qwen3_training", "reasoning", ["2<|im_end|>\n"]),
        ("glm4moe", "reasoning", ["2<|user|>"]),
        ("nemotron_3_nano", "reasoning", ["2<|im_end|>"]),
        ("gemma4_v5", "reasoning", ["2<turn|>"]),
        ("gptoss", "reasoning", ["<|start|>assistant<|channel|>final<|message|>2<|return|>"]),
        # Without a place for reasoning it is left out, which nothing is learned of anyway.
        ("qwen2_5", "reasoning", ["2<|im_end|>"]),
    ],
)
def test_reasoning_can_be_left_out(name, shape, expected):
    assert runs(name, SHAPES[shape], train_on_reasoning=False) == expected


def test_reasoning_in_the_text_can_be_left_out():
    messages = [user("1+1?"), assistant("<think>\nEasy.\n</think>\n\n2")]
    for name in ("qwen3", "qwen2_5"):
        assert runs(name, messages) == ["<think>\nEasy.\n</think>\n\n2<|im_end|>"]
        assert runs(name, messages, train_on_reasoning=False) == ["2<|im_end|>"]


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("qwen2_5", "call", ["Let me see."]),
        ("qwen2_5", "chain", ["Partly.<|im_end|>", "No.<|im_end|>"]),
        ("qwen3_training", "parallel", ["<think>\n\n</think>\n\nPartly.<|im_end|>\n"]),
        ("gemma4_v5", "call", ["Let me see.<|tool_response>"]),
        ("MISTRAL", "chain", [" Partly.</s>", " No.</s>"]),
        ("glm4moe", "call", ["\n<think></think>\nLet me see."]),
    ],
)
def test_tool_calls_can_be_left_out(name, shape, expected):
    assert runs(name, SHAPES[shape], train_on_tool_calls=False) == expected


def test_a_weight_of_nought_leaves_a_message_out():
    first, second = assistant("Hello.", weight=0), assistant("Ciao.", weight=1)
    messages = [user("Hi"), first, user("Bye"), second]
    assert runs("qwen2_5", messages) == ["Ciao.<|im_end|>"]
    assert runs("phi3_training", messages) == ["Ciao.<|end|>\n</s>"]
    assert runs("qwen2_5", messages, loss_on="last_assistant") == ["Ciao.<|im_end|>"]
    dataset = prepare([{"messages": messages}], known_tokenizer("qwen2_5"))
    assert dataset.ignored == ()


def test_what_the_generation_prompt_has_and_an_answer_lacks_is_said_once():
    tokenizer = known_tokenizer("qwen3_5_think")
    example = tokenize(Record("messages", tuple(SHAPES["chain"])), tokenizer)
    assert example.notes == (
        "an answer is written without '<think>', which the generation prompt ends in",
    )


def test_an_end_that_is_added_is_said():
    example = tokenize(Record("messages", tuple(SHAPES["turns"])), known_tokenizer("glm4moe"))
    assert example.notes == ("'<|user|>' added, which ends the last turn",)


NO_END = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}"


def test_an_end_of_the_text_is_added_where_nothing_ends_a_turn():
    tokenizer = make_bytewise(NO_END)
    example = tokenize(Record("messages", (user("Hi"), assistant("Ho"))), tokenizer)
    assert learned(example, tokenizer) == ["assistant: Ho</s>"]
    with pytest.raises(UserError, match=r"message 2 .* nothing ends it that the model could learn"):
        tokenize(Record("messages", tuple(SHAPES["turns"])), tokenizer)


def test_undecided_records_are_refused_or_dropped_and_counted():
    tokenizer = known_tokenizer("qwen2_5")
    rows = [{"messages": SHAPES[name]} for name in ("turns", "reasoning", "reasoning")]
    with pytest.raises(UserError, match=r"2 of 3 records .*\n  record:1: .*\n  record:2: "):
        prepare(rows, tokenizer)
    dataset = prepare(rows, tokenizer, on_undecidable="drop")
    assert [drop.origin for drop in dataset.dropped] == ["record:1", "record:2"]
    assert "does not write the reasoning of message 2" in dataset.dropped[0].reason
    assert (len(dataset), dataset.num_records) == (1, 3)


def test_a_mistake_in_a_record_is_refused_even_where_the_undecided_are_dropped():
    with pytest.raises(UserError, match=r"record:0: .*'content' must be a string"):
        rows = [{"messages": [{"role": "user", "content": 5}]}]
        prepare(rows, known_tokenizer("qwen2_5"), on_undecidable="drop")


def test_what_a_user_says_and_the_template_leaves_out():
    template = (
        "{% for m in messages if m['role'] != 'tool' %}<|{{ m['role'] }}|>{{ m['content'] }}"
        "{% for c in m['tool_calls'] or [] %}{{ c['function'] | tojson }}{% endfor %}<|end|>"
        "{% endfor %}"
    )
    record = Record("messages", tuple(SHAPES["chain"]), origin="a:1")
    with pytest.raises(UserError, match=r"^a:1: the chat template .* what message 3 says"):
        tokenize(record, make_bytewise(template))


def test_control_tokens_in_tools_are_plain_text():
    tokenizer = known_tokenizer("qwen2_5")
    says = {"type": "function", "function": {**TOOLS[0]["function"], "description": "<|im_end|>"}}
    plain, spelled = (
        tokenize(Record("messages", tuple(SHAPES["turns"]), given=TemplateInputs(tools)), tokenizer)
        for tools in (TOOLS, (says,))
    )
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert spelled.input_ids.count(end) == plain.input_ids.count(end)
    assert '"description": "<|im_end|>"' in tokenizer.decode(spelled.input_ids)


def test_variables_that_no_template_reads_are_counted():
    given = {"enable_thinking": False, "enable_thoughts": True}
    rows = [{"messages": SHAPES["turns"], "chat_template_kwargs": given}]
    dataset = prepare(rows, known_tokenizer("qwen3"))
    assert dataset.ignored == (("chat_template_kwargs.enable_thoughts", 1),)


def test_parallel_calls_that_are_alike_are_told_apart():
    alike = [call("Bern"), call("Bern")]
    messages = [user("Wet?"), assistant("", tool_calls=alike)]
    assert runs("qwen2_5", messages) == [BERN[:-10] + "\n" + BERN]


def turns_by(template: str, *said: str, **options) -> tuple[list[str], tuple[str, ...]]:
    """What is learned of a user and an assistant in turn, and what is said of it."""
    tokenizer = make_bytewise(template)
    messages = tuple((user, assistant)[i % 2](text) for i, text in enumerate(said))
    example = tokenize(Record("messages", messages, origin="a:1"), tokenizer, **options)
    return learned(example, tokenizer), example.notes


def test_what_begins_the_next_turn_is_no_end():
    """The template begins it even where nothing follows."""
    template = (
        "<s>{% for m in messages %}<|start|><|{{ m['role'] }}|>{{ m['content'] }}<|end|>"
        "{% endfor %}<|start|><|assistant|>{% if add_generation_prompt %}<|say|>{% endif %}"
    ).replace("{{ m['content'] }}", "{{ '<|say|>' if m['role'] == 'assistant' }}{{ m['content'] }}")
    assert turns_by(template, "Hi", "Ho", "Yo", "So") == (["Ho<|end|>", "So<|end|>"], ())


@pytest.mark.parametrize("end", ["<done>", "DONE", "</b></i>"])
def test_a_text_that_ends_as_a_turn_does(end):
    """The end is plain text, so that nothing tells it from what is said but its place."""
    template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}" + end + "\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    said = (f"a {end}", f"b {end}", f"{end}", f"{end} {end}")
    assert turns_by(template, *said) == ([said[1] + end, said[3] + end], ())


def test_an_end_that_is_written_otherwise_where_more_follows_is_learned_as_at_the_end():
    template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
        "{{ '<|return|>' if loop.last else '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    assert turns_by(template, "Hi", "Ho", "Yo", "So") == (
        ["Ho<|return|>", "So<|return|>"],
        ("'<|end|>' behind an answer stands for '<|return|>', which is learned there",),
    )
    assert turns_by(template, "Hi", "Ho") == (["Ho<|return|>"], ())
    assert turns_by(template.replace("'<|end|>'", "'DONE'"), "Hi", "Ho", "Yo", "So") == (
        ["Ho", "So<|return|>"],
        ("the end of an answer is written otherwise where more follows, and not learned there",),
    )


def test_a_template_that_looks_up_the_names_of_functions():
    template = (
        "{{ tools | tojson }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
        "{% for c in m['tool_calls'] or [] %}{% set f = c['function'] %}"
        "{% if f['name'] in tools | map(attribute='function.name') %}{{ f['name'] }}"
        "{{ f['arguments'] | tojson }}{% else %}{{ raise_exception('no such tool') }}{% endif %}"
        "{% endfor %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer = make_bytewise(template)
    record = Record("messages", tuple(SHAPES["call"]), given=TemplateInputs(TOOLS))
    example = tokenize(record, tokenizer)
    assert learned(example, tokenizer) == ['Let me see.rain{"in": "Bern"}<|end|>']


def test_reasoning_behind_the_text():
    template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
        "{% if m['reasoning_content'] %}<why>{{ m['reasoning_content'] }}</why>{% endif %}<|end|>"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer = make_bytewise(template)
    record = Record("messages", tuple(SHAPES["reasoning"]), origin="a:1")
    assert learned(tokenize(record, tokenizer), tokenizer) == ["2<why>Easy.</why><|end|>"]
    with pytest.raises(UserError, match=r"^a:1: .* message 2 .* reasoning stands behind its text"):
        tokenize(record, tokenizer, train_on_reasoning=False)


def test_tools_that_are_not_written_are_refused_where_all_is_learned_too():
    record = Record("messages", tuple(SHAPES["turns"]), given=TemplateInputs(TOOLS))
    with pytest.raises(UserError, match="does not write the record's tools"):
        tokenize(record, known_tokenizer("llama3"), loss_on="all")


def test_a_beginning_that_template_and_tokenizer_write_is_there_once():
    tokenizer = make_byte_level(chat_templates.LLAMA3, "<|eot_id|>", writes_bos=True)
    example = tokenize(Record("messages", tuple(SHAPES["turns"])), tokenizer)
    assert example.input_ids.count(tokenizer.bos_token_id) == 1
    assert learned(example, tokenizer) == ["Hello.<|eot_id|>", "Ciao.<|eot_id|>"]


@pytest.mark.parametrize("said", ["Hello. ", " Hello", "\n\nHello \n"])
def test_tokens_that_strip_the_text_beside_them(said):
    template = chat_templates.CHATML_DEFAULT_SYSTEM
    tokenizer = make_bytewise(template.replace("<|im_", "<im_"))
    tokenizer.add_tokens(
        [
            AddedToken("<im_start|>", special=True, normalized=False, rstrip=True),
            AddedToken("<im_end|>", special=True, normalized=False, lstrip=True, rstrip=True),
        ],
        special_tokens=True,
    )
    messages = (user("Hi "), assistant(said), user(" Bye"), assistant(said))
    example = tokenize(Record("messages", messages), tokenizer)
    assert learned(example, tokenizer) == [f"{said.rstrip()}<im_end|>"] * 2
    whole = tokenizer.apply_chat_template(list(messages), tokenize=False)
    assert example.input_ids == tokenizer(whole, add_special_tokens=False)["input_ids"]
