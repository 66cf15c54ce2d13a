"""`data.columns` and `data.template`: the user's own columns as a known format."""

import pytest

from lora_engine.data.formats.columns import Layout, fill, look_up
from lora_engine.data.formats.recognise import FIELDS, recognise
from lora_engine.errors import UserError

ROW = {"frage": "Wer?", "lage": "Bern", "antwort": "Ich.", "note": 3, "qa": {"a": ["x", "y"]}}


def asked(text: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]


def test_columns_name_what_is_what():
    chat = recognise(ROW, Layout(columns={"user": "frage", "assistant": "antwort"}))
    assert (chat.format, chat.fields["messages"]) == ("turn", asked("Wer?", "Ich."))
    assert chat.ignored == ("lage", "note", "qa")
    pair = recognise(ROW, Layout(columns={"prompt": "frage", "completion": "antwort"}))
    assert pair.fields == {"prompt": "Wer?", "completion": "Ich."}
    nested = recognise(ROW, Layout(columns={"text": "qa.a.1"}))
    assert nested.fields == {"text": "y"} and "qa" not in nested.ignored


def test_a_template_writes_what_the_user_says():
    row = {"question": "Who?", "context": "Bern", "answer": "Me."}
    read = recognise(row, Layout(template="{question}\n{context}"))
    assert read.fields["messages"] == asked("Who?\nBern", "Me.")
    assert read.ignored == ()
    plain = recognise(row, Layout("prompt-completion", template="Q: {question} A:"))
    assert plain.fields == {"prompt": "Q: Who? A:", "completion": "Me."}
    text = recognise(row, Layout("text", template="{{{question}}} {answer}"))
    assert text.fields == {"text": "{Who?} Me."}


def test_templates_of_several_fields():
    layout = Layout(template={"prompt": "{frage} ({lage})", "completion": " {note}"})
    assert recognise(ROW, layout).fields == {"prompt": "Wer? (Bern)", "completion": " 3"}
    system = Layout(
        columns={"assistant": "antwort"}, template={"user": "{frage}", "system": "{lage}"}
    )
    assert recognise(ROW, system).fields["messages"] == [
        {"role": "system", "content": "Bern"},
        *asked("Wer?", "Ich."),
    ]


def test_the_answer_of_a_template_has_to_be_told():
    with pytest.raises(UserError, match=r"which column answers data.template.* none is called so"):
        recognise(ROW, Layout(template="{frage}"))
    two = {"q": "a", "answer": "b", "output": "c"}
    with pytest.raises(UserError, match=r"has 'answer' and 'output'; say data.columns"):
        recognise(two, Layout(template="{q}"))
    read = recognise(ROW, Layout(template="{frage}", columns={"assistant": "antwort"}))
    assert read.fields["messages"] == asked("Wer?", "Ich.")


def test_a_column_that_no_format_reads_beside_the_others():
    layout = Layout(columns={"user": "frage", "assistant": "antwort", "label": "lage"})
    with pytest.raises(UserError, match=r"data.columns names 'label', which records of the format"):
        recognise(ROW, layout)


def test_filling_a_template():
    assert fill("{a}{b}{c}", {"a": "x", "b": 2.5, "c": None}) == "x2.5"
    with pytest.raises(UserError, match=r"names the column 'questio', .*did you mean question\?"):
        fill("{questio}", {"question": "a"})
    with pytest.raises(UserError, match=r"column 'a' must be text, got a list"):
        fill("{a}", {"a": ["b"]})


def test_looking_up_a_column():
    row = {"a.b": 1, "a": {"b": 2, "c": [{"d": 3}]}}
    assert look_up(row, "a.b") == 1  # a column of that very name first
    assert look_up(row, "a.c.0.d") == 3
    assert look_up(row, "a.c.1.d") is None and look_up(row, "x") is None


def test_a_layout_is_checked_before_any_work():
    for layout, message in (
        (Layout(columns={"usr": "a"}), "columns: 'usr' is no field of any format; did you mean"),
        (Layout(template={"user": "hello"}), "template: names no column"),
        (Layout(template={"label": "{a}"}), "template: makes 'label', expected one of text"),
        (Layout(columns={"user": "a"}, template="{b}"), "give 'user' either in columns or in"),
    ):
        with pytest.raises(UserError, match=message):
            layout.check(FIELDS)
    Layout("alpaca", {"instruction": "a"}).check(FIELDS)
