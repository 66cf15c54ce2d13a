"""`lora-engine plan`: what a user reads."""

import json

import pytest
import torch
import yaml
from processes import run_together

from lora_engine import backends
from lora_engine.app import fit_memory
from lora_engine.app.cli import main
from lora_engine.app.config import load_config
from lora_engine.app.fit_memory import with_memory
from lora_engine.app.plan import model_sizes
from lora_engine.distributed.world import ALONE, World, current
from lora_engine.errors import UserError
from lora_engine.memory.plan import CPU_OVERHEAD_BYTES
from lora_engine.testing import byte_tokenizer, tiny_llama


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    tiny_llama(vocab_size=300, hidden_size=64, layers=4).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    content = {
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "data": {"train": str(folder / "absent.jsonl")},
        "train": {"tokens_per_batch": 4096},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def run(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main(["plan", *words])
    out, err = capsys.readouterr()
    return ended.value.code, out, err


def test_shows_when_how_many_bytes_are_alive_and_what_fits(config, capsys):
    status, out, _ = run(capsys, config, "--gpu", "24GB")
    assert status == 0
    assert out.startswith("model: 4,096 tokens a micro-batch, adamw, on rtx-4090, modelled")
    for row in ("forward", "head", "layer 3, backward", "optimiser", "evaluation", "generation"):
        assert f"\n{row} " in out
    assert "Best: train.checkpointing=none" in out
    assert "All figures are modelled" in out


def test_json_has_every_byte(config, capsys):
    status, out, _ = run(
        capsys, config, "--json", "--budget", "100GB", "train.optimizer=adamw_8bit"
    )
    made = json.loads(out)
    assert status == 0
    assert made["device"] == "cpu" and not made["modelled"]
    assert made["budget_bytes"] == 100_000_000_000
    assert made["reserved_bytes"] > 10_000_000
    for moment in made["moments"]:
        assert sum(moment["parts"].values()) == moment["bytes"] > 0
    assert made["settings"] == {"train.checkpointing": "none"}
    assert {policy["checkpointing"] for policy in made["policies"]} >= {"layer", "half"}


def test_a_budget_that_only_fewer_tokens_fit(config, capsys):
    status, out, _ = run(capsys, config, "--gpu", "h200", "--budget", "660MB", "--json")
    made = json.loads(out)
    assert status == 0 and made["settings"] == {}
    status, out, _ = run(capsys, config, "--gpu", "h200", "--budget", "660MB")
    assert "Nothing fits: 64 tokens take " in out
    status, out, _ = run(
        capsys,
        config,
        "--gpu",
        "h200",
        "--budget",
        "1GB",
        "train.tokens_per_batch=9000000",
        "--json",
    )
    made = json.loads(out)
    assert 10_000 < made["settings"]["train.tokens_per_batch"] < 9_000_000


def test_a_policy_that_is_stated_is_kept(config, capsys):
    _, out, _ = run(capsys, config, "--json", "train.checkpointing=half")
    assert {policy["checkpointing"] for policy in json.loads(out)["policies"]} == {"half"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--gpu", "rtx-409"],
            "--gpu 'rtx-409': write its memory, as 24GB; did you mean rtx-4090?",
        ),
        (["--gpu", "24"], "--gpu '24': write its memory, as 24GB, or one of rtx-3090"),
        (["--budget", "lots"], "--budget: 'lots' is no size of memory; write 24GB, 1.5GB"),
        (["train.checkpointing=layers"], "did you mean layer?"),
        (["model.path=/nowhere"], "/nowhere: no such model folder"),
        (["lora.target_modules=[q_prj]"], "q_prj"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(config, capsys, words, message):
    status, out, err = run(capsys, config, *words)
    assert (status, out) == (2, "")
    assert err.startswith("lora-engine: ") and err.count("\n") == 1
    assert message in err


def fitted(config, megabytes, *overrides, begun=None):
    """The configuration of a run that may take so much beside this process, and what was told."""
    beside = backends.resident_bytes() + CPU_OVERHEAD_BYTES
    memory = f"{(beside + megabytes * 10**6) / 1e6:.3f}MB"
    told = []
    given = load_config(config, [f"train.memory={memory}", *overrides])
    return with_memory(given, begun, ALONE, told.append).train, told


def test_memory_that_is_enough_takes_the_quickest_policy(config):
    train, told = fitted(config, 2000)
    assert (train.checkpointing, train.tokens_per_batch) == ("none", 4096)
    assert len(told) == 1 and told[0].startswith("memory: checkpointing none, for ")


def test_memory_that_is_short_takes_a_policy_that_keeps_less(config):
    train, _ = fitted(config, 40)
    assert train.checkpointing not in (None, "none")
    assert (train.tokens_per_batch, train.gradient_accumulation_steps) == (4096, 1)


def test_micro_batches_are_split_where_no_policy_is_enough(config):
    stated = "train.gradient_accumulation_steps=3"
    train, told = fitted(config, 60, "train.tokens_per_batch=40000", stated)
    parts = train.gradient_accumulation_steps // 3
    assert parts > 1 and train.gradient_accumulation_steps % 3 == 0
    assert 40_000 <= parts * train.tokens_per_batch < 40_000 + 64 * parts
    assert (
        f"{parts} micro-batches of {train.tokens_per_batch:,} tokens for one of 40,000" in told[0]
    )


def test_a_run_that_is_resumed_keeps_its_micro_batches(config):
    begun = load_config(
        config, ["train.tokens_per_batch=640", "train.gradient_accumulation_steps=7"]
    )
    train, _ = fitted(config, 2000, begun=begun)
    assert (train.tokens_per_batch, train.gradient_accumulation_steps) == (640, 7)


def test_memory_that_nothing_fits(config):
    with pytest.raises(
        UserError, match=r"^train.memory 1MB: Nothing fits: 64 tokens take .*Take a"
    ):
        with_memory(load_config(config, ["train.memory=1MB"]), None, ALONE, print)


@pytest.mark.parametrize("key", ["model.shard", "train.sequence_parallel"])
def test_processes_that_share_a_model_are_not_planned(config, key):
    given = load_config(config, ["train.memory=auto", f"{key}=true"])
    with pytest.raises(UserError, match=r"^train.memory: is for processes that hold the whole"):
        with_memory(given, None, World(size=2), print)


def test_the_first_of_two_processes_chooses_for_a_half_of_the_memory(config):
    (first, told), (second, nothing) = run_together(2, fitted_in_halves, config)
    chosen = ("checkpointing", "tokens_per_batch", "gradient_accumulation_steps")
    assert [first[key] for key in chosen] == [second[key] for key in chosen]
    assert len(told) == 1 and not nothing
    assert first["checkpointing"] not in (None, "none")
    assert first["tokens_per_batch"] == 4096


def fitted_in_halves(config):
    """As `fitted`, of processes with 40 MB each; with twice as much nothing would run again."""
    if not current().is_first:
        fit_memory.plan = None
    beside = backends.resident_bytes() + CPU_OVERHEAD_BYTES
    told = []
    given = load_config(config, [f"train.memory={2 * (beside / 1e6 + 40):.3f}MB"])
    return with_memory(given, None, current(), told.append).train.model_dump(mode="json"), told


def test_a_merge_aware_run_keeps_its_weights_dense_and_packed(config):
    def linears(*options):
        of = load_config(config, ["model.quantize=nf4", "lora.target_modules=[q_proj]", *options])
        return model_sizes(of, torch.float32).weights["linears"]

    layers, values = 4, 64 * 64
    assert linears("lora.merge_aware=true") - linears() == layers * values * 4
