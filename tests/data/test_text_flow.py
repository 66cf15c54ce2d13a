"""Templates that do nothing with texts but write them, told from those that may look at them."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from known_turns import known_tokenizer, make_bytewise

from lora_engine.data.inputs import TemplateInputs
from lora_engine.data.text_flow import only_writes_texts
from lora_engine.data.writing import Writing

EACH = "{% for m in messages %}<{{ m.role }}>{% endfor %}"
# What a template may hold, and whether it looks at no text.
WRITES = [
    "{{ messages[0].content }}",
    "{{ messages[-1]['content'] | trim }}",
    "{{ '<' + messages[0].get('content').strip() ~ '>' }}",
    "{% for m in messages[1:] %}{{ m.content if m.role == 'user' else '-' }}{% endfor %}",
    "{% for m in messages if m.content %}{{ loop.previtem.content if loop.previtem }}{% endfor %}",
    "{% for m in messages | reverse %}{{ m['content'] or 'nothing' }}{% endfor %}",
    "{% set a = 'x' %}{% for m in messages %}{% set a = m.content %}{{ a }}{% endfor %}{{ a }}",
    "{% set n = namespace(a='') %}{% for m in messages %}{% set n.a = n.a + m.content %}"
    "{% endfor %}{{ n.a }}{{ n.a is string }}",
    "{% set a %}[{{ messages[0].content }}]{% endset %}{{ a | trim }}",
    "{% macro f(x) %}{{ x }}{{ messages[0].content }}{% endmacro %}{{ f('y') }}",
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{{ m.content | length }}{% endif %}{% endfor %}",
    "{% for m in messages %}{% if 'tool_calls' in m or m.content == '' %}!{% endif %}{% endfor %}",
    "{% for m in messages %}{% if loop.index0 > 0 and messages | length > 1 %}{% break %}"
    "{% endif %}{{ m.content }}{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{{ tools | tojson }}{% for t in tools or [] %}{{ t.name.upper() }}{% endfor %}",
]
LOOKS = [
    "{{ messages[0].content | length }}",
    "{{ messages[0].content | upper }}",
    "{{ messages[0].content[:1] }}",
    "{{ messages[0].content.split('a')[0] }}",
    "{{ messages[0].content | tojson }}",
    "{{ messages | tojson }}",
    "{{ messages }}",
    "{{ messages[0] }}",
    "{{ messages[0].items() | list }}",
    "{{ messages[0]['values']() | list }}",
    "{{ messages[0] | items | list }}",
    "{{ messages | map(attribute='content') | join('a') | length }}",
    "{% for k in messages[0] %}{{ messages[0][k] | length }}{% endfor %}",
    "{% if 'a' in messages[0].content %}a{% endif %}",
    "{% if messages[0].content in 'abc' %}a{% endif %}",
    "{% if messages[0].content == messages[1].content %}same{% endif %}",
    "{% if messages[0] == {'role': 'user', 'content': 'a'} %}a{% endif %}",
    "{% for m in messages %}{% if loop.changed(m.content) %}new{% endif %}{% endfor %}",
    "{% for c in messages[0].content %}{{ loop.index }}{% endfor %}",
    "{% set n = namespace(a=messages[0].content) %}{{ n.a | length }}",
    "{% set n = namespace(a='') %}{% set n.a = messages[0].content %}{% set b = n %}"
    "{{ b.a | length }}",
    "{% set n = namespace(a='') %}{% set n.a = messages[0].content %}{{ n['a'] | length }}",
    "{% set a = messages[0].content %}{{ a | length }}",
    "{% set a %}{{ messages[0].content }}{% endset %}{{ a | length }}",
    "{% macro f(x) %}{{ x | length }}{% endmacro %}{{ f(messages[0].content) }}",
    "{% macro f() %}{{ messages[0].content }}{% endmacro %}{{ f() | length }}",
    "{% macro f() %}{% set a = caller() %}{{ a | length }}{% endmacro %}"
    "{% call f() %}{{ messages[0].content }}{% endcall %}",
    "{% macro f() %}{{ messages[0].content }}{% endmacro %}{% set g = f %}{{ g() | length }}",
    "{% filter upper %}{{ messages[0].content }}{% endfilter %}",
    "{{ '%s' | safe + messages[0].content }}",
    "{{ ['<'] | map('escape') | first + messages[0].content }}",
    "{% set a = [messages[0].content] %}{{ a[0] | length }}",
    "{{ {'a': messages[0].content}['a'] | length }}",
    "{{ '{:.2}'.format(messages[0].content) }}",
    "{{ '%.2s' % messages[0].content }}",
    "{{ 'abc'.replace(messages[0].content, '') }}",
    "{{ messages[0].content > '8' }}",
    "{{ dict(a=messages[0].content).a | length }}",
    "{% for m in messages if m.content | length > 3 %}{{ m.content }}{% endfor %}",
    "{{ messages[0].content if messages[0].content | length > 3 }}",
]
# What is not followed so far as to know, or not the same each time.
UNKNOWN = [
    "{{ messages[0].content * 2 }}",
    "{% set m = other %}{% set m = messages[0] if other else other %}{{ m.content }}"
    "{% if m.content is string %}{% else %}{{ messages[1].content | length }}{% endif %}",
    "{% for m in messages recursive %}{{ m.content }}{% endfor %}",
    "{{ strftime_now('%f') }}",
    "{% if messages[0].weight %}{{ messages[0].content }}{% endif %}",
    "{% not jinja",
]


@pytest.mark.parametrize("part", WRITES)
def test_what_only_writes_texts(part):
    assert only_writes_texts(EACH + part)


@pytest.mark.parametrize("part", LOOKS + UNKNOWN)
def test_what_may_look_at_texts(part):
    assert not only_writes_texts(EACH + part)


def test_a_variable_may_stand_for_a_message():
    template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}"
        "{% if m.content is string %}{% else %}{{ messages[0].content | length }}{% endif %}"
    )
    assert only_writes_texts(template)
    assert not only_writes_texts(template, ["m"])


@pytest.mark.parametrize(
    "name", ["qwen2_5", "llama3", "gemma3", "phi3_training", "qwen3_instruct_2507", "PLAIN"]
)
def test_templates_of_well_known_models_only_write_texts(name):
    assert only_writes_texts(known_tokenizer(name).chat_template)


@pytest.mark.parametrize("name", ["qwen3", "glm4moe", "gptoss", "deepseekv3", "NO_EXACT_MASK"])
def test_templates_of_others_look_at_texts(name):
    assert not only_writes_texts(known_tokenizer(name).chat_template)


MARKS = ["7182818284", "5904523536"]


def messages_of(texts, edges=""):
    roles = ("user", "assistant")
    return [{"role": r, "content": edges + t} for r, t in zip(roles, texts, strict=True)]


def writes_alike(writing: Writing, texts, edges="") -> bool:
    """Whether these texts are written as the marks are."""
    expected = writing.render(messages_of(MARKS, edges), False, None)
    for mark, text in zip(MARKS, texts, strict=True):
        expected = expected.replace(mark, text)
    return writing.render(messages_of(texts, edges), False, None) == expected


TEXTS = st.sampled_from(["a", "bad", "abc", "<b>", '"', "a a", "é🙂", "x" * 30])
PARTS = st.lists(st.sampled_from(WRITES + LOOKS), min_size=1, max_size=2)


@settings(max_examples=150, deadline=None)
@given(parts=PARTS, texts=st.tuples(TEXTS, TEXTS), edges=st.sampled_from(["", " ", "\n"]))
def test_what_only_writes_texts_writes_all_alike(parts, texts, edges):
    writing = Writing(make_bytewise(EACH + "".join(parts)), TemplateInputs(({"name": "rain"},)))
    writes = writing.only_writes_texts(None)
    assert writes is all(part in WRITES for part in parts)
    assert not writes or writes_alike(writing, texts, edges)


@pytest.mark.parametrize("part", LOOKS)
def test_what_looks_at_texts_does_not_write_all_alike(part):
    writing = Writing(make_bytewise(EACH + part), TemplateInputs())
    texts = ["a", "abc", "'<é>\"\\"]
    assert not all(writes_alike(writing, each) for each in itertools.product(texts, texts))
