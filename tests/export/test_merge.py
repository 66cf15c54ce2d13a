"""Merged weights against PEFT's own merge in float64, and against what PEFT computes adapter-on."""

import json
import threading
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import save_tiny_model

from lora_engine.errors import UserError
from lora_engine.export.adapter import Adapter, LowRank, read_adapter
from lora_engine.export.merge import merge_folder
from lora_engine.export.verify import TOLERANCES, compare, load_plain, with_adapters
from lora_engine.export.weights import MergedWeights

ROWS = [[3 + (7 * i + j) % 90 for j in range(40)] for i in range(3)]
LINEARS = ["q_proj", "down_proj"]

VARIANTS = {
    "lora": {"target_modules": "all-linear"},
    "rslora": {"target_modules": LINEARS, "use_rslora": True},
    "dora": {"target_modules": LINEARS, "use_dora": True},
    "dora-rslora": {"target_modules": LINEARS, "use_dora": True, "use_rslora": True},
    "alphas": {"target_modules": LINEARS, "alpha_pattern": {"layers.1.self_attn.q_proj": 64}},
    "ranks": {"target_modules": LINEARS, "rank_pattern": {"down_proj": 2}},
    "bias-of-b": {"target_modules": ["q_proj"], "lora_bias": True},
    "biases": {"target_modules": ["q_proj"], "bias": "all"},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "dora-embedding": {"target_modules": ["embed_tokens"], "use_dora": True},
    "head": {"target_modules": ["lm_head", "v_proj"]},
    "head-saved": {"target_modules": LINEARS, "modules_to_save": ["lm_head"]},
    "norm-saved": {"target_modules": LINEARS, "modules_to_save": ["norm"]},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of a model with biases, of one whose head is its embedding, and of bfloat16."""
    root = tmp_path_factory.mktemp("bases")
    loud = {"initializer_range": 0.2}  # so that every weight counts in the logits
    plain = save_tiny_model(root / "plain", attention_bias=True, **loud)
    tied = save_tiny_model(root / "tied", tie_word_embeddings=True, **loud)
    half = save_tiny_model(root / "half", dtype=torch.bfloat16, **loud)
    return {"plain": plain, "tied": tied, "half": half}


@cache
def loaded(base: Path):
    return load_plain(base)


def save_adapter(base: Path, folder: Path, seed=1, name="default", **settings) -> Path:
    """An adapter of random values on the model in `base`, as PEFT saves it."""
    torch.manual_seed(seed)
    model = deepcopy(loaded(base))
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **settings)
    wrapped = peft.get_peft_model(model, config, adapter_name=name)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    wrapped.save_pretrained(folder)
    return folder if name == "default" else folder / name


def merged_by_peft(base: Path, adapters) -> dict[str, torch.Tensor]:
    """PEFT's merge_and_unload, in float64."""
    model = with_adapters(deepcopy(loaded(base)).double(), adapters).double()
    names = [adapter.name for adapter, _ in adapters]
    return dict(model.merge_and_unload(adapter_names=names).state_dict())


def assert_merged(base, adapters, target, dtype=None):
    """Every tensor within half a unit in the last place of PEFT's, computed in float64."""
    result = merge_folder(base, adapters, target, dtype)
    oracle = merged_by_peft(base, adapters)
    ours = load_file(target / "model.safetensors")
    before = load_file(base / "model.safetensors")
    assert set(before) <= set(ours) <= set(oracle)
    changed = [n for n in before if not torch.equal(ours[n].float(), before[n].float())]
    assert set(changed) == set(result.changed) - ({"lm_head.weight"} - set(before))
    for name, tensor in ours.items():
        assert tensor.dtype == (dtype or before.get(name, tensor).dtype)
        step = torch.finfo(tensor.dtype).eps / 2
        slack = step * oracle[name].abs() + 2e-7
        assert ((tensor.double() - oracle[name]).abs() <= slack).all(), name
    return result


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_merge_is_peft_s_in_float64_rounded_once(bases, tmp_path, variant):
    adapter = read_adapter(save_adapter(bases["plain"], tmp_path / "a", **VARIANTS[variant]))
    target = tmp_path / "merged"
    target.mkdir()
    result = assert_merged(bases["plain"], [(adapter, 1.0)], target)
    assert result.changed and not result.untied


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.float32])
def test_the_result_has_the_base_s_dtype_or_the_one_asked_for(bases, tmp_path, dtype):
    adapter = read_adapter(save_adapter(bases["half"], tmp_path / "a", target_modules=LINEARS))
    (tmp_path / "merged").mkdir()
    result = assert_merged(bases["half"], [(adapter, 1.0)], tmp_path / "merged", dtype)
    expected = str(dtype or torch.bfloat16).removeprefix("torch.")
    assert result.dtypes == (expected,)
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert (config.get("dtype") or config["torch_dtype"]) == expected


@pytest.mark.parametrize(
    ("settings", "untied"),
    [
        ({"target_modules": LINEARS}, False),
        ({"target_modules": ["lm_head"]}, True),
        ({"target_modules": ["embed_tokens"]}, True),
        ({"target_modules": LINEARS, "modules_to_save": ["embed_tokens"]}, True),
        (
            {
                "target_modules": LINEARS,
                "modules_to_save": ["embed_tokens"],
                "ensure_weight_tying": True,
            },
            False,
        ),
        ({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, False),
    ],
    ids=lambda value: str(value),
)
@pytest.mark.filterwarnings("ignore")
def test_head_and_embedding_part_only_where_the_adapter_parts_them(
    bases, tmp_path, settings, untied
):
    adapter = read_adapter(save_adapter(bases["tied"], tmp_path / "a", **settings))
    (tmp_path / "merged").mkdir()
    result = merge_folder(bases["tied"], [(adapter, 1.0)], tmp_path / "merged")
    assert result.untied == untied
    found = compare(bases["tied"], [(adapter, 1.0)], tmp_path / "merged", ROWS)
    assert found.problem(TOLERANCES["float32"]) is None
    assert found.kl_without > 1e-5


def two_adapters(base, tmp_path, **settings):
    folders = [
        save_adapter(base, tmp_path / "a", seed, name, target_modules=LINEARS, **settings)
        for seed, name in ((1, "one"), (2, "two"))
    ]
    return [read_adapter(folder, folder.name) for folder in folders]


def test_weighted_adapters_add_up(bases, tmp_path):
    one, two = two_adapters(bases["plain"], tmp_path)
    (tmp_path / "merged").mkdir()
    chosen = [(one, 0.75), (two, -0.5)]
    assert_merged(bases["plain"], chosen, tmp_path / "merged")
    assert compare(bases["plain"], chosen, tmp_path / "merged", ROWS).kl < 1e-9


def test_adapters_of_heads_and_embeddings_add_up(bases, tmp_path):
    """With these PEFT saves the base's own weights, which are not trained."""
    targets = ["q_proj", "lm_head", "embed_tokens"]
    chosen = [
        (
            read_adapter(
                save_adapter(bases["plain"], tmp_path, seed, name, target_modules=targets), name
            ),
            weight,
        )
        for seed, name, weight in ((1, "one", 0.5), (2, "two", -1.0))
    ]
    assert all("lm_head.weight" in adapter.whole for adapter, _ in chosen)
    (tmp_path / "merged").mkdir()
    assert_merged(bases["plain"], chosen, tmp_path / "merged")
    assert compare(bases["plain"], chosen, tmp_path / "merged", ROWS).kl < 1e-9


def test_dora_adapters_follow_each_other_as_in_peft(bases, tmp_path):
    chosen = [(a, 1.0) for a in two_adapters(bases["plain"], tmp_path, use_dora=True)]
    (tmp_path / "merged").mkdir()
    assert_merged(bases["plain"], chosen, tmp_path / "merged")
    assert compare(bases["plain"], chosen, tmp_path / "merged", ROWS).kl < 1e-9


def test_shards_stay_and_long_tensors_are_merged_in_pieces(bases, tmp_path, monkeypatch):
    monkeypatch.setattr("lora_engine.ops.tensors._VALUES_AT_A_TIME", 100)  # a few rows
    base = tmp_path / "sharded"
    load_plain(bases["tied"]).save_pretrained(base, max_shard_size="20kB")
    adapter = read_adapter(
        save_adapter(base, tmp_path / "a", target_modules=["lm_head", *LINEARS], use_dora=True)
    )
    (tmp_path / "merged").mkdir()
    result = merge_folder(base, [(adapter, 1.0)], tmp_path / "merged")
    files = sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors"))
    assert files == sorted(path.name for path in base.glob("*.safetensors")) and len(files) > 2
    index = json.loads((tmp_path / "merged/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == result.total_bytes
    assert "lm_head.weight" in index["weight_map"]
    assert compare(base, [(adapter, 1.0)], tmp_path / "merged", ROWS).kl < 1e-9


@pytest.mark.parametrize("write", ["merge", "gguf"])
def test_no_more_than_pieces_of_a_tensor_are_in_memory(tmp_path, monkeypatch, write):
    """Of a model of 100 MB in one file; its pages are the file's, which the system may drop."""
    monkeypatch.setattr("lora_engine.ops.tensors._VALUES_AT_A_TIME", 1 << 18)
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "layers": 3, "dtype": torch.bfloat16}
    base = save_tiny_model(tmp_path / "base", **sizes)
    size = (base / "model.safetensors").stat().st_size
    low = {
        f"model.layers.{i}.mlp.{name}_proj": LowRank(
            torch.ones(2, 1024), torch.ones(2048, 2), 1.0, None, False, None
        )
        for i in range(3)
        for name in ("gate", "up")
    }
    adapter = Adapter("default", tmp_path, {}, low, {})
    (tmp_path / "merged").mkdir()
    with anonymous_memory() as grown:
        if write == "merge":
            assert len(merge_folder(base, [(adapter, 1.0)], tmp_path / "merged").changed) == 6
        else:
            weights = MergedWeights(base, [(adapter, 1.0)])
            for name in weights.names():
                weights.tensor(name)
    assert size > 50e6 and grown[0] < 25e6, (size, grown)


@contextmanager
def anonymous_memory():
    """By how many bytes the process's memory, without files', grows at most within it: [bytes]."""

    def now():
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(x for x in lines if x.startswith("RssAnon:")).split()[1])

    def watch():
        while not ended.wait(0.001):
            grown[0] = max(grown[0], now() - before)

    before, grown, ended = now(), [0], threading.Event()
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield grown
    finally:
        ended.set()
        thread.join()


def test_a_conv1d_stores_its_weight_transposed(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    adapter = read_adapter(
        save_adapter(
            tmp_path / "gpt2", tmp_path / "a", target_modules=["c_attn", "c_fc"], use_dora=True,
            fan_in_fan_out=True,
        )
    )  # fmt: skip
    (tmp_path / "merged").mkdir()
    merge_folder(tmp_path / "gpt2", [(adapter, 1.0)], tmp_path / "merged")
    found = compare(tmp_path / "gpt2", [(adapter, 1.0)], tmp_path / "merged", ROWS)
    assert found.kl < 1e-9 and found.kl_without > 1e-6


def test_what_has_no_sum_is_refused(bases, tmp_path):
    one, _ = two_adapters(bases["plain"], tmp_path / "dora", use_dora=True)
    with pytest.raises(UserError, match=r"one=0\.5: the adapter is DoRA"):
        merge_folder(bases["plain"], [(one, 0.5)], tmp_path)
    saved, other = two_adapters(bases["plain"], tmp_path / "saved", modules_to_save=["lm_head"])
    with pytest.raises(UserError, match=r"such as lm_head.weight, .* merge it alone"):
        merge_folder(bases["plain"], [(saved, 1.0), (other, 1.0)], tmp_path)


def test_another_base_is_refused_by_its_shapes(bases, tmp_path):
    adapter = read_adapter(save_adapter(bases["plain"], tmp_path / "a", target_modules=LINEARS))
    wide = save_tiny_model(tmp_path / "wide", hidden_size=64)
    with pytest.raises(
        UserError, match=r"down_proj.weight is \[64, 48\], the adapter .* \[32, 48\]"
    ):
        merge_folder(wide, [(adapter, 1.0)], tmp_path)
    low = save_tiny_model(tmp_path / "low", layers=1)
    with pytest.raises(UserError, match=r"has no tensor model.layers.1\.\S+, which the adapter"):
        merge_folder(low, [(adapter, 1.0)], tmp_path)


def test_a_bias_where_the_base_has_none_is_told(bases, tmp_path):
    adapter = save_adapter(bases["tied"], tmp_path / "a", target_modules=LINEARS, lora_bias=True)
    with pytest.raises(
        UserError, match=r"a: adds a bias to model\.\S+ \(lora_bias\), which has none"
    ):
        merge_folder(bases["tied"], [(read_adapter(adapter), 1.0)], tmp_path)


def broken(folder, **changes):
    """The adapter in `folder` with other settings."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def test_adapters_that_cannot_be_merged_are_told_in_one_line(bases, tmp_path):
    folder = save_adapter(bases["plain"], tmp_path / "a", target_modules=LINEARS)
    tensors = load_file(folder / "adapter_model.safetensors")
    for change, line in (
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"peft_type": "LORA", "init_lora_weights": "pissa"}, "alters the base"),
        ({"init_lora_weights": True, "target_parameters": ["x"]}, "target_parameters is set"),
        ({"target_parameters": None, "layer_replication": [[0, 1]]}, "layer_replication is set"),
        ({"layer_replication": None, "r": 0}, "r is 0"),
        ({"r": "4"}, "r is '4'"),
        ({"r": 4, "lora_alpha": None}, "lora_alpha is None"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_alpha": 8, "alpha_pattern": 5}, "alpha_pattern is 5"),
        ({"alpha_pattern": {"[": 5}}, r"alpha_pattern '\[': unterminated character set"),
        ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern of q_proj is '8'"),
        ({"alpha_pattern": {}, "rank_pattern": {"q_proj": 1.5}}, "rank_pattern of q_proj is 1.5"),
        ({"rank_pattern": {}, "use_dora": True}, "has no vector of magnitudes"),
    ):
        with pytest.raises(UserError, match=line):
            read_adapter(broken(folder, **change))
    broken(folder, use_dora=False)
    first = next(iter(tensors))
    for altered, line in (
        ({k: v for k, v in tensors.items() if k != first}, r"not a pair of matrices"),
        ({**tensors, "base_model.model.x.token_adapter.weight": torch.ones(1)}, "cannot be merged"),
        ({**tensors, "other": torch.ones(1)}, "does not begin with base_model.model"),
        ({**tensors, first: tensors[first] * torch.inf}, "not finite; take an earlier checkpoint"),
    ):
        save_file(altered, folder / "adapter_model.safetensors")
        with pytest.raises(UserError, match=line):
            read_adapter(folder)
    (folder / "adapter_model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(UserError, match="cannot be read, get the complete file"):
        read_adapter(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no adapter_model.safetensors; copy it"):
        read_adapter(folder)


@pytest.mark.parametrize("changes", [{"modules_to_save": 5}, {"use_bdlora": {"a": 1}}], ids=str)
def test_what_peft_cannot_load_is_told_in_one_line(bases, tmp_path, changes):
    folder = save_adapter(bases["plain"], tmp_path / "a", target_modules=LINEARS)
    adapter = read_adapter(folder)
    broken(folder, **changes)
    with pytest.raises(UserError, match="PEFT cannot load this adapter"):
        with_adapters(load_plain(bases["plain"]), [(adapter, 1.0)])


def test_an_adapter_without_some_of_its_weights_is_not_measured_as_whole(bases, tmp_path):
    folder = save_adapter(bases["plain"], tmp_path / "a", target_modules=LINEARS)
    tensors = load_file(folder / "adapter_model.safetensors")
    left = {name: tensor for name, tensor in tensors.items() if "down_proj" not in name}
    save_file(left, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"has no values for a part .*down_proj"):
        with_adapters(load_plain(bases["plain"]), [(read_adapter(folder), 1.0)])


def test_values_that_the_dtype_cannot_hold_are_not_written(bases, tmp_path):
    adapter = read_adapter(save_adapter(bases["half"], tmp_path / "a", target_modules=LINEARS))
    (tmp_path / "merged").mkdir()
    with pytest.raises(UserError, match=r"proj.weight holds values beyond float16's; use --dt"):
        merge_folder(bases["half"], [(adapter, 1e30)], tmp_path / "merged", torch.float16)
    with pytest.raises(UserError, match="not finite"):
        merge_folder(bases["half"], [(adapter, 1e300)], tmp_path / "merged")


def test_a_merge_that_went_wrong_is_noticed(bases, tmp_path):
    adapter = read_adapter(save_adapter(bases["half"], tmp_path / "a", target_modules=LINEARS))
    # As if the adapter had been left out of one weight of many, and of all.
    (tmp_path / "merged").mkdir()
    merge_folder(bases["half"], [(adapter, 1.0)], tmp_path / "merged")
    found = compare(bases["half"], [(adapter, 1.0)], tmp_path / "merged", ROWS)
    assert found.problem(TOLERANCES["bfloat16"]) is None
    unmerged = compare(bases["half"], [(adapter, 1.0)], bases["half"], ROWS)
    assert unmerged.kl == unmerged.kl_without > 0
    assert "100% of what the adapter changes is lost" in unmerged.problem(TOLERANCES["bfloat16"])
