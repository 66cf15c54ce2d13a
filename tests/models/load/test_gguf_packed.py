"""Models on the packed bits of a GGUF file: its numbers, as transformers unpacks them."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lora_engine import UserError, load_model
from lora_engine.models.load.gguf import smollm2_gguf_path
from lora_engine.models.load.gguf_packed import packed_gguf_model
from lora_engine.models.load.gguf_tensors import GgufFile
from lora_engine.models.load.origin import base_of
from lora_engine.models.quantized.linear import QuantizedLinear
from lora_engine.quantization.gguf import TYPES, Gguf
from lora_engine.testing import byte_tokenizer, tiny_llama

gguf = pytest.importorskip("gguf")
HIDDEN, HEADS, KV_HEADS, INNER, VOCABULARY = 256, 4, 2, 256, 300
PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp's converter orders those of Llama's q and k."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def written(path: Path, model: Any, architecture: str = "llama", type: str = "q8_0") -> None:
    """`model` as a GGUF file, its linears in blocks of `type`, its embedding in Q8_0."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    writer.add_array("tokenizer.ggml.numbers", [1, 2, 3])
    state = {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}
    for theirs, ours in PARTS.items():
        for leaf in ("weight", "bias"):
            value = state.get(f"model.layers.0.{ours}.{leaf}")
            if value is None:
                continue
            if architecture == "llama" and theirs in ("attn_q", "attn_k"):
                value = interleaved(value, HEADS if theirs == "attn_q" else KV_HEADS)
            add(writer, f"blk.0.{theirs}.{leaf}", value, type)
    add(writer, "token_embd.weight", state["model.embed_tokens.weight"], "q8_0")
    add(writer, "output_norm.weight", state["model.norm.weight"], type)
    add(writer, "output.weight", state["lm_head.weight"], "q8_0")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add(writer: Any, name: str, value: np.ndarray, type: str) -> None:
    if value.ndim == 1:
        writer.add_tensor(name, value)
        return
    of = gguf.GGMLQuantizationType[type.upper()]
    if TYPES[type].encode is None:  # any codes, under small scales
        blocks = value.size // TYPES[type].values
        codes = np.random.default_rng(0).integers(0, 256, (blocks, TYPES[type].bytes), "uint8")
        for at in TYPES[type].scales:
            codes[:, at : at + 2] = np.full((blocks, 1), 1e-4, "f2").view("uint8")
        data = codes.reshape(value.shape[0], -1)
    else:
        data = gguf.quantize(value, of)
    writer.add_tensor(name, data, raw_dtype=of)


def model_of() -> Any:
    return tiny_llama(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        layers=1,
        heads=HEADS,
        kv_heads=KV_HEADS,
    )


@pytest.fixture
def known_config(monkeypatch: pytest.MonkeyPatch) -> Any:
    """transformers' reading of the metadata, which takes long, is tested with the whole model."""
    config = model_of().config
    monkeypatch.setattr(
        "lora_engine.models.load.gguf_packed.gguf_config",
        lambda path: type(config)(**config.to_dict()),
    )
    return config


def packed(path: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return packed_gguf_model(path, byte_tokenizer(), dtype, torch.device("cpu"), **options)


@pytest.mark.parametrize("type", TYPES)
def test_linears_are_the_file_s_blocks(type: str, known_config: Any, tmp_path: Path) -> None:
    dense = model_of()
    written(tmp_path / "m.gguf", dense, type=type)
    model = packed(tmp_path / "m.gguf").eval()
    for theirs, ours in PARTS.items():
        if "norm" in theirs:
            continue
        layer = model.get_submodule(f"model.layers.0.{ours}")
        assert isinstance(layer, QuantizedLinear) and layer.format == Gguf(type)
        weight = dense.get_submodule(f"model.layers.0.{ours}").weight
        if TYPES[type].encode is not None:  # rows are in the model's order, whatever the file's
            expected = gguf.dequantize(
                gguf.quantize(weight.detach().numpy(), gguf.GGMLQuantizationType[type.upper()]),
                gguf.GGMLQuantizationType[type.upper()],
            )
            assert torch.equal(layer.quantized.dequantize(), torch.from_numpy(expected))
        weight.data = layer.quantized.dequantize()
    embedding = model.model.embed_tokens.weight
    torch.testing.assert_close(embedding, dense.model.embed_tokens.weight, atol=1e-3, rtol=0)
    dense.model.embed_tokens.weight.data = embedding
    dense.lm_head.weight.data = model.lm_head.weight
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, dense.eval()(ids).logits)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_biases_and_norms_of_other_architectures(architecture: str, tmp_path: Path) -> None:
    import transformers

    name = architecture.capitalize()
    config = getattr(transformers, f"{name}Config")(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HIDDEN // HEADS,
    )
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    written(tmp_path / "m.gguf", model, architecture)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora_engine.models.load.gguf_packed.gguf_config", lambda path: config)
        loaded = packed(tmp_path / "m.gguf")
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(loaded.get_parameter(name), parameter), name
    for head in ("q_proj", "k_proj"):
        layer = loaded.model.layers[0].self_attn.get_submodule(head).quantized.dequantize()
        weight = model.model.layers[0].self_attn.get_submodule(head).weight
        torch.testing.assert_close(layer, weight.detach(), atol=3e-3, rtol=0)


def test_it_is_what_transformers_unpacks() -> None:
    """All of SmolLM2, a Q4_1 file, bit for bit."""
    try:
        smollm2_gguf_path()
    except UserError as error:
        pytest.skip(str(error))
    packed, _ = load_model("smollm2", dtype="bfloat16", device="cpu", keep_quantized=True)
    dense, _ = load_model("smollm2", dtype="bfloat16", device="cpu")
    state = dense.state_dict()
    found = 0
    for name, module in packed.named_modules():
        if isinstance(module, QuantizedLinear):
            assert torch.equal(module.quantized.dequantize(), state[f"{name}.weight"]), name
            found += 1
    assert found == 30 * 7
    for name, parameter in packed.named_parameters():
        if parameter.is_floating_point():
            assert torch.equal(parameter, state[name]), name
    for name, buffer in packed.named_buffers():
        assert torch.equal(buffer, dense.get_buffer(name)), name
    assert base_of(packed) == base_of(dense)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(packed.generation_config, key) == getattr(dense.generation_config, key)
    assert packed.config.tie_word_embeddings
    assert packed.lm_head.weight is packed.model.embed_tokens.weight


def test_frequencies_of_llama_3(known_config: Any, tmp_path: Path) -> None:
    written(tmp_path / "m.gguf", model_of())
    plain = packed(tmp_path / "m.gguf").model.rotary_emb.inv_freq
    factors = torch.linspace(1, 8, len(plain))
    file = GgufFile(tmp_path / "m.gguf")

    def with_factors(self: GgufFile, path: Path) -> None:
        vars(self).update(vars(file))
        first = next(iter(file.tensors.values()))
        self.tensors = {**file.tensors, "rope_freqs.weight": first}

    read = GgufFile.read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GgufFile, "__init__", with_factors)
        patch.setattr(
            GgufFile, "read", lambda self, n: factors if n.startswith("rope") else read(self, n)
        )
        divided = packed(tmp_path / "m.gguf").model.rotary_emb.inv_freq
    torch.testing.assert_close(divided, plain / factors)


def test_files_that_do_not_fit_are_refused(known_config: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"

    def refused(match: str) -> None:
        with pytest.raises(UserError, match=match) as caught:
            packed(path)
        assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)

    written(path, model_of())
    whole = path.read_bytes()
    path.write_bytes(whole[:-64])
    refused("ends after .* bytes, within output")
    path.write_bytes(whole[:300])
    refused("ends within its header|more than its size")
    path.write_bytes(b"GGML" + whole[4:])
    refused("is not a GGUF file")
    name = b"blk.0.ffn_up.weight"
    at = whole.index(name) + len(name)  # its dimensions, two sizes, and its type follow
    path.write_bytes(whole[: at + 20] + struct.pack("<I", 23) + whole[at + 24 :])
    refused(r"blk\.0\.ffn_up\.weight is of type IQ4_XS, trained on packed are Q4_0, .*keep_quant")
    path.write_bytes(whole[: at + 4] + struct.pack("<Q", 128) + whole[at + 12 :])
    refused(r"ffn_up\.weight is \[256, 128\], its metadata says \[256, 256\]")
    path.write_bytes(whole.replace(name, b"blk.0.ffn_xx.weight"))
    refused(r"lacks blk\.0\.ffn_up\.weight; get the complete")
    path.write_bytes(whole.replace(b"llama", b"llamb"))
    refused("is a llamb, trained on packed are llama, qwen2, qwen3; leave")
    path.write_bytes(whole)
    start = GgufFile(path).tensors["blk.0.attn_q.weight"].start
    path.write_bytes(whole[:start] + b"\x00\x7e" + whole[start + 2 :])  # a NaN of float16
    refused(r"blk\.0\.attn_q\.weight has values that are not finite")


def test_options_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give quantize or keep_quantized, not both"):
        load_model("smollm2", quantize="nf4", keep_quantized=True)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="keep_quantized is for GGUF files"):
        load_model(tmp_path, keep_quantized=True)


def test_types_of_tensors_are_those_of_gguf() -> None:
    from lora_engine.models.load import gguf_tensors

    names = {kind.value: kind.name for kind in gguf.GGMLQuantizationType}
    for number, name in {**gguf_tensors._PACKED, **gguf_tensors._OTHERS}.items():
        assert names[number] == name.upper()
    for number, dtype in gguf_tensors._PLAIN.items():
        assert names[number] == {4: "F32"}.get(dtype.itemsize, names[number])


def test_linears_that_are_not_packed_stay_dense(known_config: Any, tmp_path: Path) -> None:
    model = model_of()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "add", lambda w, name, value, _: w.add_tensor(name, value))
        written(tmp_path / "m.gguf", model)
    loaded = packed(tmp_path / "m.gguf")
    assert not any(isinstance(module, QuantizedLinear) for module in loaded.modules())
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
