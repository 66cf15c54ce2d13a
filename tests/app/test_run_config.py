"""Configuration files: what is accepted, and the one line that says what is not."""

from pathlib import Path
from typing import get_args

import pytest
import yaml

from lora_engine.app.config import (
    RunConfig,
    dump_config,
    load_config,
)
from lora_engine.app.config_reference import reference_page
from lora_engine.app.config_yaml import shipped_configs
from lora_engine.errors import UserError

BASE = "model: {path: tiny}\ndata: {train: train.jsonl}\n"


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def load(text=BASE, *overrides):
    Path("run.yaml").write_text(text, encoding="utf-8")
    return load_config("run.yaml", overrides)


def test_file_and_overrides():
    config = load(BASE + "train: {max_steps: 3, seed: 4}\n", "train.max_steps=20", "lora.r=8")
    assert (config.train.max_steps, config.train.seed) == (20, 4)
    assert config.lora is not None and config.lora.r == 8
    assert config.model.path == "tiny"


def test_override_values_are_yaml():
    config = load(
        BASE, "lora.target_modules=[q_proj, v_proj]", "train.learning_rate=5e-4", "data.split="
    )
    assert config.lora is not None and config.lora.target_modules == ["q_proj", "v_proj"]
    assert config.train.learning_rate == 5e-4
    assert config.data.split is None


def test_null_lora_is_full_fine_tuning_and_can_be_given_back():
    assert load(BASE + "lora: null\n").lora is None
    restored = load(BASE + "lora: null\n", "lora.r=2").lora
    assert restored is not None and restored.r == 2


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (
            BASE + "train:\n  max_stepz: 3\n",
            [],
            "run.yaml:4: train.max_stepz: unknown key; did you mean train.max_steps?",
        ),
        (
            BASE + "learning_rate: 3\n",
            [],
            "run.yaml:3: learning_rate: unknown key; did you mean train.learning_rate?",
        ),
        (
            BASE + "train: {max_steps: many}\n",
            [],
            "run.yaml:3: train.max_steps: expected a whole number from 1 to 1,000,000,000 or null, "
            "got 'many'",
        ),
        (
            BASE,
            ["train.schedule=cosin"],
            "command line: train.schedule: expected cosine or linear or constant, "
            "got 'cosin'; did you mean cosine?",
        ),
        (
            BASE,
            ["lora.target_modules=[a, 3]"],
            "command line: lora.target_modules: expected text or a list of text, got ['a', 3]; "
            "text that YAML reads as something else needs quotes",
        ),
        (
            BASE,
            ["samples.counts=1"],
            "command line: samples.counts: unknown key; did you mean samples.count?",
        ),
        (
            BASE,
            ["samples.zzz=1"],
            "command line: samples.zzz: unknown key; samples takes count, max_new_tokens",
        ),
        (
            "model: {pth: m}\ndata: {train: d.jsonl}\n",
            [],
            "run.yaml:1: model.pth: unknown key; did you mean model.path? (1 more after this one)",
        ),
        (
            BASE,
            ["lora.rank=8"],
            "command line: lora.rank: unknown key; lora takes r, alpha, dropout, target_modules, "
            "exclude_modules, rslora, bias, modules_to_save, ensure_weight_tying, merge_aware, "
            "seed, adapters",
        ),
        (
            BASE,
            ["lora.dropout=1.5", "lora.r=x"],
            "command line: lora.r: expected a whole number from 1 to 1,000,000, got 'x' "
            "(1 more after this one)",
        ),
        (
            BASE + "train: {max_grad_norm: off}\n",
            [],
            "run.yaml:3: train.max_grad_norm: expected a number > 0 and ≤ 1,000,000,000 or null, "
            "got False",
        ),
        (
            BASE,
            ["lora.r=true"],
            "command line: lora.r: expected a whole number from 1 to 1,000,000, got True",
        ),
        (
            BASE,
            ["model.path=12"],
            "command line: model.path: expected text, got 12; "
            "text that YAML reads as something else needs quotes",
        ),
        (
            BASE,
            ["train.warmup_steps=5", "train.warmup_ratio=0.1"],
            "run.yaml: train: give either warmup_steps or warmup_ratio, not both",
        ),
        (
            BASE,
            ["data.eval=a.jsonl", "data.eval_fraction=0.1"],
            "run.yaml:2: data: give either eval or eval_fraction, not both",
        ),
        (
            BASE,
            ["train.max_length=9"],
            "command line: train.max_length: give data.max_length instead",
        ),
        (
            "model: {path: tiny}\n",
            [],
            "run.yaml: data: is required, expected a section of keys",
        ),
        (
            "model: {path: tiny}\ndata: {split: train}\n",
            [],
            "run.yaml:2: data.train: is required, expected text or a list of text or a section of "
            "keys",
        ),
        (
            BASE + "model: {path: other}\n",
            [],
            "run.yaml:3: model: given twice, first in line 1",
        ),
        (
            BASE + "lora: {r: 8\n",
            [],
            "run.yaml:4: is not valid YAML: expected ',' or '}', but got '<stream end>'",
        ),
        ("", [], "run.yaml: is empty; it needs at least model.path and data.train"),
        (
            "- a\n",
            [],
            "run.yaml: expected sections such as 'model:' and 'data:' at the top",
        ),
        (
            BASE,
            ["max_steps"],
            "command line: 'max_steps': expected key=value, e.g. train.max_steps=20",
        ),
        (
            BASE,
            ["data.train.split=x"],
            "command line: data.train.split: data.train is a value, it has no keys; "
            "give data.train=VALUE",
        ),
        (
            BASE + "lora:\n  adapters:\n    one: {rr: 3}\n",
            [],
            "run.yaml:5: lora.adapters.one.rr: unknown key; did you mean lora.adapters.one.r?",
        ),
        (
            BASE + "lora:\n  adapters:\n    one: {r: true}\n",
            [],
            "run.yaml:5: lora.adapters.one.r: expected a whole number from 1 to 1,000,000 or null, "
            "got True",
        ),
        (
            BASE + "lora:\n  adapters:\n    one:\n",
            [],
            "run.yaml:5: lora.adapters.one: expected a section of keys, got None",
        ),
        (
            BASE,
            ["lora.adapters=3"],
            "command line: lora.adapters: expected sections by name or null, got 3",
        ),
        (
            BASE + "lora: {bias: all, adapters: {one: {}, two: {}}}\n",
            [],
            "run.yaml:3: lora: bias and modules_to_save are for one adapter, not several",
        ),
        (
            BASE,
            ["lora.adapters={a.b: {}}"],
            "command line: lora.adapters.a.b: 'a.b' cannot name an adapter: use letters, digits, "
            "_ and -, a letter or digit first",
        ),
        (
            BASE + "lora:\n  adapters:\n    keys: {}\n",
            [],
            "run.yaml:5: lora.adapters.keys: 'keys' is a name that torch or PEFT use themselves; "
            "take another",
        ),
        (
            BASE + f"lora:\n  adapters:\n    {'n' * 65}: {{}}\n",
            [],
            f"run.yaml:5: lora.adapters.{'n' * 65}: '{'n' * 37}…' is longer than 64 characters",
        ),
        (
            BASE + "lora:\n  adapters: {En: {}, en: {}}\n",
            [],
            "run.yaml:3: lora: adapters: 'En' and 'en' are one folder where case makes no "
            "difference; rename one",
        ),
        (
            BASE + "lora:\n  adapters:\n    yes: {}\n    en: {}\n",
            [],
            "run.yaml:5: lora.adapters.yes: YAML reads yes as true or false; as a name it needs "
            "quotes: 'yes'",
        ),
        (
            BASE,
            ["lora.adapters={one: {}, 0x1F: {}}"],
            "command line: lora.adapters.0x1F: YAML reads 0x1F as a number; as a name it needs "
            "quotes: '0x1F'",
        ),
        (
            BASE + "train:\n  adapter_learning_rates: {2026-01-31: 2.0}\n",
            [],
            "run.yaml:4: train.adapter_learning_rates.2026-01-31: YAML reads 2026-01-31 as a "
            "date; as a name it needs quotes: '2026-01-31'",
        ),
        (
            BASE + "lora: {adapters: {~: {}}}\n",
            [],
            "run.yaml:3: lora.adapters.~: YAML reads ~ as nothing; as a name it needs quotes: '~'",
        ),
        (
            BASE + "train: {adapter_learning_rates: {defualt: 2}}\n",
            [],
            "run.yaml:3: train.adapter_learning_rates: no adapter 'defualt'; did you mean default?",
        ),
        (
            BASE + "lora: null\ntrain: {adapter_learning_rates: {default: 2}}\n",
            [],
            "run.yaml:4: train.adapter_learning_rates: no adapter 'default'; without lora there "
            "is none",
        ),
        (
            BASE + f"lora: {{seed: 1{'0' * 30}}}\n",
            [],
            f"run.yaml:3: lora.seed: expected a whole number ≥ 0 and < 4,294,967,296, "
            f"got 1{'0' * 30}",
        ),
        (
            BASE,
            ["lora.alpha=1e300"],
            "command line: lora.alpha: expected a number > 0 and ≤ 1,000,000, got '1e300'",
        ),
        (
            BASE + "lora:\n  adapters:\n    en: {learning_rate: .inf}\n",
            [],
            "run.yaml:5: lora.adapters.en.learning_rate: expected a number > 0 and ≤ 100 or null, "
            "got inf",
        ),
        (
            BASE + "lora: {target_modules: []}\n",
            [],
            "run.yaml:3: lora.target_modules: names no module; give names, a pattern, or "
            "all-linear",
        ),
        (
            BASE,
            ["lora.adapters={one: {}, two: {}}", "accelerate=false"],
            "command line: lora.adapters: several need the engine's kernels: accelerate: true",
        ),
        (
            BASE,
            ["lora.adapters={one: {}}", "train.adapter_learning_rates={oen: 2}"],
            "command line: train.adapter_learning_rates: no adapter 'oen'; did you mean one?",
        ),
        (BASE, ["train=5"], "command line: train: expected a section of keys, got 5"),
        (
            BASE,
            ["lora.r=[1"],
            "command line: lora.r: '[1' is not a valid YAML value; quote it if it is text",
        ),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) and ":" in value[:20] else None,
)
def test_mistake_is_one_exact_line(text, overrides, message):
    with pytest.raises(UserError) as caught:
        load(text, *overrides)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("demoo", "demoo: no such config file; did you mean demo, which is shipped?"),
        ("ran.yaml", "ran.yaml: no such config file; did you mean run.yaml?"),
        ("zzz", f"zzz: no such config file; shipped configs: {', '.join(shipped_configs())}"),
        ("folder", "folder: is a folder, expected a YAML file"),
        ("binary.yaml", "binary.yaml: is not UTF-8 text, expected a YAML file"),
    ],
)
def test_missing_or_unreadable_file(name, message):
    Path("run.yaml").write_text(BASE)
    Path("folder").mkdir()
    Path("binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError) as caught:
        load_config(name)
    assert str(caught.value) == message


def test_config_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        load().model.path = "other"


def test_dump_reads_back_to_the_same():
    config = load(BASE, "train.output_dir=runs/a b", "lora=null", "accelerate=strict")
    Path("again.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config("again.yaml") == config


@pytest.mark.parametrize("name", shipped_configs())
def test_shipped_config_is_valid_and_named_by_its_stem(name):
    assert isinstance(load_config(name), RunConfig)


def test_file_in_the_folder_wins_over_a_shipped_name():
    Path("demo").write_text(BASE)
    assert load_config("demo").model.path == "tiny"


def test_formats_of_weights_are_those_that_are_written():
    from lora_engine.app.config_model import QuantizedFormat
    from lora_engine.quantization.formats import WRITABLE

    assert get_args(QuantizedFormat) == WRITABLE


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (["model.double_quant=true"], "double_quant and quantize_skip need quantize"),
        (["model.quantize_skip=[q_proj]"], "double_quant and quantize_skip need quantize"),
        (["model.quantize=int8", "model.double_quant=true"], "double_quant is of nf4 and fp4"),
        (["model.quantize=nf4", "model.keep_quantized=true"], "either quantize or keep_quantized"),
        (["model.quantize=nf4", "lora=null"], "packed bits are frozen; give lora"),
        (["model.quantize=nf44"], "did you mean nf4"),
    ],
)
def test_quantisation_that_means_nothing_is_refused(settings, match):
    with pytest.raises(UserError, match=match):
        load(BASE, *settings)


def test_reference_is_current():
    page = Path(__file__).parents[2] / "docs/configuration.md"
    assert page.read_text(encoding="utf-8") == reference_page(), (
        "docs/configuration.md is out of date: "
        "python -m lora_engine.app.config_reference > docs/configuration.md"
    )


def test_reference_describes_every_key():
    page = reference_page()
    config = RunConfig.model_validate(yaml.safe_load(BASE)).model_dump()
    for section, values in config.items():
        for key in values if isinstance(values, dict) else ():
            row = next(line for line in page.splitlines() if f"`{section}.{key}`" in line)
            assert not row.endswith("|  |"), f"{section}.{key} has no description"


def test_adapters_take_what_they_leave_out_from_lora():
    adapters = "{one: {}, two: {r: 2, learning_rate: 1e-4}}"
    settings = ["lora.r=8", f"lora.adapters={adapters}", "train.learning_rate=0.001"]
    config = load(BASE, *settings)
    one, two = config.lora.of_adapters().values()
    assert (one.r, two.r, one.alpha, two.alpha) == (8, 2, 32, 32)
    assert config.train_with_rates().adapter_learning_rates == {"two": pytest.approx(0.1)}
    assert list(load(BASE).lora.of_adapters()) == ["default"]
    both = [*settings, "train.adapter_learning_rates={two: 3}"]
    with pytest.raises(UserError, match=r"lora.adapters.two: give either learning_rate or"):
        load(BASE, *both)
