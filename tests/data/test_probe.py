"""The shipped probe: what it holds, that training data do not, and how a tokenizer gets it."""

import json
from importlib import resources

import pytest

from lora_engine.data.docstrings import docstring_records
from lora_engine.data.probe import shipped_probe
from lora_engine.data.probe_source import probe_records


def shipped() -> list[dict[str, str]]:
    text = resources.files("lora_engine.data").joinpath("probe.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_it_holds_texts_and_questions_each_once():
    texts = [record["text"] for record in shipped() if "text" in record]
    questions = [record["question"] for record in shipped() if "question" in record]
    assert (len(texts), len(questions)) == (24, 48)
    assert len(set(texts)) == 24 and len(set(questions)) == 48
    assert all(350 <= len(text) < 650 for text in texts)


@pytest.mark.slow
def test_the_demo_does_not_train_on_its_answers():
    learned = {record.messages[-1]["content"] for record in docstring_records()}
    answers = {record["answer"] for record in shipped() if "answer" in record}
    assert len(answers & learned) <= 2  # what a Python file says in the same words


def test_what_makes_it_makes_such_records_of_any_python():
    made = list(probe_records())
    assert [sorted(record) for record in made] == [sorted(record) for record in shipped()]


def test_its_licence_comes_with_it():
    licence = resources.files("lora_engine.data").joinpath("probe_licence.txt")
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in licence.read_text(encoding="utf-8")


@pytest.mark.parametrize("chats", [True, False], ids=["chats", "plain text"])
def test_questions_are_chats_where_there_is_a_template(tokenizer, chats, monkeypatch):
    if not chats:
        monkeypatch.setattr(tokenizer, "chat_template", None)  # the tokenizer is the session's
    probe = shipped_probe(tokenizer)
    assert len(probe) == 72 and not probe.dropped
    example = probe[24]
    learned = [i for i, own in zip(example.input_ids, example.supervised, strict=True) if own]
    assert tokenizer.decode(learned).startswith(shipped()[24]["answer"] if chats else " Base class")
    whole = tokenizer.decode(example.input_ids)
    assert shipped()[24]["question"] in whole
    assert whole.startswith("Question: ") != chats


def test_a_template_that_refuses_leaves_the_texts(tokenizer, monkeypatch):
    refusing = "{{ raise_exception('no chats here') }}"
    monkeypatch.setattr(tokenizer, "chat_template", refusing)
    assert len(shipped_probe(tokenizer)) == 24
