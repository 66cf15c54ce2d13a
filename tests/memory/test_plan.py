"""Which settings fit a budget."""

from dataclasses import replace

import pytest
import torch
import transformers

from lora_engine.backends.plans import UPDATED_VALUES
from lora_engine.errors import UserError
from lora_engine.memory.plan import (
    CANDIDATES,
    TILED,
    Budget,
    best,
    budget_of,
    candidates,
    most_rows,
    worth_showing,
)
from lora_engine.memory.policy import policy_of
from lora_engine.memory.sizes import sizes_of
from lora_engine.memory.speed import GPUS, gpu_of, measured_cpu, step_seconds, tokens_per_second
from lora_engine.memory.timeline import HOST_PIECE, Load, peak, timeline, with_rows
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


def ways(sizes, load, gigabytes, machine, places=(None, "host", "disk"), host_states=(False,)):
    policies = (*CANDIDATES, *TILED)
    budget = Budget(int(gigabytes * 1e9), 0)
    return candidates(sizes, load, budget, machine, 2048, policies, places, host_states)


RTX_4090 = GPUS["rtx-4090"]


def test_what_layers_keep_goes_to_the_host_where_that_is_quickest():
    found = ways(LLAMA, LOAD, 20, RTX_4090)
    fitting = [each for each in found if each.fits]
    chosen = best(found)
    assert (chosen.policy, chosen.load.offload) == ("half", "host")
    assert chosen.tokens_per_second == max(each.tokens_per_second for each in fitting)
    assert all(each.load.offload for each in fitting)  # without it nothing fits
    # More memory, and nothing has to leave.
    assert best(ways(LLAMA, LOAD, 50, RTX_4090)).load.offload is None
    # Links as slow as a disk: what keeps the least, and computes the most again, is quicker.
    slow = best(ways(LLAMA, LOAD, 21.5, RTX_4090._replace(link=1e9)))
    assert (slow.policy, slow.load.offload) == ("layer", None)
    rates = {each.load.offload: each.tokens_per_second for each in found if each.policy == "half"}
    assert rates["disk"] < 0.5 * rates["host"]


def test_memory_of_the_host_is_no_other_on_a_cpu():
    load = replace(LOAD, device=torch.device("cpu"), policy=policy_of("half"))
    of = {place: peak(timeline(LLAMA, replace(load, offload=place))).total for place in PLACES}
    assert of["host"] == of[None] > of["disk"] + 30 * 2 * 8192 * 4096 * 2


PLACES = (None, "host", "disk")


def test_mlps_run_in_tiles_where_their_tensors_are_the_most():
    load = with_rows(LOAD, 262144)
    found = ways(sizes(layers=2), load, 40, H200, places=(None,))
    assert [each.policy for each in found if each.fits] == list(TILED)
    assert best(found).policy == TILED[0]  # fewer launches
    assert found[-2].tokens_per_second > found[-1].tokens_per_second


def test_states_go_to_the_host_where_nothing_else_fits():
    whole = sizes(None, 8)
    found = ways(whole, LOAD, 45, H200, (None, "host"), (False, True))
    chosen = best(found)
    assert chosen.load.host_states and chosen.policy == "none"
    assert all(each.load.host_states for each in found if each.fits)
    assert not best(ways(whole, LOAD, 100, H200, (None,), (False, True))).load.host_states
    moved = [each.highest.parts["optimiser"] for each in (found[0], chosen)]
    assert moved[0] == 8 * whole.trained_values
    assert moved[1] == pytest.approx(8 * 2 * HOST_PIECE)


def test_pieces_are_those_of_the_optimiser():
    assert UPDATED_VALUES["cuda"] // 4 == HOST_PIECE


def test_only_what_nothing_beats_is_shown():
    found = ways(LLAMA, LOAD, 20, RTX_4090)
    shown = worth_showing(found, 9)
    assert shown[:9] == found[:9]
    more = {(each.policy, each.load.offload) for each in shown[9:]}
    assert ("half", "host") in more and ("half", "disk") not in more
    assert all(each.fits for each in shown[9:])


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
