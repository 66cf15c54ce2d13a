"""The saved folder: complete for others, private to nobody's machine, readable by PEFT."""

import json
import re
from pathlib import Path

import peft
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tiny_model import save_tiny_model
from training_helpers import make_examples
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_engine.data.dataset import TokenizedDataset
from lora_engine.models.load.load import load_model
from lora_engine.models.load.origin import Base, sha256_of
from lora_engine.models.peft.adapters import LoraConfig, add_adapters
from lora_engine.testing import CHAT_TEMPLATE
from lora_engine.training.config import TrainConfig
from lora_engine.training.run.card import CardFacts, adapter_card, index_card, model_card
from lora_engine.training.run.export import export_model
from lora_engine.training.state import TrainResult

IDS = torch.arange(10)[None]
FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "base.json",
    "trained_over.json",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
}
RESULT = TrainResult(
    steps=60,
    train_tokens=96123,
    train_seconds=1.0,
    tokens_per_second=1.0,
    peak_memory_bytes=1,
    heldout_loss_before=2.5,
    heldout_loss_after=1.25,
    heldout_accuracy_before=0.5,
    heldout_accuracy_after=None,
    best_step=40,
    stopped="finished",
    checkpoint_dir=Path("/home/someone/runs/checkpoints"),
)


def facts(name="rows.jsonl, training", loss_unit="nats per supervised token", **config):
    train = TokenizedDataset(make_examples(30), name=name)
    heldout = TokenizedDataset(make_examples(8), name="rows.jsonl, held out")
    settings = TrainConfig(output_dir=Path("/home/someone/runs"), max_steps=80, **config)
    return CardFacts(settings, RESULT, 80, loss_unit, train, heldout)


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("private") / "tiny-base")


@pytest.fixture
def loaded(base_folder):
    return load_model(base_folder, dtype="float32", device="cpu")


def trained(model, **settings):
    """With adapters whose values are no longer the first."""
    model = add_adapters(model, LoraConfig(r=3, **settings))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    return model.eval()


def base_model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def front_matter(card):
    _, front, _ = card.split("---\n", 2)
    return yaml.safe_load(front)


def assert_nothing_private(folder, *private):
    for path in folder.rglob("*"):
        for word in (*map(str, private), str(Path.home()), "More Information Needed"):
            assert not path.is_file() or word.encode() not in path.read_bytes(), (path, word)


def test_adapter_is_complete(tmp_path, base_folder, loaded):
    model, tokenizer = loaded
    model = trained(model, modules_to_save=["norm"])
    export_model(model, tokenizer, tmp_path / "adapter", facts())
    folder = tmp_path / "adapter"
    assert {path.name for path in folder.iterdir()} == FILES
    assert_nothing_private(folder, base_folder.parent, tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"]) == ("tiny-base", 3)
    loaded_model = peft.PeftModel.from_pretrained(base_model(base_folder), folder)
    assert torch.equal(loaded_model(IDS).logits, model(IDS).logits)
    again = AutoTokenizer.from_pretrained(folder)
    assert again.chat_template == CHAT_TEMPLATE
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.pad_token == tokenizer.pad_token
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"SHA-256 `{sha256_of(base_folder / 'model.safetensors')}`" in card
    assert "- modules_to_save: `norm`" in card
    assert model.peft_config["default"].base_model_name_or_path == str(base_folder)


def test_each_of_several_adapters_is_complete(tmp_path, base_folder, loaded):
    model, tokenizer = loaded
    model = trained(model, adapters={"en": {}, "de": {"r": 2}})
    export_model(model, tokenizer, tmp_path / "out", facts(adapter_learning_rates={"de": 0.5}))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"README.md", "en", "de"}
    assert_nothing_private(tmp_path / "out", base_folder.parent, tmp_path)
    for name, other in (("en", "de"), ("de", "en")):
        folder = tmp_path / "out" / name
        assert {path.name for path in folder.iterdir()} == FILES
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert f"# LoRA adapter `{name}` for `tiny-base`" in card
        assert f"Trained together with `{other}`." in card
        assert ("that of the run times 0.5" in card) == (name == "de")
        assert AutoTokenizer.from_pretrained(folder).chat_template == CHAT_TEMPLATE
        alone = peft.PeftModel.from_pretrained(base_model(base_folder), folder)
        model.set_adapter(name)
        assert torch.equal(alone(IDS).logits, model(IDS).logits)
    index = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert "- `en`\n- `de`\n" in index


def test_whole_model_is_complete(tmp_path, base_folder, loaded):
    model, tokenizer = loaded
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    export_model(model, tokenizer, tmp_path / "model", facts())
    assert_nothing_private(tmp_path / "model", base_folder.parent, tmp_path)
    again = base_model(tmp_path / "model")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template == CHAT_TEMPLATE
    card = (tmp_path / "model/README.md").read_text(encoding="utf-8")
    assert card.partition("# ")[2].startswith("`tiny-base`, fine-tuned")
    assert front_matter(card)["library_name"] == "transformers"


def test_without_a_tokenizer_the_card_loads_none(tmp_path, loaded):
    model, _ = loaded
    export_model(trained(model), None, tmp_path / "adapter", facts())
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert names == FILES - {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
    assert "Tokenizer" not in (tmp_path / "adapter/README.md").read_text()


def test_tied_weights_are_saved_once_and_load_tied(tmp_path):
    model, tokenizer = load_model(
        save_tiny_model(tmp_path / "tied", tie_word_embeddings=True), dtype="float32", device="cpu"
    )
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    export_model(model, tokenizer, tmp_path / "model", facts())
    assert "lm_head.weight" not in load_file(tmp_path / "model/model.safetensors")
    again = base_model(tmp_path / "model")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_hub_model_is_named_with_its_revision(tmp_path, base_folder, loaded):
    model, tokenizer = loaded
    model.name_or_path = "org/base"
    model.config._commit_hash = "0123abc"
    model = trained(model)
    export_model(model, tokenizer, tmp_path / "adapter", facts())
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", "0123abc")
    card = (tmp_path / "adapter/README.md").read_text(encoding="utf-8")
    assert front_matter(card)["base_model"] == "org/base"
    assert 'AutoModelForCausalLM.from_pretrained("org/base")' in card
    again = peft.PeftModel.from_pretrained(base_model(base_folder), tmp_path / "adapter")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_card_tells_data_settings_and_figures():
    card = model_card(Base("tiny"), facts(learning_rate=0.003, seed=7), tokenizer=True)
    for line in (
        "- training: `rows.jsonl, training`, 30 examples",
        "- held out: `rows.jsonl, held out`, 8 examples",
        "- steps: 60 of 80 (finished)",
        "- weights: those of step 40, the lowest held-out loss",
        "- tokens: 96,123",
        "- learning_rate: `0.003`",
        "- seed: `7`",
        "| held-out loss, nats per supervised token | 2.5000 | 1.2500 |",
        "| held-out token accuracy | 50.0% | not measured |",
    ):
        assert line in card.splitlines()
    assert "someone" not in card


@pytest.mark.parametrize(
    ("unit", "label"), [("nats per pair", "held-out loss, nats per pair"), ("", "held-out loss")]
)
def test_card_has_the_unit_of_the_objective(unit, label):
    card = model_card(Base("tiny"), facts(loss_unit=unit), tokenizer=True)
    assert f"| {label} | 2.5000 | 1.2500 |" in card.splitlines()


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("/home/someone/rows.jsonl, training", "`rows.jsonl, training`"),
        ("../secret/rows.jsonl, training", "`rows.jsonl, training`"),
        ("data/rows.jsonl, training", "`data/rows.jsonl, training`"),
        ("org/dataset, training", "`org/dataset, training`"),
        ("", "examples without a name"),
    ],
)
def test_data_is_named_without_this_machines_folders(given, shown):
    card = model_card(Base("tiny"), facts(given), tokenizer=True)
    assert f"- training: {shown}, 30 examples" in card.splitlines()


def even_fences(line):
    """Whether every run of backticks is closed by one of its length: nothing of it is Markdown."""
    runs = [len(run) for run in re.findall("`+", line)]
    while runs:
        opening = runs.pop(0)
        if opening not in runs:
            return False
        runs = runs[runs.index(opening) + 1 :]
    return True


HOSTILE = [
    "a: [b] {c} 'd' \"e\" #f",
    "new\nline\n---\nlibrary_name: x",
    "back`tick ``` fences",
    "<script>alert(1)</script> | **bold** [x](y)",
    "naïve 模型 \u202e\x1b[31m\x00",
    "lone \udc80 surrogate",
    "- item",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_names(tmp_path, name):
    base = Base(name, files={f"{name}.gguf": "00"})
    config = peft.LoraConfig(target_modules=[name])
    cards = [
        adapter_card(base, facts(name), config, name=name, beside=[name], tokenizer=True),
        model_card(base, facts(name), tokenizer=True),
        index_card(base, [name]),
    ]
    for card in cards:
        plain = {"library_name", "pipeline_tag", "tags"}
        assert set(front_matter(card)) == plain
        assert not {"\x00", "\x1b", "\u202e"} & set(card)
        (tmp_path / "README.md").write_text(card, encoding="utf-8")
        assert ModelCard.load(tmp_path / "README.md").data.library_name in ("peft", "transformers")
        prose = re.sub("```python\n.*?\n```\n", "", card, flags=re.DOTALL)
        assert all(even_fences(line) for line in prose.splitlines())
        headings = [line for line in card.splitlines() if line.startswith("#")]
        titles = {"Base model", "How to load", "Data", "Adapter", "Training", "Figures"}
        assert {line.removeprefix("## ") for line in headings[1:]} <= titles
        _, opening, rest = card.partition("```python\n")
        if opening:
            code, _, _ = rest.partition("\n```\n")
            compile(code, "card", "exec")
