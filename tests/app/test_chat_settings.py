"""What a configuration says about the chat template and what is learned of conversations."""

import json

import pytest
from known_turns import SHAPES, TOOLS, known_tokenizer, learned, make_bytewise

from lora_engine.app.chat_settings import set_chat_template, template_inputs
from lora_engine.app.config_data import DataConfig
from lora_engine.app.finetune import prepare_data
from lora_engine.errors import UserError

SHORT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"


@pytest.fixture
def chats(tmp_path):
    """Two chats, one of which reasons and calls."""
    rows = [{"messages": SHAPES[name]} for name in ("turns", "reasoning", "call")]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepared(tokenizer, chats, **settings):
    config = DataConfig(train=str(chats), eval=str(chats), **settings)
    set_chat_template(tokenizer, config)
    return prepare_data(config, tokenizer)


def test_what_is_learned_follows_the_configuration(chats):
    tokenizer = known_tokenizer("qwen3")
    settings = {"train_on_reasoning": False, "train_on_tool_calls": False}
    for dataset in prepared(tokenizer, chats, loss_on="last_assistant", **settings):
        assert [learned(example, tokenizer) for example in dataset] == [
            ["<think>\n\n</think>\n\nCiao.<|im_end|>"],
            ["2<|im_end|>"],
            ["<think>\n\n</think>\n\nLet me see."],
        ]


def test_undecided_records_can_be_dropped(chats):
    tokenizer = known_tokenizer("llama3")
    with pytest.raises(UserError, match=r"2 of 3 records .*\n.*chats\.jsonl:2: .*reasoning"):
        prepared(tokenizer, chats)
    for dataset in prepared(tokenizer, chats, on_undecidable="drop"):
        assert (len(dataset), len(dataset.dropped)) == (1, 2)


@pytest.mark.parametrize("as_file", [True, False], ids=["file", "text"])
def test_a_template_in_place_of_the_tokenizers(tmp_path, chats, as_file):
    (tmp_path / "short.jinja").write_text(SHORT)
    template = str(tmp_path / "short.jinja") if as_file else SHORT
    tokenizer = make_bytewise("{{ 'never' }}")
    dataset, _ = prepared(tokenizer, chats, chat_template=template, on_undecidable="drop")
    assert learned(dataset[0], tokenizer) == ["<assistant>Hello.</s>", "<assistant>Ciao.</s>"]


@pytest.mark.parametrize("as_file", [True, False], ids=["file", "list"])
def test_what_all_records_are_given(tmp_path, chats, as_file):
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    tools = str(tmp_path / "tools.json") if as_file else list(TOOLS)
    tokenizer = known_tokenizer("qwen3")
    given = {"tools": tools, "chat_template_kwargs": {"enable_thinking": False}}
    dataset, _ = prepared(tokenizer, chats, **given)
    assert all("Whether it rains." in tokenizer.decode(e.input_ids) for e in dataset)
    assert learned(dataset[0], tokenizer) == ["Hello.<|im_end|>", "Ciao.<|im_end|>"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chat_template": "none.jinja"}, r"^data\.chat_template: none\.jinja cannot be read"),
        ({"tools": "none.json"}, r"^data\.tools: none\.json cannot be read"),
        ({"chat_template_kwargs": {"messages": 1}}, r"^data\.chat_template_kwargs cannot set 'mes"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    config = DataConfig(train="chats.jsonl", **settings)
    with pytest.raises(UserError, match=message):
        template_inputs(config)
        set_chat_template(make_bytewise(SHORT), config)


def test_a_file_that_holds_no_tools(tmp_path):
    (tmp_path / "tools.json").write_text("rain")
    config = DataConfig(train="chats.jsonl", tools=str(tmp_path / "tools.json"))
    with pytest.raises(UserError, match=r"^data: 'tools' is text that is not valid JSON"):
        template_inputs(config)
