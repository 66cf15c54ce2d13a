"""Completions that a vLLM server writes, tested on a stand-in that answers as one does."""

import json
import socket
import threading
import time

import pytest
import torch
from online_runs import TOKENIZER, completions, online_trainer, writer
from training_helpers import lines, trainable
from vllm_stand_in import StandIn, serving

from lora_engine import UserError
from lora_engine.evaluation.modes import inference
from lora_engine.evaluation.samples import stop_tokens
from lora_engine.generation.engine import Request
from lora_engine.generation.prompt import read_prompt
from lora_engine.generation.sampling import Sampling
from lora_engine.testing import tiny_llama
from lora_engine.training.online.config import RolloutConfig
from lora_engine.training.online.vllm import VllmEngine
from lora_engine.training.online.vllm_server import VllmServer

PROMPT = tuple(TOKENIZER.encode("number 3 is"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of the model that `writer` adapts."""
    folder = tmp_path_factory.mktemp("base")
    model = tiny_llama(vocab_size=len(TOKENIZER))
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def stand_in(base):
    return StandIn(base, TOKENIZER)


@pytest.fixture
def url(stand_in):
    with serving(stand_in) as address:
        yield address


@pytest.fixture
def engine(url):
    """Over a model whose adapter shows."""
    model = writer(accelerate=False)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator()))
    made = VllmEngine(model, TOKENIZER, RolloutConfig(engine="vllm", server=url))
    yield made
    made.close()


def asked(count=3, **settings):
    return Request(PROMPT, Sampling(**{"max_new_tokens": 6, "seed": 5, **settings}), count)


def nothing():
    pass


def test_a_run_learns_from_what_the_server_writes(tmp_path, stand_in, url):
    rollout = {"prompts": 8, "engine": "vllm", "server": url}
    trainer = online_trainer(tmp_path, max_steps=6, learning_rate=0.03, rollout=rollout)
    result = trainer.fit()
    rewards = [line["reward"] for line in lines(tmp_path) if "reward" in line]
    assert len(rewards) == 6 and rewards[0] < 0.2 and min(rewards[-2:]) > 0.9
    before, after = result.heldout_metrics_before, result.heldout_metrics_after
    assert after["reward"] > before["reward"] + 0.2
    assert stand_in.most_at_once > 1
    written = [one for one in completions(tmp_path) if one.get("round") is not None]
    assert len(written) == 6 * 8 * 4


def test_each_round_is_written_with_the_weights_of_its_time(tmp_path, stand_in, url):
    rollout = {"engine": "vllm", "server": url}
    trainer = online_trainer(tmp_path, max_steps=3, rollout=rollout, held_out=None)
    kept = []
    stand_in.before = lambda body: kept.append((body["model"], state(trainer.model)))
    trainer.fit()
    at_the_time = dict(kept)
    assert len(at_the_time) == 3 and len(kept) == 3 * 4
    for name, weights in at_the_time.items():
        loaded = stand_in.adapters[name]
        assert weights.keys() == loaded.keys()
        assert all(torch.equal(loaded[key], weights[key]) for key in loaded)
    first, *_, last = at_the_time.values()
    assert any(not torch.equal(first[key], last[key]) for key in first)
    assert stand_in.served == {}, "the last one is taken back"


def state(model):
    import peft

    found = peft.get_peft_model_state_dict(model, adapter_name="default")
    return {key: tensor.detach().clone() for key, tensor in found.items()}


@pytest.mark.parametrize(
    ("mode", "settings"),
    [
        ("raw", {}),
        ("processed", {}),
        ("raw", {"temperature": 0.0}),
        ("processed", {"temperature": 0.7}),
        ("raw", {"top_k": 5, "top_p": 0.9, "min_p": 0.01}),
    ],
)
def test_log_probabilities_are_the_model_s(stand_in, engine, mode, settings):
    stand_in.logprobs_mode = mode
    (group,) = engine.run([asked(**settings)], nothing)
    assert len(group) == 3
    temperature = settings.get("temperature", 1.0) or 1.0
    for one in group:
        with inference(engine._model):
            read = read_prompt(engine._model, [*PROMPT, *one.token_ids], temperature=temperature)
        own = [token.logprob for token in read[len(PROMPT) :]]
        assert one.logprobs == pytest.approx(own, abs=1e-4)
        assert one.text == TOKENIZER.decode(list(one.token_ids), skip_special_tokens=True)
    texts = {one.token_ids for one in group}
    assert len(texts) == (1 if settings.get("temperature") == 0 else 3)
    again = engine.run([asked(**settings)], nothing)
    assert again == [group], "of the same seed"


def test_texts_and_tokens_end_a_completion(stand_in, engine):
    (group,) = engine.run([asked(count=20, max_new_tokens=30, stop=("e", "a"))], nothing)
    ends = stop_tokens(engine._model.get_base_model(), TOKENIZER)
    assert stand_in.asked[0]["stop_token_ids"] == ends != []
    ended = [one for one in group if one.finish == "stop"]
    assert len(ended) > 5
    for one in ended:
        whole = TOKENIZER.decode(list(one.token_ids), skip_special_tokens=True)
        if one.token_ids[-1] in ends:
            assert whole == one.text
        else:
            assert whole.startswith(one.text) and whole[len(one.text) :] in ("e", "a")
        assert len(one.logprobs) == len(one.token_ids)
    (cut,) = engine.run([asked(count=20, max_new_tokens=2)], nothing)
    assert {one.finish for one in cut} == {"length"}
    assert {len(one.token_ids) for one in cut} == {2}


def test_an_interruption_ends_what_is_being_written(stand_in, engine):
    held = threading.Event()
    stand_in.before = lambda body: held.wait(20)

    def interrupted():
        raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        engine.run([asked()], interrupted)
    held.set()
    assert time.monotonic() - began < 10


def test_a_run_goes_on_where_the_server_is_back(tmp_path, stand_in, url):
    rollout = {"engine": "vllm", "server": url}
    settings = {"rollout": rollout, "max_steps": 3, "save_every": 1, "held_out": None}
    trainer = online_trainer(tmp_path, **settings)

    def gone(body):
        if len(stand_in.asked) == 5:
            stand_in.spoil = lambda path, text: "<html>Bad gateway</html>"

    stand_in.before = gone
    with pytest.raises(UserError, match="answers /v1/completions as no vLLM server does: <html>"):
        trainer.fit()
    stand_in.before, stand_in.spoil = nothing_of, lambda path, text: text
    with serving(stand_in) as elsewhere:
        settings["rollout"] = {**rollout, "server": elsewhere}
        result = online_trainer(tmp_path, **settings).fit(resume=True)
    assert result.steps == 3
    assert [line["step"] for line in lines(tmp_path) if "reward" in line] == [1, 2, 3]


def nothing_of(body):
    pass


def edited(**changes):
    """A completion's answer with other fields."""

    def spoil(path, text):
        if path != "/v1/completions":
            return text
        answer = json.loads(text)
        for choice in answer["choices"]:
            choice.update(changes)
        return json.dumps(answer)

    return spoil


def other_weights(stand_in):
    with torch.no_grad():
        for parameter in stand_in.model.parameters():
            parameter.mul_(1.5)


@pytest.mark.parametrize(
    ("spoiled", "said"),
    [
        (lambda s: setattr(s, "takes_adapters", False), "takes no adapters; start it with --enabl"),
        (lambda s: setattr(s, "max_model_len", 12), "are more than its 12; start it with a larger"),
        (other_weights, "its log-probabilities are not the model's .* has to serve the base of th"),
        (lambda s: setattr(s, "spoil", edited(token_ids=None)), "tells no token ids; vLLM does fr"),
        (lambda s: setattr(s, "spoil", edited(prompt_token_ids=[7])), "read other tokens than it "),
        (lambda s: setattr(s, "spoil", edited(token_ids=[9999] * 6)), "wrote token 9999, the mode"),
        (lambda s: setattr(s, "spoil", edited(token_ids=[])), "as no vLLM server does"),
        (lambda s: setattr(s, "spoil", edited(logprobs=None)), "as no vLLM server does"),
        (lambda s: setattr(s, "spoil", edited(index=0)), "as no vLLM server does"),
        (lambda s: setattr(s, "spoil", edited(finish_reason="abort")), "as no vLLM server does"),
        (lambda s: setattr(s, "spoil", lambda path, text: "[]"), "answers /v1/models as no vLLM"),
        (lambda s: setattr(s, "spoil", lambda path, text: '{"data": []}'), "serves no model"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_server_is_one_line(stand_in, url, engine, spoiled, said):
    spoiled(stand_in)
    with pytest.raises(UserError, match=said) as caught:
        engine.run([asked()], nothing)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(url)


def test_log_probabilities_of_another_temperature_are_noticed(stand_in, engine):
    with pytest.raises(UserError, match="with --logprobs-mode processed_logprobs"):
        engine.run([asked(temperature=0.3)], nothing)


def test_what_a_server_refuses_is_told(stand_in, url, engine):
    engine.run([asked()], nothing)
    stand_in.max_model_len = 8  # which it did not say when it was asked
    with pytest.raises(UserError, match="refuses to write: This model's maximum context length"):
        engine.run([asked()], nothing)
    with pytest.raises(UserError, match=r"does not take the adapter in .*: Loading lora x failed"):
        VllmServer(url, 5).load("x", engine._folder / "nowhere")


def test_a_server_that_is_not_there_is_one_line(tmp_path):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{held.getsockname()[1]}"
        trainer = online_trainer(tmp_path, rollout={"engine": "vllm", "server": url})
        with pytest.raises(
            UserError, match=r"no vLLM server answers \(.*refused\); start one"
        ) as e:
            trainer.fit()
    assert "\n" not in str(e.value)


def test_a_server_that_does_not_answer_is_one_line(stand_in, url):
    held = threading.Event()
    stand_in.before = lambda body: held.wait(20)
    settings = RolloutConfig(engine="vllm", server=url, server_timeout=0.5)
    made = VllmEngine(writer(accelerate=False), TOKENIZER, settings)
    with pytest.raises(UserError, match=r"no answer to /v1/completions within 0\.5 s"):
        made.run([asked()], nothing)
    held.set()


def test_adapters_that_vllm_does_not_take_are_refused(tmp_path, url, stand_in):
    rollout = {"engine": "vllm", "server": url}
    trainer = online_trainer(tmp_path, model=writer(use_dora=True), rollout=rollout)
    with pytest.raises(UserError, match="vllm does not take the adapter: it is DoRA"):
        trainer.fit()
    assert stand_in.adapters == {}
    whole = writer().unload()
    with pytest.raises(UserError, match="vllm is handed an adapter; give lora"):
        online_trainer(tmp_path, model=whole, rollout=rollout)


def test_an_address_that_is_none():
    with pytest.raises(UserError, match=r"rollout\.server: 'localhost:8000' is no address; give"):
        VllmServer("localhost:8000", 1)


def test_files_are_where_the_server_finds_them_and_go(tmp_path, stand_in, url):
    place = tmp_path / "shared" / "place"
    settings = RolloutConfig(engine="vllm", server=url, server_folder=str(place))
    made = VllmEngine(writer(accelerate=False), TOKENIZER, settings)
    for _ in range(2):
        made.run([asked()], nothing)
        (folder,) = place.iterdir()
        assert list(stand_in.served.values()) == list(folder.iterdir()), "one at a time"
    made.close()
    assert list(place.iterdir()) == [] and stand_in.served == {}
