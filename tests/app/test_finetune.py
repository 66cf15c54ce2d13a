"""A whole run on a tiny model: its files, its numbers, and how it goes on after a break."""

import errno
import json
import os
import shutil
import signal
from html import unescape

import peft
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny_model import save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_engine.app.config import load_config
from lora_engine.app.finetune import examine_data, finetune, how_to_resume
from lora_engine.app.progress import ConsoleProgress, render_outcome
from lora_engine.errors import UserError

REQUIRED = {
    "heldout_loss_before",
    "heldout_loss_after",
    "heldout_accuracy_before",
    "heldout_accuracy_after",
    "train_tokens",
    "train_seconds",
    "tokens_per_second",
    "peak_memory_bytes",
    "samples",
}


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def settings(tmp_path, tiny_model, monkeypatch):
    """A folder with the data and the config, run.yaml, of a run of four steps."""
    torch.set_num_threads(1)  # on a busy machine, threads that wait for each other take minutes
    monkeypatch.chdir(tmp_path)
    rows = [
        {"messages": [{"role": "user", "content": f"double {i}"},
                      {"role": "assistant", "content": f"{i} {i}"}]}
        for i in range(60)
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run.yaml").write_text(
        f"model: {{path: {tiny_model}, dtype: float32, device: cpu}}\n"
        "data: {train: rows.jsonl, eval_fraction: 0.2}\n"
        "lora: {r: 4, alpha: 8}\n"
        "train: {output_dir: out, max_steps: 4, tokens_per_batch: 128, learning_rate: 0.01,\n"
        "        eval_every: 2, save_every: 1}\n"
        "samples: {count: 3, max_new_tokens: 5}\n"
    )
    return tmp_path


def run(*overrides, resume=False, observer=None):
    return finetune(load_config("run.yaml", overrides), resume=resume, observer=observer)


def read_metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


class Recorder:
    """An observer that remembers, and can do something at a step."""

    def __init__(self, at_step=None, action=None):
        self.stages, self.steps, self.evals, self.told = [], [], [], []
        self.at_step, self.action = at_step, action

    def stage(self, text):
        self.stages.append(text)

    def on_data(self, lines):
        assert not self.steps
        self.told += lines

    def on_step(self, metrics):
        self.steps.append(metrics.step)
        if metrics.step == self.at_step:
            self.action()

    def on_eval(self, step, result):
        self.evals.append(step)


def interrupt():
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("accelerate", ["true", "false"])
def test_run_leaves_its_files_and_learns(settings, accelerate):
    observer = Recorder()
    outcome = run(f"accelerate={accelerate}", "train.max_steps=8", observer=observer)
    folder = settings / "out"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary == outcome.summary
    assert set(summary) >= REQUIRED
    assert summary["heldout_loss_after"] < summary["heldout_loss_before"]
    assert summary["train_tokens"] == sum(row["tokens"] for row in read_metrics(folder))
    assert (summary["train_examples"], summary["eval_examples"]) == (48, 12)
    assert [set(sample) for sample in summary["samples"]] == 3 * [
        {"origin", "prompt", "before", "after", "reference"}
    ]
    assert all(sample["origin"].startswith("rows.jsonl:") for sample in summary["samples"])
    assert observer.steps == list(range(1, 9))
    assert observer.evals == [0, 2, 4, 6, 8]
    assert "rows.jsonl" in (folder / "report.html").read_text()
    assert load_config(folder / "config.yaml") == load_config(
        "run.yaml", [f"accelerate={accelerate}", "train.max_steps=8"]
    )
    assert (summary["coverage"] is not None) == (accelerate == "true")


def measure_by_the_first_three(settings):
    """Hold out nothing; measure by the first three rows of the training data."""
    config = settings / "run.yaml"
    held_out = "eval: rows.jsonl, eval_limit: 3"
    config.write_text(config.read_text().replace("eval_fraction: 0.2", held_out))


def test_a_run_says_what_it_does_not_learn_from(settings):
    rows = [
        {"prompt": f"{i}:", "completion": "" if i % 8 == 0 else f"{i}<end>", "weight": i + 1}
        for i in range(40)
    ]
    (settings / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    observer = Recorder()
    measure_by_the_first_three(settings)
    summary = run(observer=observer).summary
    told = [
        "rows.jsonl, training: 35 of 40 records are learned from",
        "  dropped, nothing to learn from: the answer is empty: 5 "
        "(rows.jsonl:1, rows.jsonl:9, rows.jsonl:17 and 2 more)",
        "  already ends in '<end>', gets no second end: 35 "
        "(rows.jsonl:2, rows.jsonl:3, rows.jsonl:4 and 32 more)",
        "  not read: weight (40)",
    ]
    assert observer.told[:4] == told
    training, heldout = summary["data_accounts"]
    assert (training["records"], training["examples"]) == (40, 35)
    assert training["ignored"] == {"weight": 40} and heldout["ignored"] == {"weight": 3}
    assert training["findings"][0]["count"] == 5
    page = unescape((settings / "out/report.html").read_text())
    assert all(line.strip() in page for line in told[1:])


def test_a_token_without_an_embedding_stops_the_run_before_it_begins(settings, tiny_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    size = len(tokenizer)
    tokenizer.add_tokens(["<extra>"])
    shutil.copytree(tiny_model, settings / "grown")
    tokenizer.save_pretrained(settings / "grown")
    measure_by_the_first_three(settings)
    rows = [{"text": "fine"}] * 2 + [{"text": "a <extra> b"}]
    (settings / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=rf"rows\.jsonl:3: token {size} \('<extra>'\) is beyond"):
        run("model.path=grown")
    assert not (settings / "out").exists()


def test_adapter_gives_peft_the_same_answers(settings, tiny_model):
    summary = run("train.final_weights=last").summary
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, settings / "out/adapter")
    from lora_engine.app.finetune import prepare_data
    from lora_engine.evaluation.samples import choose_prompts, generate

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    _, heldout = prepare_data(load_config("run.yaml").data, tokenizer)
    prompts = choose_prompts(heldout, tokenizer, 3)
    texts = generate(model, tokenizer, prompts, max_new_tokens=5)
    assert texts == [sample["after"] for sample in summary["samples"]]
    with model.disable_adapter():
        texts = generate(model, tokenizer, prompts, max_new_tokens=5)
    assert texts == [sample["before"] for sample in summary["samples"]]


def test_adapter_names_its_base_and_carries_its_tokenizer(settings, tiny_model):
    summary = run("data.train=" + str(settings / "rows.jsonl"), "samples.count=0").summary
    folder = settings / "out/adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tiny_model).chat_template
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "- training: `rows.jsonl, training`, 48 examples" in card
    assert f"| {summary['heldout_loss_before']:.4f} | {summary['heldout_loss_after']:.4f} |" in card
    assert str(settings) not in card and str(tiny_model.parent) not in card


def test_several_adapters_learn_at_once(settings, tiny_model):
    rows = [
        {"prompt": f"{i}:", "completion": f"{i}" * times, "adapter": name}
        for i in range(30)
        for name, times in (("twice", 2), ("thrice", 3))
    ]
    (settings / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    adapters = "lora.adapters={twice: {}, thrice: {r: 2, learning_rate: 0.005}}"
    outcome = run(adapters, "train.max_steps=8")
    assert outcome.summary["heldout_loss_after"] < outcome.summary["heldout_loss_before"]
    assert outcome.summary["method"] == "LoRA: twice (rank 4), thrice (rank 2)"
    folder = settings / "out/adapter"
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["thrice", "twice"]
    logits = {}
    for name, rank in (("twice", 4), ("thrice", 2)):
        base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        model = peft.PeftModel.from_pretrained(base, folder / name)
        assert model.peft_config["default"].r == rank
        logits[name] = model(torch.arange(8)[None]).logits
        with model.disable_adapter():
            assert not torch.allclose(model(torch.arange(8)[None]).logits, logits[name])
    assert not torch.allclose(logits["twice"], logits["thrice"])
    rows[5]["adapter"] = "twce"
    (settings / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"rows.jsonl:6: no adapter 'twce'.* did you mean twice"):
        run(adapters, "train.overwrite=true")


def test_interrupted_and_resumed_is_the_same_run(settings):
    whole = run("train.output_dir=whole")
    stopped = run(observer=Recorder(at_step=2, action=interrupt))
    assert stopped.result.stopped == "interrupted"
    assert stopped.summary is None
    assert not (settings / "out/summary.json").exists()
    assert how_to_resume(stopped.folder) == (
        "continue with: lora-engine train out/config.yaml --resume"
    )
    observer = Recorder()
    resumed = finetune(load_config("out/config.yaml"), resume=True, observer=observer)
    assert observer.steps == [3, 4]
    assert not any("before training" in stage for stage in observer.stages)
    for key in ("samples", "heldout_loss_before", "heldout_loss_after", "train_tokens"):
        assert resumed.summary[key] == whole.summary[key], key
    peaks = [row["peak_memory_bytes"] for row in read_metrics(settings / "out")]
    assert resumed.summary["peak_memory_bytes"] >= max(peaks)
    losses = [[row["loss"] for row in read_metrics(settings / name)] for name in ("whole", "out")]
    assert losses[0] == losses[1]
    ended = Recorder()
    assert finetune(load_config("out/config.yaml"), resume=True, observer=ended).summary
    assert (
        ended.steps == [] and "all 4 steps are done; the results are written again" in ended.stages
    )
    assert not any("measuring" in stage for stage in [*observer.stages, *ended.stages])


def test_used_folder_is_not_touched_without_being_told(settings):
    run()
    before = {path: path.read_bytes() for path in (settings / "out").glob("*.*")}
    with pytest.raises(UserError, match="out: already holds a run; continue it with --resume"):
        run()
    assert {path: path.read_bytes() for path in (settings / "out").glob("*.*")} == before
    run("train.overwrite=true", "train.max_steps=3")
    assert len(read_metrics(settings / "out")) == 3


def test_a_run_that_cannot_begin_leaves_the_earlier_one_whole(settings):
    run()
    before = {path.name for path in (settings / "out").iterdir()}
    assert {"summary.json", "report.html", "samples_before.json"} <= before
    (settings / "bad.jsonl").write_text('{"messages": "none"}\n')
    with pytest.raises(UserError, match=r"bad\.jsonl"):
        run("train.overwrite=true", "data.train=bad.jsonl")
    assert {path.name for path in (settings / "out").iterdir()} == before


def everything_in(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


OTHER_RUNS = {
    "lora.alpha=512": r"lora_alpha=8.0, now lora_alpha=512.0 \(adapter default\)",
    "lora.seed=7": r"lora.seed=0, now lora.seed=7 \(model\)",
    "model.dtype=bfloat16": r"dtype=float32, now dtype=bfloat16, float32 \(model\)",
    "model.path=other": r"made with other model weights \(.*tiny, now other\)",
    "model.path=renamed": "made with another chat template; another vocabulary of the tokenizer;",
    "data.eval_fraction=0.3": "made with other held-out data; other training data",
}


def test_resuming_as_another_run_is_refused_and_touches_nothing(settings, tiny_model):
    other, renamed = settings / "other", settings / "renamed"
    shutil.copytree(tiny_model, other)
    weights = load_file(other / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] += 1e-3
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    shutil.copytree(tiny_model, renamed)
    for path in (renamed / "tokenizer.json", renamed / "tokenizer_config.json"):
        path.write_text(path.read_text().replace("<system>", "<tool>"))
    template = renamed / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    run("samples.count=0", "train.max_steps=1")
    before = everything_in(settings / "out")
    for change, message in OTHER_RUNS.items():
        with pytest.raises(UserError, match=message):
            run(change, "train.max_steps=1", resume=True)
    assert everything_in(settings / "out") == before


def test_there_has_to_be_a_run_to_resume(settings):
    with pytest.raises(UserError, match="out: holds no run to resume; begin one without --resume"):
        run(resume=True)
    assert not (settings / "out").exists()


def test_a_finished_run_is_extended(settings):
    whole = run("train.output_dir=whole", "train.max_steps=6", "train.schedule=constant")
    run("train.schedule=constant", "train.final_weights=last")
    extended = run("train.max_steps=6", "train.schedule=constant", resume=True)
    for key in ("samples", "heldout_loss_before", "heldout_loss_after", "train_tokens", "steps"):
        assert extended.summary[key] == whole.summary[key], key
    assert load_config("out/config.yaml").train.max_steps == 6


@pytest.mark.parametrize("name", ["config.yaml", "summary.json", "report.html", "metrics.jsonl"])
def test_files_that_were_there_before_stay(settings, name):
    (settings / "out").mkdir()
    (settings / "out" / name).write_text("mine")
    with pytest.raises(UserError, match=f"out/{name}: was not written by this run: move it away"):
        run("train.overwrite=true")
    assert everything_in(settings / "out") == {settings / "out" / name: b"mine"}


def test_the_folder_of_data_and_config_may_be_the_runs(settings):
    before = everything_in(settings)
    run("train.output_dir=.", "train.max_steps=1", "samples.count=0")
    run("train.output_dir=.", "train.max_steps=2", "samples.count=0", "train.overwrite=true")
    assert before.items() <= everything_in(settings).items()


@pytest.mark.parametrize(
    "content", ["{", '{"asked": 1}', "[" * 100_000], ids=["cut", "other", "deep"]
)
def test_damaged_files_of_a_run_are_made_again(settings, content):
    whole = run("train.max_steps=1").summary
    for name in ("samples_before.json", "summary.json", "metrics.jsonl"):
        (settings / "out" / name).write_text(content)
    summary = run("train.max_steps=1", resume=True).summary
    assert summary["samples"] == whole["samples"]
    assert json.loads((settings / "out/summary.json").read_text()) == summary
    assert json.loads((settings / "out/samples_before.json").read_text())["texts"]


def test_a_full_disk_at_the_end_keeps_what_was_learned(settings, monkeypatch):
    whole = run("train.output_dir=whole").summary
    for target in (
        "lora_engine.training.trainer.export_model",
        "lora_engine.app.finetune.write_report",
    ):
        with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
            patched.setattr(target, full_disk)
            run(resume=(settings / "out").exists())
        assert how_to_resume(settings / "out").startswith("continue with: lora-engine train")
    summary = run(resume=True).summary
    for key in ("samples", "heldout_loss_after", "train_tokens"):
        assert summary[key] == whole[key], key


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_changed_prompts_are_sampled_anew_on_resume(settings):
    run(observer=Recorder(at_step=2, action=interrupt))
    summary = run("samples.count=2", resume=True).summary
    assert len(summary["samples"]) == 2


def test_full_fine_tuning(settings):
    outcome = run("lora=null", "samples.count=0", "train.max_steps=2")
    assert outcome.summary["parameters"] == outcome.summary["trainable_parameters"]
    assert outcome.summary["samples"] == []
    AutoModelForCausalLM.from_pretrained(settings / "out/adapter")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.target_modules=[q_prj]", "lora.target_modules: .*q_prj"),
        ("data.train=row.jsonl", "row.jsonl: no such file; did you mean rows.jsonl?"),
        ("model.path=./gone", "./gone: no such model folder or file; check the path"),
        ("train.output_dir=rows.jsonl", "rows.jsonl: is a file, train.output_dir must be a folder"),
    ],
)
def test_mistake_stops_before_training(settings, override, message):
    with pytest.raises(UserError, match=message):
        run(override)
    assert not (settings / "out").exists()


def console_text(terminal):
    return Console(record=True, force_terminal=terminal, width=100, file=_Nowhere())


class _Nowhere:
    encoding = "utf-8"

    def write(self, text):
        return len(text)

    def flush(self):
        return None

    def isatty(self):
        return False


def test_plain_progress_is_lines_with_loss_and_speed(settings):
    console = console_text(terminal=False)
    outcome = run(observer=ConsoleProgress(console))
    console.print(render_outcome(outcome))
    text = console.export_text()
    for step in range(1, 5):
        [line] = [line for line in text.splitlines() if line.startswith(f"step {step}/4")]
        assert "loss " in line and "held-out " in line and "tokens/s" in line
        assert ("left" in line) == (step < 4)
    assert "step 0: held-out loss" in text
    assert "out/report.html" in text
    for name in ("before", "after", "reference"):
        assert text.count(f" {name} ") >= 3


def test_terminal_progress_is_a_bar_that_is_gone_after_an_error(settings):
    console = console_text(terminal=True)
    progress = ConsoleProgress(console)
    with pytest.raises(ZeroDivisionError):
        progress.on_start(type("T", (), {"total_steps": 4, "state": type("S", (), {"step": 0})}))
        try:
            _ = 1 / 0
        finally:
            progress.close()
    assert console._live_stack == []
    run(observer=ConsoleProgress(console))
    assert "4/4" in console.export_text()


def test_auto_is_the_dtype_that_the_run_began_with(settings, monkeypatch):
    """Another machine, or another number of threads, may choose another."""
    chosen = "lora_engine.models.load.load.preferred_dtype"
    monkeypatch.setattr(chosen, lambda device: torch.bfloat16)
    auto = ("model.dtype=auto", "samples.count=0", "train.schedule=constant")
    run(*auto, "train.max_steps=1")
    assert load_config("out/config.yaml").model.dtype == "bfloat16"
    monkeypatch.setattr(chosen, lambda device: torch.float32)
    assert run(*auto, "train.max_steps=2", resume=True).summary["steps"] == 2
    with pytest.raises(
        UserError,
        match=r"made with dtype=bfloat16, float32, now dtype=float32 \("
        r"model\): change it back",
    ):
        run(*auto, "model.dtype=float32", "train.max_steps=2", resume=True)  # fmt: skip


def test_a_run_does_not_discard_the_model_it_begins_with(settings):
    run("lora=null", "train.max_steps=1", "samples.count=0")
    before = everything_in(settings / "out")
    with pytest.raises(UserError, match="the run in out holds out/adapter, the model to begin"):
        run("model.path=out/adapter", "train.overwrite=true")
    assert everything_in(settings / "out") == before


def test_data_names_what_is_beyond_the_models_vocabulary(settings, tiny_model):
    grown = settings / "grown"
    shutil.copytree(tiny_model, grown)
    tokenizer = AutoTokenizer.from_pretrained(grown)
    tokenizer.add_tokens(["double"])
    tokenizer.save_pretrained(grown)
    config = load_config("run.yaml", [f"model.path={grown}"])
    with pytest.raises(UserError, match=r"48 of 48 records .*: token 261 .* of 261 rows"):
        examine_data(config)
    with pytest.raises(UserError, match=r"48 of 48 records .*: token 261 .* of 261 rows"):
        finetune(config)
