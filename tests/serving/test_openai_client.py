"""What OpenAI's own client gets: texts that are PEFT's, streams, log-probabilities, adapters."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from running_server import Running

openai = pytest.importorskip("openai")

MESSAGES = [{"role": "user", "content": "say 3"}]
GREEDY = {"messages": MESSAGES, "max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[Any]:
    with openai.OpenAI(base_url=server.address, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def plain(models: Path) -> Any:
    """(name, prompt ids, count) -> greedy token ids and their logits, by transformers and PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(models / "tiny", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, models / "one", adapter_name="one")
    model.load_adapter(models / "two", "two")
    model.eval()

    def write(name: str, ids: list[int], count: int) -> tuple[list[int], torch.Tensor]:
        written, logits = list(ids), []
        if name != "tiny":
            model.set_adapter(name)
        with torch.no_grad():
            for _ in range(count):
                if name == "tiny":
                    with model.disable_adapter():
                        logits.append(model(input_ids=torch.tensor([written])).logits[0, -1])
                else:
                    logits.append(model(input_ids=torch.tensor([written])).logits[0, -1])
                written.append(int(logits[-1].argmax()))
        return written[len(ids) :], torch.stack(logits)

    return write


@pytest.fixture(scope="module")
def tokenizer(models: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(models / "tiny")


def chat_ids(tokenizer: Any) -> list[int]:
    return tokenizer.apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_dict=True
    ).input_ids


def spelled(tokenizer: Any, token: int) -> bytes:
    """The bytes of a token, by transformers' own table; the first five are the special ones."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    by_character = {character: byte for byte, character in bytes_to_unicode().items()}
    text = tokenizer.convert_ids_to_tokens([token])[0]
    return text.encode() if token < 5 else bytes(by_character[c] for c in text)


def until_end(ids: list[int]) -> list[int]:
    return ids[: ids.index(0)] if 0 in ids else ids


def test_the_models_are_the_adapters_and_the_base(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["one", "two", "tiny"]
    assert client.models.retrieve("one").owned_by == "lora_engine"
    with pytest.raises(openai.NotFoundError, match="there is one, two, tiny"):
        client.models.retrieve("three")


@pytest.mark.parametrize("name", ["tiny", "one", "two"])
def test_each_name_writes_what_peft_would(
    client: Any, plain: Any, tokenizer: Any, name: str
) -> None:
    answer = client.chat.completions.create(model=name, **GREEDY)
    ids = chat_ids(tokenizer)
    expected, _ = plain(name, ids, 12)
    (choice,) = answer.choices
    assert choice.message.content == tokenizer.decode(until_end(expected), skip_special_tokens=True)
    assert choice.message.role == "assistant" and answer.model == name
    assert choice.finish_reason == ("stop" if 0 in expected else "length")
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.usage.completion_tokens == len(until_end(expected)) + (0 in expected)
    assert answer.usage.total_tokens == len(ids) + answer.usage.completion_tokens


def test_the_adapters_write_differently(client: Any) -> None:
    texts = {
        client.chat.completions.create(model=name, **GREEDY).choices[0].message.content
        for name in ("tiny", "one", "two")
    }
    assert len(texts) == 3


def test_logprobs_are_the_model_s(client: Any, plain: Any, tokenizer: Any) -> None:
    answer = client.chat.completions.create(model="one", logprobs=True, top_logprobs=3, **GREEDY)
    expected, logits = plain("one", chat_ids(tokenizer), 12)
    told = answer.choices[0].logprobs.content
    assert len(told) == len(until_end(expected))
    for token, wanted, row in zip(told, expected, logits, strict=False):
        best = row.log_softmax(0).topk(3)
        assert bytes(token.bytes) == spelled(tokenizer, wanted)
        assert token.logprob == pytest.approx(best.values[0].item(), abs=1e-4)
        assert [one.logprob for one in token.top_logprobs] == pytest.approx(
            best.values.tolist(), abs=1e-4
        )
        assert token.top_logprobs[0].token == token.token
        if "\ufffd" in tokenizer.decode([wanted]):  # of a byte that is no character alone
            assert token.token == f"bytes:\\x{token.bytes[0]:02x}"
        else:
            assert token.token == tokenizer.decode([wanted])


def test_a_stream_is_the_whole_in_pieces(client: Any) -> None:
    more = {"model": "one", "logprobs": True, "top_logprobs": 2, "n": 2, "seed": 3}
    asked = {"messages": MESSAGES, "max_tokens": 20, **more}
    whole = client.chat.completions.create(**asked)
    stream = client.chat.completions.create(
        stream=True, stream_options={"include_usage": True}, **asked
    )
    texts, ends, logprobs, usage = ["", ""], [None, None], [[], []], None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            ends[choice.index] = choice.finish_reason or ends[choice.index]
            if choice.logprobs is not None:
                logprobs[choice.index] += choice.logprobs.content
    assert texts == [choice.message.content for choice in whole.choices]
    assert texts[0] != texts[1], "the answers of one request are drawn apart"
    assert ends == [choice.finish_reason for choice in whole.choices]
    assert logprobs == [choice.logprobs.content for choice in whole.choices]
    assert usage == whole.usage


def test_a_seed_is_a_text_and_without_one_it_is_another(client: Any) -> None:
    def text(**more: object) -> str:
        answer = client.completions.create(model="tiny", prompt="x", max_tokens=30, **more)
        return answer.choices[0].text

    assert text(seed=5) == text(seed=5)
    assert len({text(seed=5), text(seed=6), text(), text()}) == 4


def test_completions_of_texts_and_of_tokens(client: Any, plain: Any, tokenizer: Any) -> None:
    ids = [tokenizer(text).input_ids for text in ("say", "3")]
    asked = {"model": "two", "max_tokens": 6, "temperature": 0}
    expected = [
        tokenizer.decode(until_end(plain("two", row, 6)[0]), skip_special_tokens=True)
        for row in ids
    ]
    for prompt in (["say", "3"], ids):
        answer = client.completions.create(prompt=prompt, n=2, **asked)
        assert [choice.text for choice in answer.choices] == [t for t in expected for _ in range(2)]
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    for prompt in ("say", ids[0]):
        answer = client.completions.create(prompt=prompt, **asked)
        assert [choice.text for choice in answer.choices] == expected[:1]
    assert (
        len(client.completions.create(model="two", prompt="x", temperature=0).choices[0].text) <= 16
    )


def test_completions_tell_logprobs_and_stream_them(client: Any) -> None:
    asked = {"model": "one", "prompt": "say", "max_tokens": 8, "temperature": 0, "logprobs": 2}
    whole = client.completions.create(**asked).choices[0]
    told = whole.logprobs
    count = len(told.tokens)
    assert count == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset)
    assert told.text_offset[0] == 0 and told.text_offset == sorted(told.text_offset)
    for token, logprob, likeliest in zip(
        told.tokens, told.token_logprobs, told.top_logprobs, strict=True
    ):
        assert likeliest[token] == logprob == max(likeliest.values())
    text, offsets, tokens, end = "", [], [], None
    for chunk in client.completions.create(stream=True, **asked):
        text += chunk.choices[0].text
        end = chunk.choices[0].finish_reason or end
        if chunk.choices[0].logprobs is not None:
            offsets += chunk.choices[0].logprobs.text_offset
            tokens += chunk.choices[0].logprobs.tokens
    assert (text, end) == (whole.text, whole.finish_reason)
    assert (offsets, tokens) == (told.text_offset, told.tokens)
    none = client.completions.create(**{**asked, "logprobs": 0}).choices[0].logprobs
    assert none.token_logprobs == told.token_logprobs and none.top_logprobs is None


@pytest.mark.parametrize("prompt", ["say it", [3, 60, 61, 250, 9]], ids=["text", "tokens"])
def test_an_echo_is_the_prompt_with_its_logprobs(
    client: Any, plain: Any, tokenizer: Any, prompt: Any
) -> None:
    """The way in which lm-evaluation-harness asks servers for what a text's tokens are worth."""
    ids = tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt
    text = prompt if isinstance(prompt, str) else tokenizer.decode(ids)
    asked = {"model": "two", "prompt": prompt, "temperature": 0, "echo": True, "logprobs": 2}
    written = client.completions.create(**{**asked, "echo": False}, max_tokens=3).choices[0]
    answer = client.completions.create(**asked, max_tokens=3)
    (choice,) = answer.choices
    assert choice.text == text + written.text
    assert answer.usage.prompt_tokens == len(ids) and answer.usage.completion_tokens <= 3
    told, count = choice.logprobs, len(ids)
    assert told.tokens[count:] == written.logprobs.tokens
    assert told.token_logprobs[count:] == written.logprobs.token_logprobs
    assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
    assert told.text_offset[0] == 0 and told.text_offset[count] == len(text)
    for end in range(1, count):
        logprobs = plain("two", ids[:end], 1)[1][0].log_softmax(0)
        assert told.token_logprobs[end] == pytest.approx(float(logprobs[ids[end]]), abs=1e-4)
        best = sorted(told.top_logprobs[end].values(), reverse=True)
        assert best == pytest.approx(logprobs.topk(2).values.tolist(), abs=1e-4)
    alone = client.completions.create(**asked, max_tokens=0)
    assert alone.choices[0].text == text and alone.choices[0].finish_reason == "length"
    assert alone.choices[0].logprobs.token_logprobs == told.token_logprobs[:count]
    assert alone.usage.completion_tokens == 0


def test_echoes_of_many_prompts_and_in_streams(client: Any) -> None:
    asked = {"model": "one", "prompt": ["say", "3"], "n": 2, "max_tokens": 4, "seed": 1}
    plain = client.completions.create(**asked).choices
    echoed = client.completions.create(**asked, echo=True).choices
    assert [c.text for c in echoed] == [
        begin + c.text for begin, c in zip(["say", "say", "3", "3"], plain, strict=True)
    ]
    assert all(choice.logprobs is None for choice in echoed)
    told = client.completions.create(**asked, echo=True, logprobs=1).choices
    texts, tokens = [""] * 4, [[] for _ in range(4)]
    for chunk in client.completions.create(**asked, echo=True, logprobs=1, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens if choice.logprobs else []
    assert texts == [choice.text for choice in echoed]
    assert tokens == [choice.logprobs.tokens for choice in told]


def test_penalties_are_of_what_is_written(client: Any, plain: Any, tokenizer: Any) -> None:
    """A greedy text with them, by the definition."""
    ids = chat_ids(tokenizer)
    expected: list[int] = []
    for _ in range(12):
        scores = plain("one", [*ids, *expected], 1)[1][0]
        for token in set(expected):
            scores[token] -= 0.5 + 0.75 * expected.count(token)
        expected.append(int(scores.argmax()))
    answer = client.chat.completions.create(
        model="one", presence_penalty=0.5, frequency_penalty=0.75, **GREEDY
    )
    text = answer.choices[0].message.content
    assert text == tokenizer.decode(until_end(expected), skip_special_tokens=True)
    assert text != client.chat.completions.create(model="one", **GREEDY).choices[0].message.content


def test_the_end_token_ends_an_answer_and_is_not_told(client: Any) -> None:
    answer = client.completions.create(
        model="tiny", prompt="x", max_tokens=60, n=64, seed=0, logprobs=0
    )
    ended = [choice for choice in answer.choices if choice.finish_reason == "stop"]
    assert ended, "of 3,840 tokens drawn from 263, none was the one that ends"
    assert all("<end>" not in choice.logprobs.tokens for choice in answer.choices)
    told = sum(len(choice.logprobs.tokens) for choice in answer.choices)
    assert answer.usage.completion_tokens == told + len(ended)


def test_a_stop_text_ends_an_answer(client: Any) -> None:
    whole = client.completions.create(model="one", prompt="say", max_tokens=12, temperature=0)
    text = whole.choices[0].text
    assert len(text) > 4
    cut = client.completions.create(
        model="one", prompt="say", max_tokens=12, temperature=0, stop=["never so", text[3:5]]
    ).choices[0]
    assert (cut.text, cut.finish_reason) == (text[: text.index(text[3:5])], "stop")


def test_an_error_is_the_client_s_own(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature") as caught:
        client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=3)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="more than the 512") as caught:
        client.completions.create(model="tiny", prompt="x" * 600)
    assert caught.value.code == "context_length_exceeded"
