"""The command line: exact messages, exit statuses, and that it stays thin and quick."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_model import save_tiny_model

import lora_engine
from lora_engine.app import cli, commands

SHIPPED = "demo, distill, dpo, grpo, kto, orpo, ppo, reward"


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(capsys, *arguments):
    """(exit status, standard output, standard error) of the command."""
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    printed = capsys.readouterr()
    return caught.value.code, printed.out, printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "No such command 'trian'. Did you mean 'train'?"),
        (["train"], "Missing argument 'CONFIG'."),
        (
            ["train", "nope.yaml"],
            f"nope.yaml: no such config file; shipped configs: {SHIPPED}",
        ),
        (
            ["train", "demo", "train.max_stepz=3"],
            "command line: train.max_stepz: unknown key; did you mean train.max_steps?",
        ),
        (
            ["demo", "samples.count=-1"],
            "command line: samples.count: expected a whole number from 0 to 10,000, got -1",
        ),
        (
            ["data", "demo", "max_length=3"],
            "command line: max_length: unknown key; did you mean data.max_length?",
        ),
        (
            ["train", "demo", "data.train=gone.jsonl", "model.path=./gone"],
            "./gone: no such model folder or file; check the path",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistake_is_one_line_and_status_2(capsys, arguments, message):
    status, out, err = run(capsys, *arguments)
    assert status == 2
    assert err == f"lora-engine: {message}\n"
    assert "Traceback" not in out + err


@pytest.mark.parametrize("place", [0, 2])
def test_debug_shows_the_traceback_wherever_it_stands(capsys, place):
    arguments = ["train", "nope.yaml"]
    arguments.insert(place, "--debug")
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert "Traceback" in err
    assert err.endswith(
        f"lora-engine: nope.yaml: no such config file; shipped configs: {SHIPPED}\n"
    )


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"lora-engine {lora_engine.__version__}\n", "")


def test_no_argument_shows_help(capsys):
    status, out, _ = run(capsys)
    assert status == 0
    for command in ("demo", "train", "data", "doctor"):
        assert f"  {command} " in out


def test_help_imports_nothing_heavy():
    program = (
        "import sys; from lora_engine.app.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'pydantic', 'peft', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_demo_options_are_overrides(capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(commands, "_train", lambda *arguments: seen.append(arguments))
    status, _, _ = run(capsys, "demo", "--out", "a: b", "--steps", "7", "lora.r=2")
    assert status == 0
    [(name, overrides, resume)] = seen
    from lora_engine.app.config import load_config

    config = load_config(name, overrides)
    assert str(config.train.output_dir) == "a: b"
    assert (config.train.max_steps, config.lora.r, resume) == (7, 2, False)


def test_ctrl_c_before_a_checkpoint_says_so(capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("lora_engine.app.finetune.finetune", interrupted)
    status, out, err = run(capsys, "train", "demo")
    assert status == 130
    assert out == ""
    assert err == (
        "lora-engine: interrupted; there is no checkpoint yet, start again with the same command\n"
    )


def test_ctrl_c_elsewhere(capsys, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("lora_engine.app.doctor.examine", interrupted)
    assert run(capsys, "doctor") == (130, "", "lora-engine: interrupted\n")


def test_an_error_of_ours_is_not_passed_off_as_the_users(capsys, monkeypatch):
    def broken():
        raise ZeroDivisionError("no share of nothing")

    monkeypatch.setattr("lora_engine.app.doctor.examine", broken)
    status, out, err = run(capsys, "doctor")
    assert (status, out) == (1, "")
    assert re.fullmatch(
        r"lora-engine: unexpected ZeroDivisionError at commands.py:\d+: no share of nothing; "
        "this is a bug of lora_engine: run again with --debug and report what it prints\n",
        err,
    )


def test_doctor_prints_json(capsys):
    _, out, _ = run(capsys, "doctor", "--json")
    assert "GPU" in json.loads(out)


def test_data_shows_counts_and_examples(capsys, tiny_model):
    rows = [{"prompt": f"say {i}", "completion": f"it is {i}"} for i in range(20)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [f"model.path={tiny_model}", "data.train=rows.jsonl", "data.eval_fraction=0.2"]
    status, out, _ = run(capsys, "data", "demo", *settings)
    assert status == 0
    assert "rows.jsonl, training" in out
    assert "rows.jsonl, held out" in out


def test_data_lists_all_malformed_lines(capsys, tiny_model):
    Path("rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{oops\n{"txt": "c"}\n')
    status, _, err = run(
        capsys, "data", "demo", f"model.path={tiny_model}", "data.train=rows.jsonl"
    )
    assert status == 2
    assert "rows.jsonl:2" in err
    assert "rows.jsonl:3" in err
