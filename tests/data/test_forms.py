"""The form of a conversation that a template takes is found by rendering it."""

import json

import pytest
from known_turns import assistant, known_tokenizer, learned, make_bytewise, user

from lora_engine.data.records import Record
from lora_engine.data.render import tokenize
from lora_engine.data.template import Undecided


def calling(how: str) -> str:
    """A template that writes calls by the expression `how` of the function f."""
    return (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
        "{% for c in m['tool_calls'] or [] %}{% set f = c['function'] %}" + how + "{% endfor %}"
        "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )


def called(arguments, **more) -> Record:
    calls = [{"type": "function", "function": {"name": "f", "arguments": arguments}}]
    answer = {"role": "assistant", "tool_calls": calls, **more}
    return Record("messages", (user("?"), answer), origin="a:1")


MAPPING, TEXT = {"in": 'a "b" é', "n": 2}, json.dumps({"in": 'a "b" é', "n": 2}, ensure_ascii=False)
SPACED = '{"in":   "a"}'


@pytest.mark.parametrize("given", [MAPPING, TEXT], ids=["mapping", "text"])
@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("{% for k, v in f['arguments'] | items %}{{ k }}={{ v }};{% endfor %}", 'in=a "b" é;n=2;'),
        ("{{ 'args: ' + f['arguments'] }}", f"args: {TEXT}"),
        ("{{ f['arguments'] | tojson }}", TEXT),
        ("{{ f | tojson }}", f'{{"name": "f", "arguments": {TEXT}}}'),
        ("{{ f['name'] }}({{ f['arguments'] }})", f"f({TEXT})"),
        (
            "{% if f['arguments'] is string %}{{ raise_exception('no') }}{% endif %}"
            "{{ f['arguments'] | tojson }}",
            TEXT,
        ),
        (
            "{% if f['arguments'] is string %}{{ f['arguments'] }}{% else %}"
            "{{ f['arguments'] | tojson }}{% endif %}",
            TEXT,
        ),
        (
            "{% set a = f['arguments'] %}{% for k in a %}{{ k }}={{ a[k] }};{% endfor %}",
            'in=a "b" é;n=2;',
        ),
    ],
    ids=["items", "adds", "json", "json-of-all", "prints", "refuses-text", "looks", "iterates"],
)
def test_arguments_go_in_the_form_that_is_written_well(given, how, expected):
    tokenizer = make_bytewise(calling(how))
    example = tokenize(called(given, content=""), tokenizer)
    assert learned(example, tokenizer) == [f"{expected}<|end|>"]


def test_arguments_stay_as_they_are_where_both_forms_are_written_well():
    how = (
        "{% if f['arguments'] is string %}{{ f['arguments'] }}{% else %}"
        "{{ f['arguments'] | tojson }}{% endif %}"
    )
    tokenizer = make_bytewise(calling(how))
    example = tokenize(called(SPACED, content=""), tokenizer)
    assert learned(example, tokenizer) == [f"{SPACED}<|end|>"]


@pytest.mark.parametrize("given", ["", None, {}, "{}"], ids=["empty", "absent", "object", "text"])
def test_no_arguments(given):
    items = "{{ f['name'] }}({% for k, v in f['arguments'] | items %}{{ k }}{% endfor %})"
    tokenizer = make_bytewise(calling(items))
    example = tokenize(called(given, content=""), tokenizer)
    assert learned(example, tokenizer) == ["f()<|end|>"]


@pytest.mark.parametrize("broken", ['{"in": ', "[1]", "Bern"])
def test_text_that_is_no_object_is_refused_by_a_template_that_needs_one(broken):
    items = "{{ f['name'] }}{% for k, v in f['arguments'] | items %}{{ k }}{% endfor %}"
    with pytest.raises(Undecided, match=r"^a:1: the chat template"):
        tokenize(called(broken, content=""), make_bytewise(calling(items)))


def test_a_call_without_content():
    adds = calling("{{ f['name'] }}").replace("{{ m['content'] }}", "{{ 'says ' + m['content'] }}")
    tokenizer = make_bytewise(adds)
    assert learned(tokenize(called({}), tokenizer), tokenizer) == ["says f<|end|>"]
    looks = "{% if m['content'] %}{{ m['content'] }}{% endif %}"
    tokenizer = make_bytewise(calling("{{ f['name'] }}").replace("{{ m['content'] }}", looks))
    assert learned(tokenize(called({}), tokenizer), tokenizer) == ["f<|end|>"]


PARTS = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo."}]
JOINS = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endif %}<|end|>{% endfor %}"
)


@pytest.mark.parametrize("content", ["Hello.", PARTS], ids=["text", "parts"])
@pytest.mark.parametrize("name", ["qwen2_5", "PARTS_ONLY", "joins", "lfm2"])
def test_contents_go_as_text_or_as_parts(name, content):
    tokenizer = make_bytewise(JOINS) if name == "joins" else known_tokenizer(name)
    messages = ({"role": "user", "content": content}, assistant(content))
    example = tokenize(Record("messages", messages), tokenizer)
    (run,) = learned(example, tokenizer)
    assert run.removeprefix("<|assistant|>") in ("Hello.<|im_end|>", "Hello.<|end|>")
    assert tokenizer.decode(example.input_ids).count("Hello.") == 2


def test_a_form_that_is_written_as_python_spells_it_is_no_way_out_of_a_refusal():
    """The template refuses the text, and would write parts as Python does."""
    template = (
        "{% for m in messages %}{% if m['content'] is string %}{{ raise_exception('no text') }}"
        "{% endif %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    )
    record = Record("messages", (user("Hi"), assistant("Yes.")), origin="a:1")
    with pytest.raises(Undecided, match="refuses this conversation: no text"):
        tokenize(record, make_bytewise(template, ("<|end|>",)))
