"""Small models of each family and small tokenizers of each kind that llama.cpp has names for."""

from pathlib import Path

import gguf
import torch
from chat_templates import CHATML_DEFAULT_SYSTEM
from small_tokenizers import CORPUS
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from lora_engine.export.gguf import Written, write_gguf
from lora_engine.export.gguf_vocabulary import _PATTERNS
from lora_engine.export.verify import load_plain
from lora_engine.export.weights import MergedWeights

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # so that the likeliest token is so by a margin
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# By name: what AutoConfig.for_model is given besides SIZES.
MODELS = {
    "llama": {"model_type": "llama", "attention_bias": True, "rope_parameters": LLAMA3_ROPE},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3"},
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 4},
    "gemma2": {"model_type": "gemma2", "query_pre_attn_scalar": 16, "sliding_window": 16},
    "gemma3": {
        "model_type": "gemma3_text", "num_hidden_layers": 6, "query_pre_attn_scalar": 16,
        "sliding_window": 16,
    },
}  # fmt: skip


def save_model(folder: Path, tokenizer: PreTrainedTokenizerFast, **settings) -> Path:
    """A random model for `tokenizer`, with that, in `folder`."""
    torch.manual_seed(0)
    special = {"bos_token_id": 1, "eos_token_id": 4, "pad_token_id": None}
    rows = (len(tokenizer) + 31) // 32 * 32  # more than there are tokens
    kind = {**SIZES, **special, **settings, "vocab_size": rows}
    config = AutoConfig.for_model(kind.pop("model_type", "llama"), **kind)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "bias")):
                parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def byte_level(split: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE that splits text as llama.cpp's `split` does."""
    patterns = {name: pattern for pattern, name in _PATTERNS.items()}
    tokenizer = Tokenizer(models.BPE())
    alone = pre_tokenizers.ByteLevel(add_prefix_space=False)
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    if split == "smollm":
        steps = [pre_tokenizers.Digits(individual_digits=True), alone]
    elif split in patterns:
        steps.insert(0, pre_tokenizers.Split(Regex(patterns[split]), "isolated"))
    tokenizer.pre_tokenizer = alone if split == "gpt-2" else pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*CORPUS, "12345 678 90"], trainer)
    return _wrap(tokenizer, bos_first=split == "llama-bpe")


def with_byte_fallback(*, prefix: bool) -> PreTrainedTokenizerFast:
    """BPE over characters, bytes for the rest; a space before what is encoded with `prefix`."""
    training = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    training.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    training.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>"], show_progress=False)
    training.train_from_iterator(CORPUS, trainer)
    learned = training.get_vocab(with_added_tokens=False)
    words = [t for t in sorted(learned, key=learned.__getitem__) if t not in SPECIAL]
    vocabulary = [*SPECIAL, *(f"<0x{i:02X}>" for i in range(256)), *words]
    merges = []
    for word in words:
        for cut in range(1, len(word)):
            if word[:cut] in learned and word[cut:] in learned:
                merges.append((word[:cut], word[cut:]))
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(vocabulary)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    steps = [normalizers.Prepend("▁"), replace] if prefix else [replace]
    tokenizer.normalizer = normalizers.Sequence(steps)
    undo = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*undo, decoders.Strip(" ", 1, 0)] if prefix else undo)
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL])
    return _wrap(tokenizer, bos_first=True)


def _wrap(tokenizer: Tokenizer, *, bos_first: bool) -> PreTrainedTokenizerFast:
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    if bos_first:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        bos_token="<s>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
    )
    wrapped.chat_template = CHATML_DEFAULT_SYSTEM
    return wrapped


def as_read(folder: Path, tensors) -> torch.nn.Module:
    """The Llama model in `folder` in float32, with the weights that a file's tensors stand for."""
    model = load_plain(folder).float()
    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    counts = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    values = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in tensors}
    for name, parameter in model.named_parameters():
        weight = torch.from_numpy(values[names.get_name(name, try_suffixes=(".weight",))])
        heads = counts.get(name.split(".")[-2])
        if heads is not None:  # neighbouring rows of a head back into its halves
            weight = weight.view(heads, -1, 2, weight.shape[-1]).transpose(1, 2)
        parameter.data.copy_(weight.reshape(parameter.shape))
    return model


def written(folder: Path, path: Path, kind: str = "f32", **changes: object) -> Written:
    """The model in `folder`, with these settings changed, as a GGUF file of the type `kind`."""
    config = AutoConfig.from_pretrained(folder)
    for name, value in changes.items():
        setattr(config, name, value)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return write_gguf(MergedWeights(folder), config, tokenizer, path, kind, name="a model")
