"""Arguments, configuration files and overrides that no run can begin with; no model is needed."""

import os
from pathlib import Path

import pytest
from tries import CONFIG, Try, check, run, tries

from lora_engine.app.config import RunConfig
from lora_engine.config_schema import NAME, dotted, expected, fields, section_of

SECTIONS = {"model", "data", "lora", "train", "samples"}
LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)


def config(name: str, text: str | bytes, *words: str) -> Try:
    """A config file that cannot be used."""
    return Try(name, ["data", "run.yaml"], ["run.yaml", *words], {"run.yaml": text})


def override(name: str, setting: str, *words: str) -> Try:
    """An override that cannot be used, on top of a config that can."""
    return Try(name, ["data", "run.yaml", setting], words, {"run.yaml": CONFIG})


def loop_of_links(folder: Path) -> None:
    (folder / "run.yaml").symlink_to("again.yaml")
    (folder / "again.yaml").symlink_to("run.yaml")


ARGUMENTS = [
    Try("no such command", ["trian"], ["trian", "Did you mean 'train'"]),
    Try("no config", ["train"], ["Missing argument", "CONFIG"]),
    Try("unknown option", ["train", "demo", "--resum"], ["--resum", "--resume"]),
    Try("steps of no number", ["demo", "--steps", "many"], ["--steps"]),
    Try("no steps", ["demo", "--steps", "0"], ["--steps"]),
    Try("option without value", ["demo", "--out"], ["--out"]),
    Try("argument for doctor", ["doctor", "now"], ["now"]),
    Try("empty out", ["demo", "--out", ""], ["train.output_dir", "is empty"]),
]

FILES = [
    Try("no file", ["train", "gone.yaml"], ["gone.yaml", "shipped configs: demo"]),
    Try("near file", ["train", "rum.yaml"], ["rum.yaml", "run.yaml"], {"run.yaml": CONFIG}),
    Try("near shipped", ["train", "dmeo"], ["dmeo", "did you mean demo"]),
    Try("empty name", ["train", ""], ["CONFIG", "is empty"]),
    Try("NUL in name", ["train", "a\0b"], ["CONFIG", "NUL"]),
    Try("nobody's home", ["train", "~no-such-user/a.yaml"], ["~no-such-user"]),
    Try("folder", ["train", "runs"], ["runs", "is a folder"], {"runs/a": ""}),
    Try("below a file", ["train", "a/b.yaml"], ["a/b.yaml", "directory"], {"a": ""}),
    Try("loop of links", ["train", "run.yaml"], ["run.yaml", "symbolic"], prepare=loop_of_links),
    Try("long name", ["train", "x" * 300], ["xxx", "too long"]),
    Try("device", ["train", "/dev/zero"], ["/dev/zero", "is not a file"]),
    Try("pipe", ["train", "p"], ["p", "not a file"], prepare=lambda d: os.mkfifo(d / "p")),
    config("huge", b"#" * 2_000_000, "larger than 1,000,000 bytes"),
    config("not UTF-8", b"model: \xff\xfe", "UTF-8"),
    config("UTF-16", CONFIG.encode("utf-16"), "UTF-8"),
    config("empty", "", "is empty"),
    config("comments only", "# nothing\n", "is empty"),
    config("list", "- a\n- b\n", "expected sections"),
    config("text", "just text\n", "expected sections"),
    config("number", "12\n", "expected sections"),
    config("NUL", CONFIG + "\0", ":7", "NUL"),
    config("escape character", CONFIG + "\x1b[31m", ":7", r"\x1b"),
    config("binary", bytes(range(128)), ":1", "not valid YAML"),
    config("two documents", CONFIG + "---\n" + CONFIG, "document"),
    config("tabs", "model:\n\tpath: tiny\n", ":2", "indent with spaces"),
    config("open bracket", "model: {path: tiny\n", "not valid YAML"),
    config("open quote", 'model: {path: "tiny}\n', "not valid YAML"),
    config("bad indent", "model:\n  path: a\n dtype: b\n", ":3", "not valid YAML"),
    config("unknown anchor", "model: *nowhere\n", ":1", "nowhere"),
    config("anchor to itself", "model: &m\n  path: *m\n", "contains itself"),
    config("anchors to each other", "a: &a\n  b: &b [*a]\n  c: *b\n", "contains itself"),
    config("billion laughs", LAUGHS, "aliases"),
    config("deep lists", "a: " + "[" * 5000, ":1", "20 levels"),
    config("deep mappings", "a: " + "{a: " * 5000, ":1", "20 levels"),
    config("deep lines", "".join(" " * i + "a:\n" for i in range(400)), "20 levels"),
    config("many values", "a: [" + "1," * 10_001 + "]", "10,000 values"),
    config("code", "model: !!python/object/apply:os.system [ls]\n", ":1", "not valid YAML"),
    config("tag", "model: !secret a\n", ":1", "!secret"),
    config("list as key", "? [a, b]\n: c\n", ":1", "not valid YAML"),
    config("number as key", "1: 2\n", ":1", "a number", "quotes"),
    config("null as key", "null: 2\n", ":1", "nothing", "quotes"),
    config("no date", CONFIG + "when: 2024-13-45\n", ":7", "month"),
    config("giant integer", CONFIG + f"samples: {'9' * 5000}\n", ":7"),
    config("key twice", CONFIG + "model: {path: a}\n", ":7", "model", "first in line 1"),
    config("inner key twice", "model: {path: a, path: b}\n", ":1", "model.path"),
    config("no data", "model: {path: a}\n", "data", "required"),
    config("no model", "data: {train: a}\n", "model", "required"),
    config("empty section", "model:\ndata: {train: a}\n", ":1", "model"),
    config("near key", CONFIG + "tarin: {}\n", ":7", "tarin", "did you mean train"),
    config("far key", CONFIG + "zzzzz: {}\n", ":7", "zzzzz", "takes"),
    config("key of a section", CONFIG + "max_steps: 3\n", ":7", "train.max_steps"),
]

OVERRIDES = [
    override("no equals sign", "train.max_steps", "train.max_steps", "key=value"),
    override("no key", "=3", "'=3'", "key=value"),
    override("dots only", "...=3", "'...=3'", "key=value"),
    override("empty part", "train..seed=3", "train..seed", "key=value"),
    override("option-like", "train.max_steps:3", "key=value"),
    override("open bracket", "lora.target_modules=[q", "lora.target_modules", "[q"),
    override("deep value", "lora.r=" + "[" * 5000, "lora.r"),
    override("own anchor", "lora.r=&a [*a]", "lora.r"),
    override("no date", "lora.r=2024-13-45", "lora.r"),
    override("NUL", "model.path=a\0b", "model.path"),
    override("NUL escaped", 'train.output_dir="a\\0b"', "train.output_dir", "NUL"),
    override("unknown key", "train.max_stepz=3", "train.max_stepz", "train.max_steps"),
    override("unknown section", "trian.max_steps=3", "trian", "train"),
    override("key below a value", "model.path.a=3", "model.path", "no keys"),
    override("section as value", "train=3", "train", "a section of keys"),
    override("list as section", "train=[1]", "train", "a section of keys"),
    override("nothing as section", "train=", "train", "a section of keys"),
    override("mapping as value", "model.path={a: 1}", "model.path"),
    override("both of a pair", "train.epochs=1", "max_steps", "epochs"),
    override("long warm-up", "train.warmup_steps=2", "warmup_steps", "max_steps"),
    override("patience", "train.early_stopping_patience=2", "eval_every"),
    override("forgetting", "train.stop_on_forgetting=0.1", "stop_on_forgetting", "eval_every"),
    override("replay of all", "data.replay={path: a.jsonl, fraction: 1}", "replay.fraction", "< 1"),
    override("replay of what", "data.replay={fraction: 0.1}", "data.replay.path", "required"),
    override("no share", "data.replay={path: a.jsonl}", "data.replay.fraction", "required"),
    override("both sources", "data.eval=a.jsonl", "eval_fraction"),
    override("split of nothing", "data.eval_split=test", "eval_split"),
    override("two lengths", "train.max_length=8", "data.max_length"),
    override("empty folder name", "train.output_dir=", "train.output_dir"),
    override("blank folder name", "train.output_dir=' '", "train.output_dir", "is empty"),
    override("nobody's folder", "train.output_dir=~no-such-user/a", "train.output_dir"),
    override("nobody's data", "data.train=~no-such-user/a.jsonl", "data.train"),
    override("power sign", "train.seed=10^30", "train.seed", "10^30"),
    override("product sign", "train.max_steps=10**30", "train.max_steps", "10**30"),
]


@tries([*ARGUMENTS, *FILES])
def test_arguments_and_files(capfd, folder, entry):
    check(capfd, folder, entry)


@tries(OVERRIDES)
def test_overrides(capfd, folder, entry):
    check(capfd, folder, entry)


def wrong_values(path, info):
    """Values that the key takes none of, in YAML."""
    takes = expected(info)
    wrong = [] if takes == "values by name" else ["{a: {b: 1}}"]
    if "list" not in takes:
        wrong.append("[[1]]")
    if "number" in takes:
        wrong += ["text", "true", ".nan", ".inf", "-1", "1" + "0" * 30, "-1e300"]
    if "whole" in takes:
        wrong.append("1.5")
    if "text" in takes or "path" in takes:
        wrong += ["12", "true", "2024-01-01"]
    if "true" in takes:
        wrong += ["maybe", "3"]
    if not {"text", "path", "true", "number"} & set(takes.replace("numbers", "number").split()):
        wrong += ["zzz", "12", "true"]
    return wrong


def every_wrong_value():
    for path, info in fields(RunConfig):
        if section_of(info.annotation):
            continue
        key = dotted("a" if part == NAME else part for part in path)
        for value in wrong_values(path, info):
            yield pytest.param(key, value, id=f"{key}={value[:12]}")


@pytest.mark.parametrize(("key", "value"), list(every_wrong_value()))
def test_every_key_refuses_what_it_cannot_be(capfd, folder, key, value):
    entry = override(key, f"{key}={value}", "command line", key)
    check(capfd, folder, entry)


@pytest.mark.parametrize("section", sorted(SECTIONS))
def test_every_section_refuses_an_unknown_key(capfd, folder, section):
    entry = override(section, f"{section}.zzzzz=1", f"{section}.zzzzz", "unknown key", "takes")
    check(capfd, folder, entry)


def test_the_line_shows_no_giant_value(capfd, folder):
    entry = override("giant", f"model.device=[{'x' * 100_000}]", "model.device")
    assert len(check(capfd, folder, entry)) < 300


def test_a_tilde_is_the_home_folder(capfd, folder, tmp_path):
    (tmp_path / "run.yaml").write_text(CONFIG.replace("tiny", "~/gone/model"))
    status, _, err = run(capfd, "data", "~/run.yaml")
    assert (status, err) == (
        2,
        f"lora-engine: {tmp_path}/gone/model: no such model folder or file; check the path\n",
    )


def test_control_characters_in_a_name_are_spelled_out(capfd, folder):
    status, _, err = run(capfd, "train", "a\x1b[31m\n\u202e.yaml")
    assert status == 2
    assert err.startswith(r"lora-engine: a\x1b[31m\n\u202e.yaml: no such config file; ")
