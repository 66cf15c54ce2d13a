"""Pairs and judged answers as examples, and batches in which they stay together."""

import io

import pytest
import torch

from lora_engine.data.batch import MISMATCHED, collate
from lora_engine.data.dataset import prepare
from lora_engine.data.inspect import report
from lora_engine.data.pairs import IDENTICAL, check_labels, cut_prompts, prompt_length
from lora_engine.data.render import Example
from lora_engine.data.show import render
from lora_engine.errors import UserError
from lora_engine.training.batches import BatchSource, fingerprint

CHAT = [{"role": "user", "content": "What is the capital of France?"}]


def pair(prompt, chosen, rejected, **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def taught(example, tokenizer):
    ids = [i for i, on in zip(example.input_ids, example.supervised, strict=True) if on]
    return tokenizer.decode(ids)


def test_each_answer_is_learned_behind_the_same_prompt(tokenizer):
    rows = [pair(CHAT, "Paris.", "Lyon, I am sure."), pair("Question: ", "yes", "no", margin=0.5)]
    chat, text = prepare(rows, tokenizer)
    (rejected,) = chat.others
    assert [chat.role, rejected.role] == ["chosen", "rejected"]
    assert taught(chat, tokenizer) == "Paris.<|im_end|>"
    assert taught(rejected, tokenizer) == "Lyon, I am sure.<|im_end|>"
    asked = prompt_length(chat)
    assert asked == prompt_length(rejected)
    assert chat.input_ids[:asked] == rejected.input_ids[:asked]
    assert text.columns == {"margin": 0.5} and not chat.columns
    assert taught(text.others[0], tokenizer) == "no<|im_end|>"


def test_turns_of_the_prompt_are_not_learned(tokenizer):
    before = [*CHAT, {"role": "assistant", "content": "Paris."}]
    prompt = [*before, {"role": "user", "content": "Sure?"}]
    (example,) = prepare([pair(prompt, "Yes.", "No.")], tokenizer)
    assert taught(example, tokenizer) == "Yes.<|im_end|>"


def test_a_long_prompt_loses_its_beginning_in_both(tokenizer):
    row = pair("x y z " * 40 + "Answer:", " yes", " no, that is not so")
    (whole,) = prepare([row], tokenizer)
    (cut,) = prepare([row], tokenizer, max_length=40)
    longest = max(map(len, cut.sequences))
    assert longest == 40 and cut.truncated
    for short, long in zip(cut.sequences, whole.sequences, strict=True):
        assert taught(short, tokenizer) == taught(long, tokenizer)
        assert short.input_ids == long.input_ids[-len(short) :]
    asked = prompt_length(cut)
    assert cut.input_ids[:asked] == cut.others[0].input_ids[:asked]
    dropped = prepare([row, pair("a ", "b", "c")], tokenizer, max_length=40, on_too_long="drop")
    assert [d.reason for d in dropped.dropped] == ["longer than max_length"]


def test_an_answer_longer_than_the_limit_keeps_its_first_tokens():
    long = Example(list(range(10)), [False] * 3 + [True] * 7)
    short = Example([0, 1, 2, 9], [False] * 3 + [True])
    first, second = cut_prompts([long, short], 5)
    assert (first.input_ids, second.input_ids) == ([2, 3, 4, 5, 6], [2, 9])
    assert first.supervised == [False] + [True] * 4


REFUSED = {
    "the same": (pair("a ", "b", "b"), IDENTICAL),
    "empty": (pair("a ", "b", " "), "the answer is empty"),
    "an empty chat": (pair(CHAT, "", "b"), "the answer is empty"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_teaches_nothing_is_dropped_and_told(name, tokenizer):
    row, reason = REFUSED[name]
    dataset = prepare([row, pair("a ", "b", "c")], tokenizer)
    assert len(dataset) == 1 and reason in dataset.dropped[0].reason


def test_prompts_alone_are_told_of(tokenizer):
    with pytest.raises(UserError, match=r"record:0: has a 'prompt' but no answer .* has 'answer'"):
        prepare([{"prompt": "2 + 2", "answer": 4}], tokenizer)


def judged(count=4):
    return [
        {
            "prompt": f"Question {i}? ",
            "completion": f"{['yes', 'no'][i % 2]} {i}",
            "label": i > 1,
        }
        for i in range(count)
    ]


def test_judged_answers_have_one_to_another_prompt_beside_them(tokenizer):
    dataset = prepare(judged(), tokenizer)
    roles = ["undesirable", "undesirable", "desirable", "desirable"]
    assert [example.role for example in dataset] == roles
    for place, example in enumerate(dataset):
        (other,) = example.others
        asked = prompt_length(example)
        assert other.role == MISMATCHED and other.input_ids[:asked] == example.input_ids[:asked]
        assert taught(other, tokenizer) == taught(dataset[place - 1], tokenizer)


def test_labels_that_are_all_one_are_refused(tokenizer):
    rows = [{**row, "label": True} for row in judged()]
    with pytest.raises(UserError, match=r"^kto: every label is true, .* label false"):
        check_labels(prepare(rows, tokenizer).examples, "kto")
    check_labels(prepare(judged(), tokenizer).examples, "kto")


@pytest.fixture
def pairs(tokenizer):
    rows = [pair(f"What is {i} + {i}, please tell me at once? ", f"{2 * i}", "?") for i in range(9)]
    return prepare(rows, tokenizer)


def test_a_pair_is_never_split(pairs):
    source = BatchSource(pairs, 150, seed=3)
    seen = []
    for batch in source.one_epoch():
        assert batch.num_tokens <= 150
        assert batch.roles == ("chosen", "rejected") * (batch.num_examples // 2)
        assert batch.origins[::2] == batch.origins[1::2]
        seen += batch.origins[::2]
    assert sorted(seen) == sorted(example.origin for example in pairs)


def test_a_pairs_prompt_is_computed_once(pairs):
    batch = collate(pairs[:1], share_prefixes=True)
    chosen, rejected = pairs[0].sequences
    asked = prompt_length(chosen)
    assert batch.num_rows == len(chosen) + len(rejected) - asked
    assert batch.parents.tolist() == [-1, 0, 0]
    assert batch.last_index.tolist() == [len(chosen) - 1, batch.num_rows - 1]
    assert batch.target_counts == (chosen.num_targets, rejected.num_targets)
    ends = batch.input_ids[batch.last_index]
    assert ends.tolist() == [chosen.input_ids[-1], rejected.input_ids[-1]]


def test_mismatched_answers_are_a_batch_of_their_own(tokenizer):
    batch = collate(prepare(judged(), tokenizer).examples)
    assert batch.roles == ("undesirable",) * 2 + ("desirable",) * 2
    assert batch.mismatched.roles == (MISMATCHED,) * 4
    assert batch.with_role("desirable") == [2, 3]


def test_columns_are_of_examples_or_of_targets():
    examples = [
        Example([1, 2, 3], [False, True, True], columns={"advantages": 2.0, "old": [0.5, 0.25]}),
        Example([4, 5], [False, True], columns={"advantages": -1.0, "old": [0.125]}),
    ]
    batch = collate(examples)
    assert batch.columns["advantages"].tolist() == [2, -1]
    assert batch.columns["old"].tolist() == [0.5, 0.25, 0.125]
    moved = batch.to("meta")
    assert moved.columns["old"].device.type == moved.last_index.device.type == "meta"
    with pytest.raises(ValueError, match="column 'old' has 1 numbers for 2 targets"):
        collate([Example([1, 2, 3], [False, True, True], columns={"old": [0.5]})])


def test_what_is_learned_besides_the_tokens_is_in_the_fingerprint(pairs):
    from dataclasses import replace

    first = pairs[0]
    versions = [
        first,
        replace(first, role="rejected"),
        replace(first, columns={"margin": 1.0}),
        replace(first, others=()),
        replace(first, others=(replace(first.others[0], input_ids=first.input_ids),)),
    ]
    assert len({fingerprint([version]) for version in versions}) == len(versions)
    assert torch.equal(collate([first]).input_ids, collate(versions[2:3]).input_ids)


def test_the_batch_to_try_has_both_answers(pairs):
    batch = BatchSource(pairs, 4096, shuffle=False).first(20)
    assert batch.roles == ("chosen", "rejected")
    assert batch.num_tokens <= 20 and min(batch.target_counts) > 0


def test_the_report_shows_both_answers(pairs, tokenizer):
    from rich.console import Console

    account = report(pairs, tokenizer, num_samples=1)
    assert [sample.origin for sample in account.samples] == [
        "record:0, chosen",
        "record:0, rejected",
    ]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(render([account]))
    text = console.export_text()
    assert "9 chosen, 9 rejected" in text and "9 preference" in text
