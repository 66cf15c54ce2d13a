"""Models of which no GGUF file is written: llama.cpp would compute something else with it."""

import pytest
import torch
from small_ggufs import MODELS, byte_level, save_model, written

from lora_engine.errors import UserError
from lora_engine.export.gguf import encode
from lora_engine.export.llama_cpp import LlamaCpp


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level("qwen2")


LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "setting", "value"),
    [
        ("llama", "hidden_act", "gelu"),
        ("qwen2", "hidden_act", "relu"),
        ("gemma2", "hidden_activation", "silu"),
        ("qwen3", "attention_bias", True),
        ("smollm3", "mlp_bias", True),
        ("gemma3", "attention_bias", True),
        ("qwen3", "rope_parameters", LLAMA3),
        ("gemma3", "use_bidirectional_attention", True),
    ],
)
def test_settings_that_no_file_can_tell_llama_cpp(tmp_path, tokenizer, family, setting, value):
    """It would compute something else with such a file, or could not load it."""
    folder = save_model(tmp_path / "model", tokenizer, num_hidden_layers=1, **{
        k: v for k, v in MODELS[family].items() if k != "num_hidden_layers"})  # fmt: skip
    with pytest.raises(UserError, match=r"which llama.cpp's \w+ has not; use --format hf"):
        written(folder, tmp_path / "m.gguf", **{setting: value})
    assert not (tmp_path / "m.gguf").exists()


def test_what_llama_cpp_has_not_is_told(tmp_path, tokenizer):
    folder = save_model(tmp_path / "model", tokenizer, **MODELS["smollm3"])
    target = tmp_path / "m.gguf"
    with pytest.raises(UserError, match=r"model_type phi9 has no GGUF export here; .* --format hf"):
        written(folder, target, model_type="phi9")
    with pytest.raises(UserError, match="no_rope_layers are not those of the published models"):
        written(folder, target, no_rope_layers=[1, 1, 1, 1])
    with pytest.raises(UserError, match="rope_type longrope has no GGUF export"):
        written(folder, target, rope_parameters={"rope_type": "longrope", "rope_theta": 1.0})
    with pytest.raises(UserError, match="tensor w holds values that are not finite"):
        encode(torch.tensor([[float("nan")] * 32]), "Q8_0", "w")
    with pytest.raises(UserError, match=r"values beyond float16's; use --type bf16"):
        encode(torch.full((1, 32), 1e6), "F16", "w")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\1" * 100)
    pytest.importorskip("xllamacpp")
    with pytest.raises(UserError, match=r"broken.gguf: llama.cpp cannot load it"):
        LlamaCpp(tmp_path / "broken.gguf")
