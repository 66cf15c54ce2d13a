"""Continuations side by side: the model's own text, whatever is written beside them."""

from collections.abc import Iterator

import peft
import pytest
import tile_model
import torch
import transformers
from torch import nn

import lora_engine
from lora_engine import backends
from lora_engine.backends.plans import DecodingPlan
from lora_engine.errors import UserError
from lora_engine.evaluation.modes import inference
from lora_engine.generation.decoder import CachedDecoder
from lora_engine.generation.engine import Completion, Generator, Request
from lora_engine.generation.sampling import Sampling
from lora_engine.testing import byte_tokenizer

SIZES = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
}
PROMPTS = [[3, 5, 7], [11], list(range(40, 80)), [9, 8, 7, 6, 5, 4], [250, 2]]
GREEDY = Sampling(max_new_tokens=10, temperature=0, stop_tokens=())
DRAWN = Sampling(max_new_tokens=8, temperature=0.9, top_p=0.95, seed=5, stop_tokens=())
MODELS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, attention_bias=True),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES),
    "window": lambda: transformers.MistralConfig(**SIZES, sliding_window=6),
    "llama3_rope": lambda: transformers.LlamaConfig(
        **SIZES,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
}
# Models whose layers are not ours: their own calls write.
OTHERS = {
    "gpt2": lambda: transformers.GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=300),
    "dynamic_rope": lambda: transformers.LlamaConfig(
        **SIZES,
        max_position_embeddings=16,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    ),
}


def made(
    config: transformers.PretrainedConfig, *, lora: bool = True, dora: bool = False
) -> nn.Module:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():  # far from ties between the most likely tokens
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.25)
    if lora:
        settings = peft.LoraConfig(
            r=4, target_modules="all-linear", init_lora_weights=False, use_dora=dora
        )
        model = peft.get_peft_model(model, settings)
    return model.eval()


def own_text(model: nn.Module, prompt: list[int], count: int) -> list[int]:
    """The most likely tokens, each from a call about all before it."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def generated(model: nn.Module, prompt: list[int], count: int) -> list[int]:
    """What transformers' generate writes."""
    ids, options = torch.tensor([prompt]), {"do_sample": False, "eos_token_id": None}
    mask = torch.ones_like(ids)
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=count, pad_token_id=0, **options
    )
    return out[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def llama() -> Iterator[nn.Module]:
    model = made(MODELS["llama"]())
    lora_engine.accelerate(model)
    with inference(model):
        yield model


def logprobs_of(model: nn.Module, prompt: list[int], done: Completion, temperature: float):
    ids = [*prompt, *done.token_ids]
    logits = model(input_ids=torch.tensor([ids])).logits[0, len(prompt) - 1 : -1]
    chosen = torch.tensor(done.token_ids)[:, None]
    return (logits / temperature).log_softmax(-1).gather(1, chosen)[:, 0]


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_on_a_gpu_the_text_is_what_a_cpu_writes(name: str) -> None:
    model = made(MODELS[name]())
    expected = [own_text(model, prompt, 10) for prompt in PROMPTS]
    lora_engine.accelerate(model.cuda())
    with inference(model):
        generator = Generator(model)
        assert generator.batched
        found = generator.run([Request(tuple(p), GREEDY, count=5) for p in PROMPTS])
    assert [[list(one.token_ids) for one in five] for five in found] == [5 * [x] for x in expected]


@pytest.mark.parametrize("name", [*MODELS, *OTHERS])
def test_greedy_text_is_the_model_s_own(name: str) -> None:
    model = made({**MODELS, **OTHERS}[name]())
    # Cached keys under tables that change with the length are those of the time of their reading.
    own = own_text if name in MODELS else generated
    expected = [own(model, prompt, 10) for prompt in PROMPTS]
    lora_engine.accelerate(model)
    with inference(model):
        generator = Generator(model)
        assert generator.batched == (name in MODELS)
        found = generator.run([Request(tuple(p), GREEDY) for p in PROMPTS])
    assert [list(one.token_ids) for (one,) in found] == expected


def test_a_model_without_accelerate_writes_by_its_own_calls() -> None:
    model = made(MODELS["llama"](), lora=False)
    with inference(model):
        generator = Generator(model)
        assert not generator.batched
        ((one,),) = generator.run([Request(tuple(PROMPTS[0]), GREEDY)])
        assert list(one.token_ids) == own_text(model, PROMPTS[0], 10)


def test_logprobs_are_those_of_the_model(llama: nn.Module) -> None:
    requests = [Request(tuple(p), DRAWN, count=2) for p in PROMPTS]
    for prompt, both in zip(PROMPTS, Generator(llama).run(requests), strict=True):
        for one in both:
            expected = logprobs_of(llama, prompt, one, DRAWN.temperature)
            assert torch.allclose(torch.tensor(one.logprobs), expected, atol=1e-5)


# How a model's products are made: its class, and what LoRA has beside a rank.
ADAPTERS: dict[str, dict[str, object]] = {
    "lora": {},
    "qwen3": {},
    "window": {},
    "two": {},
    "biased": {"lora_bias": True},
    "dora": {"use_dora": True},
    "head and embedding": {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
    "nf4": {},
    "nf4 dora": {"use_dora": True},
    "int8": {},
    "base": {},
    "whole": {},
}


def of_kind(kind: str, dtype: torch.dtype) -> nn.Module:
    """An accelerated model with products of that kind."""
    model = made(MODELS.get(kind, MODELS["llama"])(), lora=False).to(dtype)
    if kind.startswith(("nf4", "int8")):
        lora_engine.quantize_model(model, kind.split()[0])
    if kind == "base":
        model.requires_grad_(False)
    elif kind != "whole":
        common = {"r": 4, "init_lora_weights": False, "target_modules": "all-linear"}
        config = peft.LoraConfig(**{**common, **ADAPTERS[kind]})
        model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
        if kind == "two":
            model.add_adapter("second", peft.LoraConfig(**{**common, "r": 3}))
            model.base_model.set_adapter(["default", "second"])
    for name, parameter in model.named_parameters():
        if "lora_B.default.bias" in name:
            nn.init.normal_(parameter)
    lora_engine.accelerate(model.eval())
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_continuation_is_the_same_to_the_bit_whatever_is_written_beside(
    kind: str, dtype: torch.dtype
) -> None:
    model = of_kind(kind, dtype)
    request = Request(tuple(PROMPTS[2]), DRAWN, count=3)
    others = [Request(tuple(p), GREEDY, count=2) for p in PROMPTS]
    with inference(model):
        (alone,) = Generator(model, max_batch=1).run([request])
        assert Generator(model).batched
        for most in (7, 40):
            beside = Generator(model, max_batch=most).run([*others, request, *3 * others])
            assert alone == beside[len(others)], most
    assert len({one.token_ids for one in alone}) == 3


Passes = list[tuple[int, int]]  # prompts and tokens of each


def watch_passes(monkeypatch: pytest.MonkeyPatch) -> tuple[Passes, Passes]:
    """The passes in which prompts will be read: by rows, and at once."""
    found: tuple[Passes, Passes] = [], []
    for kind, name in zip(found, ("_read_by_rows", "_read_at_once"), strict=True):
        original = getattr(CachedDecoder, name)

        def watched(self, *args, kind=kind, original=original):
            prompts = args[-2]
            kind.append((len(prompts), sum(map(len, prompts))))
            return original(self, *args)

        monkeypatch.setattr(CachedDecoder, name, watched)
    return found


def test_a_prompt_is_read_once_for_all_that_go_on_with_it(
    llama: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_rows, at_once = watch_passes(monkeypatch)
    Generator(llama, max_batch=2).run([Request((1, 2, 3), DRAWN, count=5)])
    assert by_rows + at_once == [(1, 3)]


# Tokens of prompts: up to 64 are read as few rows.
LENGTHS = (65, 3, 200, 131, 64, 97, 5, 333, 70, 1)


@pytest.fixture
def on_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A matrix unit, or its model: what multiplies rows there depends on no other row."""
    if not backends.extension_available():
        pytest.skip("needs the C++ extension")
    if backends.native().isa() == "amx_bf16":
        yield
    else:
        with tile_model.tiles_modelled(monkeypatch):
            yield


@pytest.mark.parametrize("kind", ["lora", "dora", "qwen3", "window", "base"])
def test_on_tiles_prompts_that_are_read_together_are_those_read_alone(
    kind: str, on_tiles: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(MODELS.get(kind, MODELS["llama"])(), lora=kind != "base", dora=kind == "dora")
    if kind == "base":
        model.requires_grad_(False)
    lora_engine.accelerate(model.bfloat16())
    numbers = torch.Generator().manual_seed(3)
    prompts = [torch.randint(300, (n,), generator=numbers).tolist() for n in LENGTHS]
    requests = [Request(tuple(prompt), DRAWN) for prompt in prompts]
    by_rows, at_once = watch_passes(monkeypatch)
    with inference(model):
        alone = [Generator(model).run([request])[0] for request in requests]
        assert sorted(tokens for _, tokens in by_rows + at_once) == sorted(LENGTHS)
        by_rows.clear(), at_once.clear()
        together = Generator(model).run(requests)
    assert together == alone
    long = [length for length in LENGTHS if length > 64]
    assert at_once[-1] == (len(long), sum(long))


def test_passes_of_prompts_hold_what_they_may(llama: nn.Module) -> None:
    decoder = CachedDecoder(llama, max_batch=None, cache_tokens=100)
    decoder._plan = DecodingPlan(texts=8, rows=4, prompt_by_rows=10, prompt_tokens=50)
    lengths = [10, 3, 20, 30, 1, 51, 11, 39, 12, 9]

    def passes() -> list[list[int]]:
        return [lengths[first:last] for first, last in decoder._passes(lengths)]

    assert passes() == [[length] for length in lengths]
    decoder.prompt(5)  # the first one: the layers' calls are prepared
    if decoder._stack is not None:
        assert passes() == [[10, 3], [20, 30], [1], [51], [11, 39], [12], [9]]
    decoder._plan = decoder._plan._replace(prompt_tokens=0)
    decoder._stack = None
    assert passes() == [[length] for length in lengths]


def test_what_could_not_be_read_is_cancelled_and_the_others_are_written(
    llama: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = Generator(llama)
    first = generator.add(Request((1, 2, 3), GREEDY))
    generator.step()
    second = generator.add(Request((4, 5), GREEDY, count=2))

    def fail(*_: object) -> None:
        raise MemoryError("no room")

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(CachedDecoder, "read", fail)
        generator.step()
    events = list(iter(generator.step, []))
    assert {event.request for step in events for event in step} == {first}
    assert second != first
    decoder = generator._decoder
    assert isinstance(decoder, CachedDecoder)
    assert decoder.cache.free.free == [(0, decoder.cache.free.size)]


def test_all_rows_of_the_cache_come_back_and_a_small_one_is_enough(llama: nn.Module) -> None:
    requests = [Request(tuple(p), GREEDY, count=2) for p in PROMPTS]
    small, large = Generator(llama, cache_tokens=60), Generator(llama)
    assert small.run(requests) == large.run(requests)
    for generator in (small, large):
        decoder = generator._decoder
        assert isinstance(decoder, CachedDecoder)
        assert decoder.cache.free.free == [(0, decoder.cache.free.size)]
    assert small._decoder.cache.free.size <= 60


def test_a_prompt_between_free_rows_is_read_again_where_they_are_one(llama: nn.Module) -> None:
    """Rows 30 to 40 are the second prompt's when the 30 before and the 60 behind are free."""
    first = Request((1,) * 5, Sampling(max_new_tokens=25, temperature=0, stop_tokens=()))
    second = Request((2,) * 10, Sampling(max_new_tokens=65, seed=1, stop_tokens=()), count=2)
    small, large = Generator(llama, cache_tokens=100), Generator(llama)
    assert small.run([first, second]) == large.run([first, second])
    assert small._decoder.cache.free.free == [(0, 100)]


def test_what_never_fits_is_refused_and_the_others_are_written(llama: nn.Module) -> None:
    generator = Generator(llama, cache_tokens=30)
    generator.add(Request(tuple(PROMPTS[2]), GREEDY))
    with pytest.raises(UserError, match="40 tokens and 10 new ones do not fit"):
        generator.step()
    (one,) = generator.run([Request(tuple(PROMPTS[0]), GREEDY)])[0]
    assert len(one.token_ids) == 10


def test_a_text_that_stops_before_half_a_character_at_the_end_has_stopped(llama) -> None:
    """The stop is kept back with the character, and is found when nothing follows."""
    ((whole,),) = Generator(llama).run([Request(tuple(PROMPTS[0]), GREEDY)])
    last = whole.token_ids[-1]

    class Words:
        def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
            return "".join("END\ufffd" if token == last else "a" for token in token_ids)

    count = whole.token_ids.index(last) + 1
    sampling = Sampling(max_new_tokens=count, temperature=0, stop_tokens=(), stop=("END",))
    ((one,),) = Generator(llama, Words()).run([Request(tuple(PROMPTS[0]), sampling)])
    assert (one.text, one.finish) == ("a" * (count - 1), "stop")


def test_stop_tokens_end_a_continuation_and_stay_in_it(llama: nn.Module) -> None:
    ((whole,),) = Generator(llama).run([Request(tuple(PROMPTS[0]), GREEDY)])
    last = whole.token_ids[4]
    first = whole.token_ids.index(last)
    ((cut,),) = Generator(llama, stop_tokens=(last,)).run(
        [Request(tuple(PROMPTS[0]), Sampling(max_new_tokens=10, temperature=0))]
    )
    assert cut.token_ids == whole.token_ids[: first + 1]
    assert (cut.finish, whole.finish) == ("stop", "length")


def test_texts_stream_as_they_are_written(llama: nn.Module) -> None:
    generator = Generator(llama, byte_tokenizer())
    request = Request(tuple(PROMPTS[0]), GREEDY)
    events = list(generator.stream(request))
    ((whole,),) = generator.run([request])
    assert [event.token for event in events] == list(whole.token_ids)
    assert "".join(event.piece for event in events) == whole.text
    assert events[-1].completion == whole


def test_a_stream_that_is_left_gives_back_what_it_held(llama: nn.Module) -> None:
    generator = Generator(llama)
    for _ in generator.stream(Request((1, 2, 3), GREEDY, count=4)):
        break
    decoder = generator._decoder
    assert isinstance(decoder, CachedDecoder)
    assert decoder.cache.free.free == [(0, decoder.cache.free.size)]
    assert generator.step() == []


def test_a_request_that_waits_for_room_gives_back_what_it_held(llama: nn.Module) -> None:
    """Its prompt has been read already, none of its continuations has begun."""
    generator = Generator(llama, cache_tokens=60)
    long = Sampling(max_new_tokens=40, temperature=0, stop_tokens=())
    first = generator.add(Request((1, 2, 3), long))
    second = generator.add(Request((4, 5, 6, 7), long, count=2))
    assert {event.request for event in generator.step()} == {first}
    decoder = generator._decoder
    assert isinstance(decoder, CachedDecoder)
    generator.cancel(second)
    assert sum(rows for _, rows in decoder.cache.free.free) == decoder.cache.free.size - 43
    generator.cancel(first)
    assert decoder.cache.free.free == [(0, decoder.cache.free.size)]


def test_adapters_that_are_switched_off_do_not_write(llama: nn.Module) -> None:
    request = Request(tuple(PROMPTS[3]), GREEDY)
    with llama.disable_adapter():
        ((base,),) = Generator(llama).run([request])
        assert list(base.token_ids) == own_text(llama, PROMPTS[3], 10)
    ((adapted,),) = Generator(llama).run([request])
    assert base.token_ids != adapted.token_ids


def test_a_watched_layer_runs_as_its_own(llama: nn.Module) -> None:
    calls = []
    layer = llama.get_base_model().model.layers[0]
    handle = layer.register_forward_hook(lambda *_: calls.append(1))
    try:
        generator = Generator(llama)
        generator.run([Request((1, 2), GREEDY)])
    finally:
        handle.remove()
    assert not generator.batched
    assert len(calls) == 10


@pytest.mark.parametrize(
    "request_, message",
    [
        (Request(()), "no tokens"),
        (Request((1,), count=0), "count=0"),
        (Request((1,), Sampling(stop=("x",))), "need a tokenizer"),
    ],
    ids=["empty", "none", "stop"],
)
def test_requests_that_cannot_be_written_are_refused(
    llama: nn.Module, request_: Request, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Generator(llama).add(request_)
