"""Small tokenizers of the two common families, trained on a few lines."""

from chat_templates import CHATML_DEFAULT_SYSTEM, SPECIAL_TOKENS
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "system user assistant You are a helpful AI assistant. Hello there, how are you? I am fine.",
    "What is the capital of France? The capital of France is Paris.\n\nThanks!\n",
    "def add(a, b):\n    return a + b\n\nAnswer: yes. Question: no? Yes. No. Sure.  Well...",
] * 4


def _wrap(tokenizer: Tokenizer, template: str | None, **special: str) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special
    )
    wrapped.chat_template = template
    return wrapped


def make_byte_level(
    template: str | None = CHATML_DEFAULT_SYSTEM,
    eos_token: str = "<|im_end|>",
    *,
    writes_bos: bool = False,
) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2, Llama 3, Qwen and SmolLM2 have."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if writes_bos:
        tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return _wrap(
        tokenizer,
        template,
        bos_token="<s>",
        eos_token=eos_token,
        extra_special_tokens=list(SPECIAL_TOKENS),
    )


def make_space_prefixing(template: str | None = None) -> PreTrainedTokenizerFast:
    """Puts a space before whatever it encodes, as Llama 2's SentencePiece tokenizer does."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    words = [word for line in CORPUS for word in line.replace("\n", " ").split()]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=list("▁\n[]/INST#:"),
        show_progress=False,
    )
    tokenizer.train_from_iterator(words, trainer)
    return _wrap(tokenizer, template, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def make_first_prefixing(template: str | None = None) -> PreTrainedTokenizerFast:
    """Puts a space before the first word of the whole only, as newer SentencePiece ones do."""
    alphabet = sorted({*"▁[]/<>\n", *"".join(CORPUS), *"".join(SPECIAL_TOKENS)})
    vocabulary = {t: i for i, t in enumerate(dict.fromkeys(["<unk>", "<s>", "</s>", *alphabet]))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    return _wrap(tokenizer, template, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
