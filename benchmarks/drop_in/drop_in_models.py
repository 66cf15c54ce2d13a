"""Small random models of transformers' own classes, for `drop_in_grid.py`."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

LENGTH = 40  # longer than the windows (6) and chunks (8)
LONG = 130  # than the windows and chunks of the rows named "long"
MOST_PARAMETERS = 3_000_000

# Whatever of this a family's configuration has, under its own names for it.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size",), 97),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "dff"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "dense_intermediate_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 256),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "mamba_d_state"), 16),
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_decoder": True,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "sliding_window": 6,
    "attention_chunk_size": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
}
_NO_HEAD_DIM: dict[str, Any] = {"head_dim": None}
_LATENT: dict[str, Any] = {"head_dim": 8, "num_key_value_heads": 4}
_MAMBA: dict[str, Any] = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1}
_DELTA: dict[str, Any] = {
    "layer_types": ["full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 16,
}
_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_TOWER: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "intermediate_size"), 32),
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
}
_ZAMBA_LAYERS = ["mamba", "hybrid", "hybrid"]
# What families want beyond, or instead of, _SIZES.
_OWN: dict[str, dict[str, Any]] = {
    "axk1": {**_LATENT, "n_group": 1, "topk_group": 1},
    "bailing_hybrid": {**_LATENT, "layer_types": ["linear_attention", "full_attention"]},
    "axk2": _LATENT,
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": dict.fromkeys(("sliding_attention", "full_attention"), _PLAIN_ROPE),
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "hidden_size": 32, "moe_num_experts": 4},
    },
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "deepseek_v32": _LATENT,
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
        "vocab_size_per_layer_input": 97,
        "hidden_size_per_layer_input": 8,
    },
    "gemma4_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "vocab_size_per_layer_input": 97,
        "hidden_size_per_layer_input": 8,
    },
    "git": {"vision_config": {**_TOWER, "image_size": 32}},
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": _LATENT,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 6},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"]},
    "kimi_linear": {
        "num_key_value_heads": 4,
        "layer_types": ["full_attention", "linear_attention"],
        "linear_head_dim": 8,
        "linear_num_heads": 4,
    },
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {**_LATENT, "expert_ffn_hidden_size": 16, "zero_expert_num": 1},
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 16, "n_groups": 1},
    "minicpm3": _LATENT,
    "mistral4": {"head_dim": 16, "num_key_value_heads": 4},
    "csm_depth_decoder_model": {"num_codebooks": 256, "backbone_hidden_size": 32},
    "musicgen_decoder": {"num_codebooks": 2, "pad_token_id": 97, "bos_token_id": 97},
    "musicgen_melody_decoder": {"num_codebooks": 2, "pad_token_id": 97, "bos_token_id": 97},
    "phi4_multimodal": {
        "original_max_position_embeddings": 256,
        "vision_config": {**_TOWER, "crop_size": 28, "image_size": 28, "image_token_id": 95},
        "audio_config": {
            **dict.fromkeys(("hidden_size", "intermediate_size", "nemo_conv_channels"), 32),
            **dict.fromkeys(("ext_pw_out_channel", "depthwise_separable_out_channel"), 32),
            "num_blocks": 2,
            "num_attention_heads": 4,
            "audio_token_id": 96,
        },
    },
    "qwen3_5_text": _DELTA,
    "qwen3_5_moe_text": _DELTA,
    "qwen3_next": _DELTA,
    "recurrent_gemma": {"num_hidden_layers": 3, "attention_window_size": 8},
    "reformer": {
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [8, 8],
        "attn_layers": ["local", "local"],
        "attention_head_size": 8,
        "local_attn_chunk_length": 8,
    },
    "roc_bert": dict.fromkeys(("pronunciation_vocab_size", "shape_vocab_size"), 50),
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "youtu": _LATENT,
    "zamba": {"num_hidden_layers": 3, "layer_types": _ZAMBA_LAYERS},
    "zamba2": {
        "num_hidden_layers": 3,
        "layer_types": _ZAMBA_LAYERS,
        "layers_block_type": _ZAMBA_LAYERS,
        "mamba_ngroups": 1,
    },
    "zaya": {"num_experts_per_tok": 1},
}
# Configurations around that of a text model: its type, and what it is given.
_AROUND: dict[str, tuple[str, dict[str, Any]]] = {
    "fuyu": ("persimmon", {}),
    "gemma4_assistant": ("gemma4_text", {"num_kv_shared_layers": 2}),
    "gemma4_unified_assistant": ("gemma4_unified_text", {"num_kv_shared_layers": 2}),
}
_ROPE = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 16},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "longrope": {
        "rope_type": "longrope",
        "factor": 8.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0, 1.5, 2.0, 2.5],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
    },
}


@dataclass(frozen=True)
class Configuration:
    """One row of the grid: a class of transformers and what its configuration is given."""

    name: str
    model_type: str
    model_class: str
    given: dict[str, Any] = field(default_factory=dict)
    kind: str = "causal"  # or "seq2seq", "classification", "masked"; and see drop_in_cells.py

    def build(self) -> Any:
        """The model in float32 with random weights, the same on every call; on no GPU."""
        config = small_config(self.model_type, self.given)
        model_class = getattr(transformers, self.model_class)
        with torch.device("meta"):
            parameters = sum(p.numel() for p in model_class(config).parameters())
        if parameters > MOST_PARAMETERS:
            raise ValueError(f"{parameters} parameters: its configuration has no small form here")
        torch.manual_seed(0)
        model = model_class(config).float()
        _spread(model)
        return model


def small_config(model_type: str, given: dict[str, Any]) -> Any:
    """A configuration of `model_type` (its text part) with few and narrow layers, no dropout."""
    if model_type in _AROUND:
        inner, inner_given = _AROUND[model_type]
        return CONFIG_MAPPING[model_type](text_config=small_config(inner, inner_given), **given)
    text = CONFIG_MAPPING[model_type]()
    decoder = text.get_text_config() if model_type not in ("t5", "bart") else text
    config_class = type(decoder)
    names = {*decoder.to_dict(), *(config_class.attribute_map or {})}
    sizes = {k: v for k, v in {**_SIZES, **_OWN.get(model_type, {})}.items() if k in names}
    config = config_class(**(sizes | given))
    for name, value in vars(config).items():
        if isinstance(value, float) and ("drop" in name):
            setattr(config, name, 0.0)
    return config


def _spread(model: nn.Module) -> None:
    """Weights under which an error anywhere shows in the result."""
    embeddings = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2 and parameter not in embeddings:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
            elif parameter.dim() == 3:
                parameter.normal_(0, 0.2)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


# Classes of which those of their text part, or with inputs of their own (`_OTHER_INPUTS`), are rows
# of their own. And names under which a class comes a second time.
_SKIPPED = frozenset(
    {"dots3_note", "gemma3", "gemma3n", "gemma4", "gemma4_unified", "got_ocr2", "gpt-sw3"}
    | {"internlm3", "iquestcoder", "llama4", "moss_transcribe_diarize", "musicgen"}
    | {"musicgen_melody", "qwen3_5", "qwen3_5_moe", "qwen4_exp"}
)


def configurations() -> Iterator[Configuration]:
    """Every row: each family of causal language models once, then variants of some."""
    for model_type, model_class in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        if model_type in _SKIPPED:
            continue
        yield Configuration(model_type, model_type, model_class)
    for name, given in _ROPE.items():
        options = {"rope_parameters": {"rope_theta": 10000.0, **given}}
        yield Configuration(f"llama, {name}", "llama", "LlamaForCausalLM", options)
    for name, model_type, model_class, options in _VARIANTS:
        yield Configuration(name, model_type, model_class, options)
    for model_type, model_class, kind in _OTHER_INPUTS:
        yield Configuration(model_type, model_type, model_class, kind=kind)
    for model_type, model_class in (
        ("llama", "LlamaForSequenceClassification"),
        ("qwen3", "Qwen3ForSequenceClassification"),
        ("gpt2", "GPT2ForSequenceClassification"),
        ("bert", "BertForSequenceClassification"),
    ):
        name = f"{model_type}, classification"
        options = {"is_decoder": False} if model_type == "bert" else {}
        yield Configuration(name, model_type, model_class, options, "classification")
    yield Configuration("bert, masked", "bert", "BertForMaskedLM", {"is_decoder": False}, "masked")
    modern = "ModernBertForMaskedLM"
    yield Configuration(
        "modernbert, masked", "modernbert", modern, {"local_attention": 8}, "masked"
    )
    t5 = {"d_kv": 8, "decoder_start_token_id": 0}
    yield Configuration("t5", "t5", "T5ForConditionalGeneration", t5, "seq2seq")
    yield Configuration("bart, seq2seq", "bart", "BartForConditionalGeneration", {}, "seq2seq")


# Of causal language models that the mapping lacks, or whose inputs are not tokens of a text.
_OTHER_INPUTS = [
    ("mistral4", "Mistral4ForCausalLM", "causal"),
    ("clvp_decoder", "ClvpForCausalLM", "causal"),
    ("csm_depth_decoder_model", "CsmDepthDecoderForCausalLM", "depth"),
    ("musicgen_decoder", "MusicgenForCausalLM", "codebooks"),
    ("musicgen_melody_decoder", "MusicgenMelodyForCausalLM", "codebooks"),
]

_VARIANTS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("llama, tied", "llama", "LlamaForCausalLM", {"tie_word_embeddings": True}),
    ("llama, biases", "llama", "LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    ("llama, one head", "llama", "LlamaForCausalLM", {"num_key_value_heads": 1}),
    ("llama, gelu", "llama", "LlamaForCausalLM", {"hidden_act": "gelu"}),
    ("llama, relu", "llama", "LlamaForCausalLM", {"hidden_act": "relu"}),
    ("mistral, no window", "mistral", "MistralForCausalLM", {"sliding_window": None}),
    ("mistral, long window", "mistral", "MistralForCausalLM", {"sliding_window": 100}),
    (
        "qwen2, window in layer 1",
        "qwen2",
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "max_window_layers": 1},
    ),
    (
        "qwen3, window in layer 1",
        "qwen3",
        "Qwen3ForCausalLM",
        {"use_sliding_window": True, "max_window_layers": 1},
    ),
    (
        "gemma3, both ways",
        "gemma3_text",
        "Gemma3ForCausalLM",
        {"use_bidirectional_attention": True},
    ),
    ("gemma2, no caps", "gemma2", "Gemma2ForCausalLM", {"attn_logit_softcapping": None}),
    ("llama4, long chunk", "llama4_text", "Llama4ForCausalLM", {"attention_chunk_size": 100}),
    ("mixtral, routers' loss", "mixtral", "MixtralForCausalLM", {"output_router_logits": True}),
    ("falcon, alibi", "falcon", "FalconForCausalLM", {"alibi": True}),
    ("falcon, new decoder", "falcon", "FalconForCausalLM", {"new_decoder_architecture": True}),
    ("stablelm, parallel", "stablelm", "StableLmForCausalLM", {"use_parallel_residual": True}),
    ("stablelm, q norms", "stablelm", "StableLmForCausalLM", {"qk_layernorm": True}),
    ("phi, q norms", "phi", "PhiForCausalLM", {"qk_layernorm": True}),
    ("cohere, q norms", "cohere", "CohereForCausalLM", {"use_qk_norm": True}),
    ("granite, scaled", "granite", "GraniteForCausalLM", {"logits_scaling": 8.0}),
    ("olmo, clipped", "olmo", "OlmoForCausalLM", {"clip_qkv": 0.5}),
    ("gpt2, scaled by layer", "gpt2", "GPT2LMHeadModel", {"scale_attn_by_inverse_layer_idx": True}),
    ("smollm3, no rope", "smollm3", "SmolLM3ForCausalLM", {"no_rope_layers": [1, 0]}),
]
