"""Metrics of answers: values, intervals, and what somebody's own function may give."""

import random
import sys

import numpy as np
import pytest
import torch

from lora_engine.errors import UserError
from lora_engine.evaluation.metrics import METRICS, exact_match, measure, metric_of, word_f1

SAID, MEANT = ["the cat sat", "a dog"], ["the cat is on the mat", "a dog"]


def value(name, answers, references):
    return measure(name, METRICS[name], answers, references)["value"]


def test_exact_match_and_words():
    answers, references = ["a b", "c ", "d e f"], ["a x", "c", "f e"]
    assert exact_match(answers, references) == [0, 1, 0]
    assert word_f1(answers, references) == pytest.approx([0.5, 1, 0.8])
    assert word_f1([""], [""]) == [1.0]


def test_rouge_is_rouge_score_s():
    pytest.importorskip("rouge_score")
    # Of 3 and 6 words two are shared: precision 2/3, recall 1/3; "the cat" is the one shared pair.
    assert value("rouge1", SAID, MEANT) == pytest.approx((4 / 9 + 1) / 2)
    assert value("rouge2", SAID, MEANT) == pytest.approx((2 / 7 + 1) / 2)
    assert value("rougeL", SAID, MEANT) == pytest.approx((4 / 9 + 1) / 2)


def texts(count, seed=0):
    """Answers that share more or fewer words with their references."""
    words = ["the", "a", "cat", "dog", "sat", "on", "mat", "and", "ran", "far", "away", "home"]
    drawn = random.Random(seed)
    references = [drawn.choices(words, k=drawn.randint(3, 12)) for _ in range(count)]
    kept = [[w if drawn.random() < 0.7 else drawn.choice(words) for w in r] for r in references]
    return [" ".join(a) for a in kept], [" ".join(r) for r in references]


def test_bleu_is_sacrebleu_s(capfd):
    sacrebleu = pytest.importorskip("sacrebleu")
    answers, references = texts(40)
    expected = sacrebleu.corpus_bleu(answers, [references]).score
    assert 5 < expected < 95
    found = measure("bleu", METRICS["bleu"], answers, references)
    assert found["value"] == pytest.approx(expected)
    # sacrebleu's own bootstrap draws other resamples of the same answers.
    theirs = sacrebleu.metrics.BLEU().corpus_score(answers, [references], n_bootstrap=1000)
    assert found["high"] - found["low"] == pytest.approx(2 * theirs._ci, rel=0.15)
    assert found["low"] < expected < found["high"]
    assert value("bleu", ["a dog"], ["the cat sat on the mat"]) < 5
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["exact_match", "f1"])
def test_intervals_are_those_of_the_mean_over_answers(name):
    answers, references = texts(400)
    found = measure(name, METRICS[name], answers, references)
    values = METRICS[name](answers, references)
    assert found["value"] == pytest.approx(np.mean(values))
    error = 1.96 * np.std(values) / 20
    assert found["high"] - found["low"] == pytest.approx(2 * error, rel=0.15)


def test_a_function_gives_a_number_or_one_for_each_answer():
    assert measure("m", lambda a, r: len(a) / 4, SAID, MEANT) == {"value": 0.5}
    found = measure("m", lambda a, r: [len(text) for text in a], SAID, MEANT)
    assert found == {"value": 8.0, "low": 5.0, "high": 11.0}
    assert measure("m", lambda a, r: np.array([True, False]), SAID, MEANT)["value"] == 0.5
    for wrong in ("good", None, [1.0], float("nan"), [1.0, float("inf")], [[1], [2]]):
        with pytest.raises(UserError, match=r"--metric m: gave .*expected a number, or one for"):
            measure("m", lambda a, r, wrong=wrong: wrong, SAID, MEANT)
    with pytest.raises(UserError, match="--metric m: ZeroDivisionError: division by zero; mend it"):
        measure("m", lambda a, r: 1 / 0, SAID, MEANT)


def test_a_function_is_found_in_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "metric_of_mine.py").write_text("def half(a, r): return 0.5\n")
    for name in ("metric_of_mine:half", "metric_of_mine.py:half"):
        assert measure(name, metric_of(name), SAID, MEANT) == {"value": 0.5}
    assert str(tmp_path) not in sys.path
    monkeypatch.delitem(sys.modules, "metric_of_mine")


def test_a_metric_whose_package_is_missing_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(UserError, match="rougeL needs rouge-score; run: pip install"):
        METRICS["rougeL"](["a"], ["a"])


def test_what_a_function_does_to_its_lists_is_its_own_affair():
    answers = list(SAID)
    measure("m", lambda a, r: a.clear() or r.clear() or 1.0, answers, MEANT)
    assert answers == list(SAID)


def test_a_tensor_that_needs_a_gradient_is_told_in_one_line():
    with pytest.raises(UserError, match="--metric m: gave tensor"):
        measure("m", lambda a, r: torch.ones(len(a), requires_grad=True), SAID, MEANT)
