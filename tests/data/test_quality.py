"""What answers are like: the same ones, refusals, scripts, words in many tokens."""

import pytest
from known_turns import known_tokenizer
from small_tokenizers import make_byte_level, make_space_prefixing

from lora_engine.data.dataset import prepare
from lora_engine.data.fit import SPLIT
from lora_engine.data.inspect import report
from lora_engine.data.quality import quality, token_texts


def pair(prompt: str, completion: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


def test_the_same_answer_to_many_prompts(tokenizer):
    rows = [pair(f"q{i}", " Yes" if i % 2 else f" {i}") for i in range(12)]
    (same,) = quality(prepare(rows, tokenizer), tokenizer).same_answers
    assert (same.text, same.count, same.origins[0]) == ("Yes<|im_end|>", 6, "record:1")
    assert not quality(prepare(rows[:4], tokenizer), tokenizer).same_answers


@pytest.mark.parametrize(
    ("said", "refuses"),
    [
        (" I'm sorry, but I can't help with that.", True),
        (" As an AI language model, I do not", True),
        ("I cannot answer this", True),
        ("Unfortunately, I am unable", True),
        (" I am sorry to hear that your dog", False),
        (" He said: I'm sorry, but no", False),
        (" I can help", False),
    ],
)
def test_refusals(tokenizer, said, refuses):
    found = quality(prepare([pair("q", said)], tokenizer), tokenizer).refusals
    assert (found is not None) == refuses
    if found is not None:
        assert (found.count, found.origins) == (1, ("record:0",))


def test_scripts_are_counted_by_letter(tokenizer):
    scripts = quality(prepare([{"text": "abc é дом 漢字 1 !"}], tokenizer), tokenizer).scripts
    counts = dict(scripts)
    assert (counts["Cyrillic"], counts["Han"]) == (3, 2) and scripts[0][0] == "Latin"


def test_words_in_many_tokens(tokenizer):
    about = quality(prepare([{"text": "Hello zyxwvuts zyxwvuts"}], tokenizer), tokenizer)
    assert [(word, times) for word, _, times in about.split_badly] == [("zyxwvuts", 2)]


def test_unknown_tokens_are_counted():
    tokenizer = make_space_prefixing()
    about = quality(prepare([{"text": "Hello 漢 there"}], tokenizer), tokenizer)
    assert about.unknown == 1


def test_tokens_as_texts_keep_characters_whole():
    tokenizer = make_byte_level(None)
    ids = tokenizer("aé漢b")["input_ids"]
    texts = token_texts(ids, tokenizer)
    assert len(texts) == len(ids) and "".join(texts) == "aé漢b"
    assert "\ufffd" not in "".join(texts)


def test_what_is_wrong_is_said_in_words(tokenizer):
    good = prepare([pair(f"question {i}", f" answer {i}") for i in range(8)], tokenizer)
    assert report(good, tokenizer).wrong() == ()
    rows = [pair("a", " b"), pair("a", " b"), pair("c", ""), pair("d", " e" * 40)]
    bad = prepare(rows, tokenizer, max_length=12)
    assert report(bad, tokenizer).wrong() == (
        "1 records are dropped",
        "1 examples are cut to max_length",
        "1 examples repeat an earlier one",
    )
    assert (
        "2 examples are also in the training data"
        in report(bad, tokenizer, train=bad).wrong()[-1:]
        + report(bad, tokenizer, train=prepare(rows[:2], tokenizer)).wrong()
    )


def test_what_is_learned_as_it_ought_to_be_is_not_wrong(tokenizer):
    texts = prepare([{"text": f"{i} words " * 30} for i in range(3)], tokenizer, max_length=20)
    account = report(texts, tokenizer)
    assert [note.text for note in account.notes] == [SPLIT] and account.wrong() == ()
    chats = [
        [{"role": "user", "content": f"a{i}"}, {"role": "assistant", "content": f"b{i}"}]
        for i in range(3)
    ]
    for name in ("glm4moe", "gptoss"):  # the next role's mark, or another token, ends a turn
        own = known_tokenizer(name)
        more = [[*chat, {"role": "user", "content": "c"}] for chat in chats]
        rows = prepare([{"messages": chat} for chat in (chats if name == "glm4moe" else more)], own)
        assert report(rows, own).notes and report(rows, own).wrong() == ()


def test_one_label_only(tokenizer):
    rows = [{**pair(f"a{i}", f" b{i}"), "label": True} for i in range(3)]
    assert report(prepare(rows, tokenizer), tokenizer).wrong() == (
        "every label is the same (desirable)",
    )
