"""What a record gives a chat template beside its messages."""

import json

import pytest
from known_turns import SHAPES, TOOLS, make_bytewise

from lora_engine.data.dataset import prepare
from lora_engine.data.inputs import NO_INPUTS, TemplateInputs, inputs_of
from lora_engine.errors import UserError

TEMPLATE = (
    "{% if tools %}TOOLS {{ tools | tojson }}{% endif %}"
    "{% if documents %}DOCUMENTS {{ documents[0]['text'] }}{% endif %}"
    "{% if mode %}MODE {{ mode }}{% endif %}"
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
DOCUMENTS = [{"title": "Weather", "text": "It rains."}]


def written(inputs=NO_INPUTS, **fields) -> str:
    tokenizer = make_bytewise(TEMPLATE)
    (example,) = prepare([{"messages": SHAPES["turns"], **fields}], tokenizer, inputs=inputs)
    return tokenizer.decode(example.input_ids)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"tools": list(TOOLS)}, "Whether it rains."),
        ({"tools": json.dumps(TOOLS)}, "Whether it rains."),
        ({"tools": [json.dumps(tool) for tool in TOOLS]}, "Whether it rains."),
        ({"documents": DOCUMENTS}, "DOCUMENTS It rains."),
        ({"chat_template_kwargs": {"mode": "deep"}}, "MODE deep"),
        ({"chat_template_kwargs": '{"mode": "deep"}'}, "MODE deep"),
        ({"tools": [], "documents": None, "chat_template_kwargs": {}}, "<|user|>Hi"),
    ],
)
def test_what_a_record_gives_reaches_the_template(fields, expected):
    assert expected in written(**fields)


def test_a_record_goes_before_the_configuration():
    configured = TemplateInputs(TOOLS, tuple(DOCUMENTS), {"mode": "deep", "other": 1})
    assert "MODE deep" in written(configured) and "DOCUMENTS It" in written(configured)
    own = written(configured, chat_template_kwargs={"mode": "flat"}, documents=[{"text": "Dry."}])
    assert "MODE flat" in own and "DOCUMENTS Dry." in own and "Whether it rains." in own


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tools": "rain"}, "'tools' is text that is not valid JSON"),
        ({"tools": 5}, "'tools' must be a list of objects"),
        ({"documents": ["a", 1]}, "'documents' .* JSON"),
        ({"chat_template_kwargs": [1]}, "'chat_template_kwargs' must be an object"),
        (
            {"chat_template_kwargs": {"tokenize": True}},
            "'chat_template_kwargs' cannot set 'tokenize'",
        ),
        ({"chat_template_kwargs": {"not a name": True}}, "'chat_template_kwargs' cannot set 'not"),
    ],
)
def test_what_is_no_input(fields, message):
    with pytest.raises(UserError, match=f"^a:1: {message}"):
        inputs_of(fields, "a:1")


def test_documents_that_are_not_written():
    tokenizer = make_bytewise(TEMPLATE.replace("documents", "papers"))
    rows = [{"messages": SHAPES["turns"], "documents": DOCUMENTS}]
    with pytest.raises(UserError, match="does not write the record's documents"):
        prepare(rows, tokenizer)


def test_records_that_differ_in_their_tools_alone_are_not_the_same():
    from lora_engine.data.records import read_records

    rows = [{"messages": SHAPES["turns"], "tools": tools} for tools in (None, list(TOOLS))]
    assert len({record.content_key() for record in read_records(rows)}) == 2
