"""A tokenizer of transformers as llama.cpp reads it: tokens, merges or scores, special tokens.

Byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM) is llama.cpp's model "gpt2", with the name of how text
is split before merging. BPE over characters with bytes for the rest (Llama 2, Mistral, Gemma) is
its model "llama", which merges the pair whose token has the highest score first: here minus the
token's place among the merges.
"""

import json
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any

from lora_engine.errors import UserError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_AFTER = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# What the pattern that splits text is called: `tokenizer.ggml.pre`.
_PATTERNS = {
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_AFTER}": "llama-bpe",
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_AFTER}": "qwen2",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "tekken",
}
_WORST_SCORE = -1e4


class TokenType(IntEnum):
    """Of llama.cpp's vocabulary."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def add_vocabulary(writer: Any, tokenizer: Any, rows: int, stops: Sequence[int]) -> None:
    """Adds the tokenizer's metadata to a `gguf.GGUFWriter`.

    rows: of the embedding; tokens without a name fill them up. stops: tokens that end an answer by
    the model's generation settings. Raises UserError for a tokenizer that llama.cpp has no model
    for, and one with more tokens than rows.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError("the tokenizer has no tokenizer.json, which GGUF needs; save a fast one")
    content = json.loads(backend.to_str())
    model = content["model"]
    if model["type"] != "BPE":
        raise UserError(f"the tokenizer is {model['type']}; GGUF files are written for BPE alone")
    tokens, types = _tokens(content, tokenizer, rows)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    if not merges:
        raise UserError("the tokenizer has no merges, and llama.cpp reads no such; use --format hf")
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_token_types(_with_bytes(tokens, types, model.get("unk_token")))
        writer.add_add_space_prefix(_prefixes_space(content))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(split_name(content))
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges(merges)
    _add_special(writer, tokenizer, stops)
    if tokenizer.chat_template:
        template = tokenizer.chat_template
        if isinstance(template, Mapping):
            template = [{"name": name, "template": text} for name, text in template.items()]
        writer.add_chat_template(template)


def split_name(content: Mapping[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer splits text, out of its tokenizer.json.

    Raises UserError where it has none.
    """
    steps = content.get("pre_tokenizer") or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    kinds = [step.get("type") for step in steps]
    last = steps[-1]
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        if kinds == ["ByteLevel"] and last.get("use_regex", True):
            return "gpt-2"
        digits_apart = steps[0].get("individual_digits") and last.get("use_regex", True)
        if kinds == ["Digits", "ByteLevel"] and digits_apart:
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True):
            pattern = steps[0]["pattern"].get("Regex")
            if pattern in _PATTERNS:
                return _PATTERNS[pattern]
    raise UserError(
        f"the tokenizer splits text ({', '.join(map(str, kinds))}) in a way that llama.cpp has no "
        "name for here; GGUF files are written for GPT-2's, Llama 3's, Qwen's, Mistral's and "
        "SmolLM's, give a model with one of these"
    )


def _tokens(content: Mapping[str, Any], tokenizer: Any, rows: int) -> tuple[list[str], list[int]]:
    vocabulary = tokenizer.get_vocab()
    if max(vocabulary.values()) >= rows:
        raise UserError(
            f"the tokenizer has tokens up to {max(vocabulary.values())}, the embedding {rows} "
            "rows; get the tokenizer of this model"
        )
    tokens = [f"[PAD{i}]" for i in range(rows)]
    types = [int(TokenType.UNUSED)] * rows
    for token, i in vocabulary.items():
        tokens[i], types[i] = token, int(TokenType.NORMAL)
    for added in content["added_tokens"]:
        i, text = added["id"], added["content"]
        control = added["special"] or _looks_like_control(text)
        if not control:
            text = text.replace("▁", " ")
        tokens[i] = text
        types[i] = int(TokenType.CONTROL if control else TokenType.USER_DEFINED)
    return tokens, types


def _looks_like_control(text: str) -> bool:
    """Whether llama.cpp takes an added token for one that no text means."""
    known = text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
    return known or (text[:2] == "<|" and text[-2:] == "|>") or text.startswith("<unused")


def _scores(tokens: Sequence[str], merges: Sequence[str]) -> list[float]:
    places: dict[str, int] = {}
    for merge in merges:
        places.setdefault(merge.replace(" ", "", 1), len(places))
    return [-float(places[t]) if t in places else _WORST_SCORE for t in tokens]


def _with_bytes(tokens: Sequence[str], types: Sequence[int], unknown: str | None) -> list[int]:
    marked = list(types)
    for i, token in enumerate(tokens):
        if token == unknown:
            marked[i] = int(TokenType.UNKNOWN)
        elif types[i] == TokenType.NORMAL and token[:3] == "<0x" and len(token) == 6:
            marked[i] = int(TokenType.BYTE)
    return marked


def _prefixes_space(content: Mapping[str, Any]) -> bool:
    """Whether a space is put before the first word."""
    normalizer, splitter = content.get("normalizer") or {}, content.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    if any(step.get("type") == "Prepend" for step in steps):
        return True
    return splitter.get("type") == "Metaspace" and splitter.get("prepend_scheme") != "never"


def _add_special(writer: Any, tokenizer: Any, stops: Sequence[int]) -> None:
    special = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unk": tokenizer.unk_token_id,
        "pad": tokenizer.pad_token_id,
        "eot": next((stop for stop in stops if stop != tokenizer.eos_token_id), None),
    }
    for name, token in special.items():
        if token is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    writer.add_add_bos_token(puts_start(tokenizer))
    ids, bare = tokenizer.encode("a"), tokenizer.encode("a", add_special_tokens=False)
    writer.add_add_eos_token(ids[-1:] != bare[-1:] and ids[-1:] == [special["eos"]])


def puts_start(tokenizer: Any) -> bool:
    """Whether the tokenizer puts its start token before a text; llama.cpp and Ollama then do."""
    ids, bare = tokenizer.encode("a"), tokenizer.encode("a", add_special_tokens=False)
    return bool(ids[:1] != bare[:1] and ids[:1] == [tokenizer.bos_token_id])
