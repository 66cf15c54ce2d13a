"""What is recognised by name in transformers' models. What a module computes is tried besides."""

from lora_engine.models.families.modules import Config

# Attention layers whose forward is: project to q, k, v; normalise heads where there is q_norm;
# rotate all of each head (half-rotated); attend, with a window where the layer has one; project.
ATTENTION_CLASSES = frozenset(
    {"LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention"}
)

# Decoder layers whose forward is x + self_attn(input_layernorm(x)), then the same with
# post_attention_layernorm and mlp.
DECODER_CLASSES = frozenset(
    {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}
)

# Models whose forward is: embed; make cos and sin of the positions; run those layers; norm.
BACKBONE_CLASSES = frozenset({"LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model"})

# Rotations whose tables change with the length of what was read, so that cached keys grow stale.
CHANGING_ROTATIONS = ("dynamic", "longrope")

# Where a module of this name stands beside attention, or a gated MLP, it usually feeds that.
NORM_OF_ATTENTION = "input_layernorm"
NORM_OF_MLP = "post_attention_layernorm"

# RMSNorm: in the class's name.
RMS_NORM = "RMSNorm"

# Settings that say how many tokens attention sees: windows and chunks.
ATTENTION_SPANS = (
    "sliding_window",
    "attention_chunk_size",
    "local_attention",
    "attention_window_size",
)

# Settings that say how many experts a token is sent to.
EXPERTS_OF_A_TOKEN = (
    "num_experts_per_tok",
    "moe_topk",
    "moe_top_k",
    "top_k_experts",
    "num_experts_per_token",
)


def logit_factor(config: Config) -> str | None:
    """The setting by which a model changes its logits, or what its head reads, if it has one."""
    factors = {
        "logits_scaling": getattr(config, "logits_scaling", None),
        "logit_scale": getattr(config, "logit_scale", None),
        "lm_head_multiplier": getattr(config, "lm_head_multiplier", None),
    }
    return next((name for name, factor in factors.items() if factor not in (None, 1)), None)
