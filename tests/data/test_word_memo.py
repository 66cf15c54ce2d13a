"""Tokens of words, put together: those of the whole text, for every pattern that is known."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lora_engine.data import word_memo as memos
from lora_engine.data.encode import Encoder
from lora_engine.data.word_memo import word_memo

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
STEPS = {
    "gpt2": [GPT2],
    "digits": [pre_tokenizers.Digits(individual_digits=True), GPT2],
    **{
        f"pattern {i}": [pre_tokenizers.Split(Regex(pattern), "isolated"), BYTES]
        for i, pattern in enumerate(memos._PATTERNS)
    },
    "two patterns": [
        pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"),
        pre_tokenizers.Split(Regex(memos._PATTERNS[1]), "isolated"),
        BYTES,
    ],
}
CORPUS = ["The quick brown fox, it's 1234 a b. Don't! naïve über 日本 \n\n  x = f(y);\tz  "] * 30
TOKENS = ("<|end|>", "<|end|>x", "<think>")


def trained(name: str, **changed) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(**changed.get("model", {})))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(changed.get("steps") or STEPS[name])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    for token in TOKENS:
        tokenizer.add_special_tokens([AddedToken(token, **changed.get("token", {}))])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


ALL = {name: trained(name) for name in STEPS}
PIECES = st.sampled_from(
    [
        *(
            "a",
            "B",
            "word",
            "It's",
            "'s",
            "12",
            "3456",
            ".",
            ",",
            '"',
            "(",
            " ",
            "  ",
            "\n",
            "\r\n",
        ),
        *("\t", "\u00a0", "\u3000", "é", "日本", "🙂", "e\u0301", "\u2028", "\x1c", "/", "_", "<"),
        *TOKENS,
    ]
)
TEXTS = st.lists(PIECES, max_size=14).map("".join) | st.text(max_size=20)


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(list(STEPS)), text=TEXTS)
def test_tokens_are_those_of_the_whole(name, text):
    tokenizer = ALL[name]
    memo = word_memo(tokenizer.backend_tokenizer, tokenizer.added_tokens_decoder)
    assert memo is not None
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert memo.encode(text) == whole
    assert memo.encode(text) == whole  # out of what is known


@pytest.mark.parametrize(
    "changed",
    [
        {"steps": [pre_tokenizers.ByteLevel(add_prefix_space=True)]},
        {"steps": [BYTES]},
        {"steps": [pre_tokenizers.Split(Regex(r"\s+"), "isolated"), BYTES]},
        {"steps": [pre_tokenizers.Split(Regex(memos._PATTERNS[0]), "removed"), BYTES]},
        {"steps": [pre_tokenizers.Metaspace(), GPT2]},
        {"model": {"dropout": 0.1}},
        {"token": {"lstrip": True}},
        {"token": {"single_word": True}},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_what_is_not_known_to_stand_alone_is_encoded_as_a_whole(changed):
    tokenizer = trained("gpt2", **changed)
    assert word_memo(tokenizer.backend_tokenizer, tokenizer.added_tokens_decoder) is None
    assert Encoder(tokenizer)._words is None


def test_what_is_kept_is_bounded(monkeypatch):
    monkeypatch.setattr(memos, "_MOST", 3)
    tokenizer = ALL["gpt2"]
    memo = word_memo(tokenizer.backend_tokenizer, tokenizer.added_tokens_decoder)
    text = "one two three four five " + "long" * 20
    for _ in range(2):
        assert memo.encode(text) == tokenizer(text)["input_ids"]
    assert len(memo._first) + len(memo._known) == 3


def test_an_encoder_uses_it():
    tokenizer = ALL["digits"]
    encoder = Encoder(tokenizer)
    assert encoder._words is not None
    assert encoder.encode("It is<|end|> 12") == tokenizer("It is<|end|> 12")["input_ids"]
    assert encoder._words._known
