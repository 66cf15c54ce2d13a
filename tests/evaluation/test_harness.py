"""lm-evaluation-harness on our model: its requests, and a task of its own of a few rows."""

import json

import pytest
import torch

pytest.importorskip("lm_eval")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from lora_engine.evaluation.harness import HarnessModel
from lora_engine.models.attach.accelerate import accelerate
from lora_engine.testing import byte_tokenizer, tiny_llama, with_lora

TASK = """\
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: acc}}
  - {{metric: acc_norm}}
"""
ROWS = [
    {"question": f"{i} and 1 is", "choices": [str(i + 1), str(i), "something else"], "answer": 0}
    for i in range(8)
]


@pytest.fixture(scope="module")
def model():
    made = with_lora(tiny_llama(vocab_size=len(byte_tokenizer()))).eval()
    accelerate(made)
    return made


@pytest.fixture(scope="module")
def harness(model):
    return HarnessModel(model, byte_tokenizer())


def logprobs(model, text):
    """log p of each byte of the text but its first, and whether it is the likeliest."""
    ids = torch.tensor([byte_tokenizer().encode(text)])
    with torch.no_grad():
        found = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return found.gather(1, ids[0, 1:, None])[:, 0], found.argmax(1) == ids[0, 1:]


def asked(kind, *arguments):
    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


def test_loglikelihoods_are_the_model_s(model, harness):
    pairs = [("a question", " yes"), ("a question ", "no"), ("x", " a longer one"), ("", "ab")]
    found = harness.loglikelihood(asked("loglikelihood", *pairs))
    for (context, continuation), (value, greedy) in zip(pairs, found, strict=True):
        before = context or "<end>"  # what stands before a text without one
        own, likeliest = logprobs(
            model, before.rstrip() + " " * context.endswith(" ") + continuation
        )
        count = len(continuation) + context.endswith(" ")
        assert value == pytest.approx(float(own[-count:].sum()), rel=1e-4)
        assert greedy == bool(likeliest[-count:].all())


def test_a_greedy_continuation_is_told_to_be_one(harness):
    (text,) = harness.generate_until(
        asked("generate_until", ("abc", {"until": [], "max_gen_toks": 3}))
    )
    if text.isascii() and len(text) == 3:
        assert harness.loglikelihood(asked("loglikelihood", ("abc", text)))[0][1]


def test_a_rolling_text_is_predicted_token_by_token(model, harness):
    text = "some text of no special kind"
    (found,) = harness.loglikelihood_rolling(asked("loglikelihood_rolling", (text,)))
    own, _ = logprobs(model, "<end>" + text)
    assert found == pytest.approx(float(own.sum()), rel=1e-4)
    long = text * 40  # in windows
    (found,) = harness.loglikelihood_rolling(asked("loglikelihood_rolling", (long,)))
    assert found == pytest.approx(len(long) / len(text) * float(own.sum()), rel=0.05)


def test_texts_end_where_a_task_says(harness):
    settings = {"until": [], "max_gen_toks": 12}
    (whole,) = harness.generate_until(asked("generate_until", ("x", settings)))
    assert whole == harness.generate_until(asked("generate_until", ("x", settings)))[0]
    end = whole[4:6]
    cut = harness.generate_until(asked("generate_until", ("x", {**settings, "until": [end]})))[0]
    assert cut == whole[: whole.index(end)]
    drawn = {**settings, "do_sample": True, "temperature": 1.0}
    assert harness.generate_until(asked("generate_until", ("x", drawn)))[0] != whole


def test_a_task(tmp_path, monkeypatch, model, harness):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "tiny_choice.yaml").write_text(TASK.format(data=data))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    results = lm_eval.simple_evaluate(
        model=harness, tasks=["tiny_choice"], task_manager=manager, bootstrap_iters=0
    )["results"]["tiny_choice"]
    right = right_by_byte = 0
    for row in ROWS:
        own = []
        for choice in row["choices"]:
            found, _ = logprobs(model, f"{row['question']} {choice}")
            own.append(float(found[-len(choice) - 1 :].sum()))
        right += own.index(max(own)) == row["answer"]
        by_byte = [p / len(c) for p, c in zip(own, row["choices"], strict=True)]
        right_by_byte += by_byte.index(max(by_byte)) == row["answer"]
    assert results["acc,none"] == pytest.approx(right / len(ROWS))
    assert results["acc_norm,none"] == pytest.approx(right_by_byte / len(ROWS))
