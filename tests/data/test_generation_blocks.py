"""Templates that say themselves what the assistant writes."""

import pytest
from known_turns import SHAPES, assistant, learned, make_bytewise, user

from lora_engine.data.records import Record
from lora_engine.data.render import tokenize
from lora_engine.errors import UserError

BEGIN = "{% for m in messages %}{% if m['role'] == 'assistant' %}"
END = (
    "{% else %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def runs(block: str, messages=SHAPES["turns"], **options):
    tokenizer = make_bytewise(BEGIN + block + END)
    example = tokenize(Record("messages", tuple(messages), origin="a:1"), tokenizer, **options)
    whole = tokenizer.apply_chat_template(list(messages), tokenize=False)
    assert tokenizer.decode(example.input_ids) == whole
    return learned(example, tokenizer), example.notes


@pytest.mark.parametrize(
    "block",
    [
        "<|assistant|>{% generation %}{{ m['content'] }}<|end|>{% endgeneration %}",
        "<|assistant|>\n {%- generation -%}\n {{ m['content'] }}<|end|>\n {%- endgeneration -%}\n",
        "<|assistant|>{%+ generation +%}{{ m['content'] }}<|end|>{%+ endgeneration +%}",
        # what the generation prompt writes is in it
        "{% generation %}<|assistant|>{{ m['content'] }}<|end|>{% endgeneration %}",
        # set within a macro
        "{% macro say(x) %}{% generation %}{{ x }}<|end|>{% endgeneration %}{% endmacro %}"
        "<|assistant|>{{ say(m['content']) }}",
    ],
    ids=["plain", "strips", "keeps", "with-prompt", "macro"],
)
def test_a_block_is_learned_but_for_the_generation_prompt(block):
    assert runs(block) == (["Hello.<|end|>", "Ciao.<|end|>"], ())


def test_a_block_without_the_end_of_the_turn_is_followed_and_told_of():
    block = "<|assistant|>{% generation %}{{ m['content'] }}{% endgeneration %}<|end|>"
    learned_runs, notes = runs(block)
    assert learned_runs == ["Hello.", "Ciao."]
    assert notes == (
        "its {% generation %} blocks leave out '<|end|>', so the model does not learn to end a "
        "turn",
    )


def test_blocks_of_the_messages_that_are_learned():
    block = "<|assistant|>{% generation %}{{ m['content'] }}<|end|>{% endgeneration %}"
    assert runs(block, loss_on="last_assistant") == (["Ciao.<|end|>"], ())
    messages = [user("Hi"), assistant("Hello.", weight=0), user("Bye"), assistant("", weight=1)]
    assert runs(block, messages) == (["<|end|>"], ())


def test_an_answer_outside_of_blocks_is_refused():
    block = (
        "<|assistant|>{% if loop.last %}{% generation %}{{ m['content'] }}<|end|>"
        "{% endgeneration %}"
        "{% else %}{{ m['content'] }}<|end|>{% endif %}"
    )
    with pytest.raises(UserError, match=r"^a:1: no {% generation %} block .* writes message 2"):
        runs(block)
    assert runs(block, SHAPES["turns"][:2]) == (["Hello.<|end|>"], ())


def test_a_template_that_sets_what_it_reads_behind_the_block():
    block = (
        "<|assistant|>{% generation %}{% set said = m['content'] %}{{ said }}<|end|>"
        "{% endgeneration %}{{ said }}"
    )
    assert runs(block) == (["Hello.<|end|>", "Ciao.<|end|>"], ())
