"""What is recognised by name in transformers' models. What a module computes is tried besides."""

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

# Where a module of this name stands beside attention, or a gated MLP, it usually feeds that.
NORM_OF_ATTENTION = "input_layernorm"
NORM_OF_MLP = "post_attention_layernorm"

# The parts of a gated MLP, down_proj(act_fn(gate_proj(x)) * up_proj(x)).
GATED_MLP_PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")

# RMSNorm: in the class's name; and what its eps is called, the first that there is.
RMS_NORM = "RMSNorm"
RMS_NORM_EPS = ("variance_epsilon", "eps")

# Settings by which models change their logits, or what their head reads; 1 changes nothing.
LOGIT_FACTORS = ("logits_scaling", "logit_scale", "lm_head_multiplier")

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
