"""Questions with choices: whose log-probabilities are compared, and rows that are none."""

import json
import math

import pytest
import tokenizers
import torch

from lora_engine.errors import UserError
from lora_engine.evaluation.choices import (
    Choice,
    Question,
    choice_difference,
    choice_examples,
    choices_by_group,
    read_questions,
    score_choices,
    summarise_choices,
)
from lora_engine.testing import byte_tokenizer, tiny_llama


def read(tmp_path, *rows, **options):
    file = tmp_path / "asked.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_questions(str(file), **options)


def row(**changed):
    return {"prompt": "2 + 2 is", "choices": ["three", "four"], "answer": 1, **changed}


@pytest.mark.parametrize(
    ("changed", "number"),
    [
        ({}, 1),
        ({"answer": "four"}, 1),
        ({"answer": "A"}, 0),
        ({"answer": "B"}, 1),
        ({"answer": "B", "choices": ["B", "A"]}, 0),
        ({"answer": "1", "choices": ["2", "3", "1"]}, 2),
    ],
    ids=["number", "text", "letter", "second letter", "a text that is a letter", "digits"],
)
def test_an_answer_is_a_choice_its_number_or_its_letter(tmp_path, changed, number):
    (question,) = read(tmp_path, row(**changed))
    assert question.answer == number and question.asked == "2 + 2 is"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"answer": 2}, "'answer' must be one of the choices"),
        ({"answer": -1}, "'answer' must be"),
        ({"answer": True}, "'answer' must be"),
        ({"answer": "five"}, "'answer' must be"),
        ({"answer": None}, "'answer' must be"),
        ({"choices": ["one"]}, "two texts or more"),
        ({"choices": "AB"}, "two texts or more"),
        ({"choices": ["a", 5]}, "texts that are not empty"),
        ({"choices": ["a", " "]}, "texts that are not empty"),
        ({"choices": ["a", "a"]}, "are the same"),
        ({"choices": ["a", "\ud83d"]}, "half a character"),
        ({"prompt": None}, "has no 'prompt', 'question' or 'messages'"),
        ({"prompt": " "}, "'prompt' is empty"),
        ({"prompt": 5}, "must be a string"),
        ({"messages": []}, "non-empty list"),
    ],
    ids=str,
)
def test_a_row_that_is_no_question_is_listed(tmp_path, changed, words):
    with pytest.raises(UserError, match=words) as caught:
        read(tmp_path, row(), row(**changed))
    assert "asked.jsonl:2" in str(caught.value)


def test_a_limit_and_no_rows(tmp_path):
    assert len(read(tmp_path, row(), row(), row(choices=5), limit=2)) == 2
    with pytest.raises(UserError, match="holds no records"):
        read(tmp_path)


@pytest.fixture(scope="module")
def model():
    return tiny_llama(vocab_size=len(byte_tokenizer())).eval()


QUESTIONS = [
    Question("2 + 2 is", ("three", "four", "a number of some size"), 1, "a"),
    Question("say it: ", ("yes", "no"), 0, "b"),
    Question(
        (
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "y"},
            {"role": "user", "content": "and?"},
        ),
        ("z", "a longer one"),
        1,
        "c",
    ),
]


def test_the_logprob_is_of_all_tokens_of_the_choice_and_of_no_others(model):
    tokenizer = byte_tokenizer()
    found = score_choices(model, QUESTIONS, choice_examples(QUESTIONS, tokenizer))
    texts = [
        [("2 + 2 is", " three<end>"), ("2 + 2 is", " four<end>")],
        [("say it: ", "yes<end>"), ("say it: ", "no<end>")],
        [("<user>x<end><assistant>y<end><user>and?<end><assistant>", "z<end>")],
    ]
    for choice, wanted in zip(found, texts, strict=True):
        for nats, (before, after) in zip(choice.nats, wanted, strict=False):
            start = len(tokenizer.encode(before))
            ids = torch.tensor([tokenizer.encode(before + after)])
            with torch.no_grad():
                logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            own = logprobs.gather(1, ids[0, 1:, None])[start - 1 :, 0]
            assert len(own) == len(tokenizer.encode(after))
            assert nats == pytest.approx(-float(own.sum()), rel=1e-5)
    for choice, question in zip(found, QUESTIONS, strict=True):
        best = min(range(len(choice.nats)), key=choice.nats.__getitem__)
        assert choice.right == (best == question.answer)
    # The tiny model's tokens are about equally likely: the shorter text is likelier, and by byte
    # the longer one, whose end token is shared by more bytes.
    assert [choice.right for choice in found] == [True, False, False]
    assert [choice.right_per_byte for choice in found] == [False, True, True]


def test_shares_groups_and_the_difference_have_intervals():
    one = [Choice(str(i), (1.0, 2.0), i % 4 != 0, i % 2 == 0) for i in range(100)]
    two = [Choice(str(i), (1.0, 2.0), i % 2 == 0, True) for i in range(100)]
    found = summarise_choices(one)
    assert (found["questions"], found["accuracy"]["value"]) == (100, 0.75)
    assert found["accuracy"]["low"] < 0.75 < found["accuracy"]["high"] < 0.9
    assert found["accuracy_per_byte"]["value"] == 0.5
    groups = choices_by_group(one, ["even" if i % 2 == 0 else "odd" for i in range(100)])
    assert groups["odd"]["accuracy"]["value"] == 1 and groups["even"]["questions"] == 50
    change = choice_difference(one, two)
    assert change["value"] == 0.25 and change["low"] < 0.25 < change["high"]
    assert math.isclose(choice_difference(one, one)["high"], 0)


def test_equal_choices_share_the_answer(model):
    """A model that knows nothing is right as often as chance is, wherever the answers stand."""
    ignorant = tiny_llama(vocab_size=len(byte_tokenizer())).eval()
    with torch.no_grad():
        ignorant.lm_head.weight.zero_()
    asked = [Question("x", ("ab", "cd", "efg"), answer, str(answer)) for answer in range(3)]
    found = score_choices(ignorant, asked, choice_examples(asked, byte_tokenizer()))
    assert [choice.right for choice in found] == [0.5, 0.5, 0]
    assert summarise_choices(found)["accuracy"]["value"] == pytest.approx(1 / 3)


def test_choices_that_a_model_cannot_tell_apart_are_refused():
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    asked = [Question("x", ("Yes", "yes"), 0, "asked.jsonl:1")]
    with pytest.raises(UserError, match=r"asked.jsonl:1: two of the 'choices' are the same in"):
        choice_examples(asked, tokenizer)
