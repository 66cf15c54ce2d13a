"""Chats of a shape that was seen: the same is learned of them, in fewer renderings."""

import pytest
from known_turns import SHAPES, known_tokenizer, learned, make_bytewise

from lora_engine.data import chat
from lora_engine.data.encode import Encoder
from lora_engine.data.records import Record
from lora_engine.data.render import tokenize
from lora_engine.data.template import Undecided

BEGIN = "{% for m in messages %}<|{{ m['role'] }}|>"
END = "{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
PLAIN = BEGIN + END
TOKENS = ("<|user|>", "<|assistant|>", "<|end|>")


def record(*said: str, **more) -> Record:
    roles = ("user", "assistant") * len(said)
    messages = tuple({"role": r, "content": s} for r, s in zip(roles, said, strict=False))
    return Record("messages", messages, origin="a:1", **more)


@pytest.fixture
def found(monkeypatch):
    """How many chats were looked at by rendering, each."""
    counted = []
    looking = chat.Chat._found

    def spy(self, messages, *rest):
        counted.append([message["content"] for message in messages])
        return looking(self, messages, *rest)

    monkeypatch.setattr(chat.Chat, "_found", spy)
    return counted


def test_the_third_chat_of_a_shape_is_not_looked_at(found):
    tokenizer = make_bytewise(PLAIN, TOKENS)
    encoder = Encoder(tokenizer)
    texts = [("Hi", "Yes."), ("a b", "<b>c</b>"), ("x" * 50, "y\n\nz"), ("7", "{{ 8 }}")]
    for said in texts:
        example = tokenize(record(*said), tokenizer, encoder=encoder)
        assert learned(example, tokenizer) == [f"{said[1]}<|end|>"]
    assert len(found) == 2
    others = [
        ("Hi", "Yes.", "Bye", "No."),  # another shape
        ("Hi ", "Yes."),  # white space, which a template may strip
        ("Hi", ""),
        ("Hi", "<|end|>"),  # what spells a control token
        ("Hi", "<think>a</think>b"),
    ]
    for said in others:
        tokenize(record(*said), tokenizer, encoder=encoder)
    assert len(found) == 2 + len(others)
    example = tokenize(record("Hi", "Yes.", message_weights=(1, 0.5)), tokenizer, encoder=encoder)
    assert example.columns["weight"] == [0.5] * 5 and len(found) == 3 + len(others)


@pytest.mark.parametrize(
    ("template", "said", "expected"),
    [
        # the whole depends on a text
        (BEGIN + "{% if 'loud' in m['content'] %}!{% endif %}" + END, "loud", "!loud<|end|>"),
        # only what the generation prompt writes does
        (
            BEGIN
            + "{% if m['role'] == 'assistant' %}>{% endif %}"
            + END.replace(
                "<|assistant|>{% endif %}",
                "<|assistant|>{% if 'q' in messages[0]['content'] %}>{% endif %}{% endif %}",
            ),
            "Yes.",
            "Yes.<|end|>",
        ),
    ],
)
def test_a_template_that_looks_at_texts_is_followed(template, said, expected):
    tokenizer = make_bytewise(template, TOKENS)
    encoder = Encoder(tokenizer)
    for _ in range(3):
        tokenize(record("Hi", "Yes."), tokenizer, encoder=encoder)
    asked = record("q" if expected == "Yes.<|end|>" else "Hi", said)
    kept, anew = (
        learned(tokenize(asked, tokenizer, encoder=e), tokenizer)
        for e in (encoder, Encoder(tokenizer))
    )
    assert kept == anew == [expected]


def test_a_template_that_fails_on_a_text_is_refused_as_ever():
    failing = "{% if 'bad' in messages[0]['content'] %}{{ raise_exception('no') }}{% endif %}"
    tokenizer = make_bytewise(failing + PLAIN, TOKENS)
    encoder = Encoder(tokenizer)
    for _ in range(3):
        tokenize(record("Hi", "Yes."), tokenizer, encoder=encoder)
    with pytest.raises(Undecided, match="refuses this conversation: no"):
        tokenize(record("bad", "Yes."), tokenizer, encoder=encoder)


@pytest.mark.parametrize(
    "name",
    [
        *("qwen2_5", "qwen3", "qwen3_5_think", "qwen3_training", "llama3", "llama3_1", "gemma3"),
        *("gemma4_v5", "glm4moe", "gptoss", "gptoss_training", "deepseekv3", "phi3_training"),
        *("cohere2", "nemotron_3_nano", "lfm2_v2", "MISTRAL", "SMOLLM3", "PARTS_ONLY"),
    ],
)
def test_known_templates_learn_the_same_with_a_plan(name, found):
    """Four chats of each shape with other texts: the last two by a plan, if there is one."""
    tokenizer = known_tokenizer(name)
    encoder = Encoder(tokenizer)
    for shape in ("turns", "system", "waits"):
        for word in ("Hello", "Good day", "7", "naïve"):
            messages = tuple(
                {**m, "content": m["content"].replace("Hello", word)} for m in SHAPES[shape]
            )
            own = Record("messages", messages, origin="a:1")
            try:
                expected = tokenize(own, tokenizer)
            except Undecided:
                with pytest.raises(Undecided):
                    tokenize(own, tokenizer, encoder=encoder)
                continue
            assert tokenize(own, tokenizer, encoder=encoder) == expected
