"""Which settings fit a budget."""

from dataclasses import replace

import pytest
import torch
import transformers

from lora_engine.errors import UserError
from lora_engine.memory.plan import CANDIDATES, Budget, best, budget_of, candidates, most_rows
from lora_engine.memory.policy import policy_of
from lora_engine.memory.sizes import sizes_of
from lora_engine.memory.speed import GPUS, gpu_of, measured_cpu, step_seconds, tokens_per_second
from lora_engine.memory.timeline import Load, peak, timeline, with_rows
from lora_engine.models.peft.adapters import LoraConfig

H200 = GPUS["h200"]
CUDA = torch.device("cuda")


LORA = LoraConfig()


def sizes(lora=LORA, layers=32):
    config = transformers.LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    return sizes_of(model, lora, torch.bfloat16)


LLAMA = sizes()
LOAD = Load(8192, 8192, device=CUDA)


def total(load):
    return peak(timeline(LLAMA, load)).total


def test_the_most_tokens_fit_and_a_step_more_does_not():
    budget = Budget(48_000_000_000, 3_000_000_000)
    most = most_rows(LLAMA, LOAD, budget)
    assert total(with_rows(LOAD, most)) <= budget.usable < total(with_rows(LOAD, most + 64))
    assert most_rows(LLAMA, LOAD, Budget(16_000_000_000, 0)) == 0


def test_the_quickest_that_fits_is_chosen():
    def chosen(nbytes):
        found = candidates(LLAMA, LOAD, Budget(nbytes, 0), H200, 2048)
        return found, best(found)

    found, roomy = chosen(100_000_000_000)
    assert [each.policy for each in found] == list(CANDIDATES)
    assert all(each.fits for each in found)
    assert roomy.policy == "none"
    rates = [each.tokens_per_second for each in found]
    assert max(rates) == rates[0] and min(rates) == rates[-1]
    assert chosen(40_000_000_000)[1].policy.startswith("every_")
    found, tight = chosen(21_500_000_000)
    assert tight.policy == "layer" and tight.fits
    found, none = chosen(18_000_000_000)
    assert not none.fits and 0 < none.most_rows < LOAD.rows
    assert none.load.rows == none.most_rows
    assert chosen(16_000_000_000)[1] is None


def test_layers_that_are_trained_are_not_taken_apart():
    found = candidates(sizes(None, 2), LOAD, Budget(10**12, 0), H200, 2048)
    assert [each.policy for each in found] == ["none", "every_4", "every_3", "every_2", "layer"]


def test_what_a_gpu_has_is_not_all_for_tensors():
    assert budget_of(24_000_000_000, CUDA, 0).usable == pytest.approx(22.2e9, rel=0.01)
    cpu = torch.device("cpu")
    assert budget_of(10**9, cpu, 4 * 10**8).usable == 6 * 10**8 - 300 * 2**20
    assert budget_of(10**8, cpu, 4 * 10**8).usable == 0
    assert budget_of(10**8, cpu, None).usable == 10**8


@pytest.mark.parametrize(
    ("gigabytes", "name"),
    [(12, "rtx-4090"), (24, "rtx-4090"), (79, "h100"), (141, "h200"), (500, "h200")],
)
def test_the_usual_gpu_of_a_memory(gigabytes, name):
    assert gpu_of(gigabytes * 10**9).name == name


def test_speed_is_that_measured_on_an_h200():
    # benchmarks/results/h200: 17,950 tokens/s.
    assert tokens_per_second(LLAMA, LOAD, H200, 2048) == pytest.approx(17_950, rel=0.15)


def test_what_takes_time():
    def seconds(**changes):
        return step_seconds(LLAMA, replace(LOAD, **changes), H200, 2048)

    plain = seconds()
    assert seconds(policy=policy_of("layer")) > seconds(policy=policy_of("selective")) > plain
    assert seconds(policy=policy_of("half")) < seconds(policy=policy_of("layer"))
    assert seconds(rows=16384, targets=16384) > 1.9 * plain
    assert seconds(targets=10) < plain
    assert step_seconds(LLAMA, LOAD, H200, 8192) > plain


def test_a_processor_is_measured():
    machine = measured_cpu(torch.float32)
    assert 1e8 < machine.flops < 1e14
    assert 1e7 < machine.bandwidth < 1e13


def test_a_model_that_is_not_modelled_is_named():
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1))
    with pytest.raises(UserError, match=r"memory of GPT2LMHeadModel is not modelled"):
        sizes_of(model, LoraConfig(), torch.float32)
