"""What llama.cpp computes with a GGUF file, through the package xllamacpp, beside transformers."""

import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_engine.errors import UserError
from lora_engine.export.gguf_vocabulary import puts_start
from lora_engine.export.ollama import CONVERSATIONS, render

# Least share of positions with the same likeliest token, beside the adapter on: of small models,
# which lose most.
TOP1 = {
    "f32": 0.99,
    "f16": 0.99,
    "bf16": 0.95,
    "q8_0": 0.9,
    "q6_k": 0.9,
    **dict.fromkeys(("q5_k", "q5_1", "q5_0"), 0.75),
    **dict.fromkeys(("q4_k", "q4_1", "q4_0"), 0.65),
    "mxfp4": 0.5,
}
# The same where the adapter on is decided: what these types lose moves near ties alone.
TOP1_DECIDED = {"f32": 0.99, "f16": 0.99, "bf16": 0.97, "q8_0": 0.97}
# And of llama.cpp with the file's weights in float32 beside transformers with them: but for ties.
TOP1_EXACT = 0.98
LOGPROB_EXACT = 0.01  # mean, in nats; of SmolLM2 it is 0.0001
POSITIONS = 200
WRITTEN = 24  # tokens of a greedy text
# Nats between the two likeliest tokens from which on a position is decided. llama.cpp rounds
# activations to 8 bits, which moves log-probabilities of small models by 0.05 on the average, and
# not by the same when a prompt is read at once or token by token: closer tokens it may take the one
# or the other of.
DECIDED = 0.25

# What tokenizers disagree about: white space, digits, other scripts, symbols of several bytes.
TEXTS = (
    "Hello world, it's 12345 and 3.14!",
    "  two  spaces\tand a tab\n\n\nthree lines\r\nend ",
    "def f(x):\n    return x**2  # naïve café\n",
    "Ünïcödé — “quotes” … 你好，世界 🎉 مرحبا नमस्ते",
    "don't we'll I'M THEY'RE 1st 2nd 100,000.00",
    "",
)


@dataclass(frozen=True)
class Likeliest:
    """Next tokens beside a model's. positions: how many are compared. top1: share with the same
    likeliest token. logprob: mean difference of that token's log-probability, in nats. decided:
    positions where the model's two likeliest tokens are DECIDED apart or more. top1_decided: share
    of these with the same likeliest token, 1 if there are none."""

    positions: int
    top1: float
    logprob: float
    decided: int
    top1_decided: float


@dataclass(frozen=True)
class Agreement(Likeliest):
    """llama.cpp beside a model. texts: tokenized alike. conversations: written alike by the chat
    template. written: tokens of llama.cpp's greedy text, of which written_alike are the model's
    likeliest too; elsewhere that is at most `parted` nats over the one that llama.cpp takes."""

    texts: int
    conversations: int
    written: int
    written_alike: int
    parted: float


def is_installed() -> bool:
    """Whether llama.cpp can be asked here."""
    return find_spec("xllamacpp") is not None


class LlamaCpp:
    """A GGUF file loaded by llama.cpp on the CPU; adapter: a GGUF LoRA adapter on top of it.

    context: the most tokens that are asked about at once. Raises UserError if it cannot be loaded.
    """

    def __init__(self, path: Path, *, adapter: Path | None = None, context: int = 1024) -> None:
        if not is_installed():
            raise UserError("llama.cpp is not installed; run: pip install xllamacpp")
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = context
        params.n_parallel = 1
        params.n_gpu_layers = 0
        params.warmup = False
        params.verbosity = -1
        params.fit_params = False
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        # On a CPU it rounds queries to float16 whatever the cache holds, which moves more of
        # SmolLM2's likeliest tokens than the 8 bits of activations do.
        disabled = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.flash_attn_type = disabled
        count = torch.get_num_threads()
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = count
        if adapter is not None:
            params.lora_adapters = [_adapter(xllamacpp, adapter)]
        try:
            self._server = xllamacpp.Server(params)
        except Exception as error:
            raise UserError(
                f"{path.name}: llama.cpp cannot load it: {error}; use --format hf"
            ) from error
        self._letter = self.tokenize("a")[-1]

    def likeliest(self, ids: Sequence[int], count: int = 1) -> list[tuple[int, float]]:
        """The likeliest next tokens and their log-probabilities."""
        answer = self._server.handle_completions(
            {
                "prompt": list(ids),
                "max_tokens": 1,
                "temperature": 0,
                "logprobs": count,
                "cache_prompt": True,
                # What is told of the model are the logits before this: with a token that ends the
                # answer, or a part of a character, nothing would be told at all.
                "logit_bias": [[self._letter, 1000.0]],
            }
        )
        if "choices" not in answer:
            raise UserError(f"llama.cpp refuses a prompt of {len(ids)} tokens: {answer}")
        top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        return [(entry["id"], entry["logprob"]) for entry in top]

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """The next `count` tokens, each the likeliest."""
        answer = list(ids)
        for _ in range(count):
            answer.append(self.likeliest(answer)[0][0])
        return answer[len(ids) :]

    def tokenize(self, text: str) -> list[int]:
        """Token ids with what is put around a whole text; control tokens in it are recognised."""
        body = {"content": text, "add_special": True, "parse_special": True}
        return list(self._ask("tokenize", body)["tokens"])

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> str:
        """A conversation by the file's chat template, with the beginning of an answer; without the
        start token where that is put before every text."""
        return str(self._ask("apply-template", {"messages": list(messages)})["prompt"])

    def _ask(self, path: str, body: Mapping[str, object]) -> Any:
        request = urllib.request.Request(
            f"{self._server.listening_address}/{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with direct.open(request, timeout=60) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            told = error.read().decode(errors="replace")
            raise UserError(f"llama.cpp refuses /{path}: {told[:300]}; use --format hf") from error


def compare(
    path: Path,
    model: Any,
    tokenizer: Any,
    rows: Sequence[Sequence[int]],
    positions: int = POSITIONS,
    *,
    adapter: Path | None = None,
) -> Agreement:
    """llama.cpp with the file beside `model` of transformers, on the first positions of `rows`.

    adapter: a GGUF LoRA adapter on top of the file. Raises UserError for a text that the two
    tokenize differently, and for a conversation that the chat template writes differently.
    """
    engine = LlamaCpp(path, adapter=adapter, context=_context(rows, positions))
    conversations = _check_conversations(path, engine, tokenizer)
    texts = [*TEXTS, *(f"a{t} b" for t in special_tokens(tokenizer))]
    for text in texts:
        ours, theirs = tokenizer.encode(text), engine.tokenize(text)
        if ours != theirs:
            raise UserError(
                f"{path}: llama.cpp tokenizes {text!r} as {theirs[:20]}, the tokenizer as "
                f"{ours[:20]}; use --format hf"
            )
    chosen = _chosen(rows, positions)
    found = _beside(next_tokens(model, rows, positions), _answers(engine, chosen))
    written, alike, parted = _greedy_texts(engine, model, chosen[0][: max(1, len(chosen[0]) // 2)])
    return Agreement(
        **asdict(found),
        texts=len(texts),
        conversations=conversations,
        written=written,
        written_alike=alike,
        parted=parted,
    )


def next_tokens(model: Any, rows: Sequence[Sequence[int]], positions: int = POSITIONS) -> Tensor:
    """[positions, vocabulary] float32: a model's log-probabilities after the rows' tokens."""
    return torch.cat([_logprobs(model, ids) for ids in _chosen(rows, positions)])


def compare_file(path: Path, own: Tensor, rows: Sequence[Sequence[int]]) -> Likeliest:
    """llama.cpp with the file beside the model of which `next_tokens` told `own`."""
    engine = LlamaCpp(path, context=_context(rows, len(own)))
    return _beside(own, _answers(engine, _chosen(rows, len(own))))


def compare_tokens(own: Tensor, others: Tensor) -> Likeliest:
    """A model beside another, both as `next_tokens` told of them."""
    logprobs, tokens = others.max(-1)
    return _beside(own, list(zip(tokens.tolist(), logprobs.tolist(), strict=True)))


def _beside(own: Tensor, others: Sequence[tuple[int, float]]) -> Likeliest:
    """own: [positions, vocabulary] log-probabilities. others: likeliest tokens with theirs."""
    (best, second), tokens = own.topk(2).values.unbind(-1), own.argmax(-1).tolist()
    decided = (best - second >= DECIDED).tolist()
    same = [token == other for token, (other, _) in zip(tokens, others, strict=True)]
    of_decided = [one for one, is_decided in zip(same, decided, strict=True) if is_decided]
    pairs = zip(own, others, strict=True)
    off = [abs(logprob - float(logprobs[token])) for logprobs, (token, logprob) in pairs]
    return Likeliest(
        positions=len(same),
        top1=sum(same) / len(same),
        logprob=sum(off) / len(off),
        decided=len(of_decided),
        top1_decided=sum(of_decided) / len(of_decided) if of_decided else 1.0,
    )


def _answers(engine: LlamaCpp, rows: Sequence[Sequence[int]]) -> list[tuple[int, float]]:
    """llama.cpp's likeliest token after each of the rows' tokens."""
    return [engine.likeliest(ids[:end])[0] for ids in rows for end in range(1, len(ids) + 1)]


def _chosen(rows: Sequence[Sequence[int]], positions: int) -> list[list[int]]:
    """The first `positions` tokens of the rows that have any."""
    chosen: list[list[int]] = []
    for row in filter(len, rows):
        if positions < 1:
            break
        chosen.append(list(row)[:positions])
        positions -= len(chosen[-1])
    return chosen


def _context(rows: Sequence[Sequence[int]], positions: int) -> int:
    """Tokens that llama.cpp has to hold for a row and a greedy text."""
    longest = max(len(row) for row in rows)
    return max(256, min(longest, positions) + WRITTEN + 8)


def _check_conversations(path: Path, engine: LlamaCpp, tokenizer: Any) -> int:
    """How many conversations the file's chat template was asked to write."""
    if not tokenizer.chat_template:
        return 0
    asked = 0
    start = tokenizer.bos_token if puts_start(tokenizer) else ""
    for conversation in CONVERSATIONS:
        messages = [{"role": role, "content": text} for role, text in conversation]
        ours = render(tokenizer, messages, True)
        if ours is None:
            continue
        theirs = engine.prompt(messages)
        if theirs.removeprefix(start) != ours.removeprefix(start):
            raise UserError(
                f"{path}: llama.cpp's chat template writes {theirs!r}, the tokenizer's {ours!r}; "
                "use --format hf, or --no-verify to take the file as it is"
            )
        asked += 1
    return asked


def _greedy_texts(engine: LlamaCpp, model: Any, prompt: Sequence[int]) -> tuple[int, int, float]:
    """The fields written, written_alike and parted of `Agreement`."""
    theirs = engine.greedy(prompt, WRITTEN)
    logprobs = _logprobs(model, [*prompt, *theirs])[len(prompt) - 1 : -1]
    behind = [float(own.max() - own[token]) for token, own in zip(theirs, logprobs, strict=True)]
    return len(theirs), behind.count(0.0), max(behind)


def special_tokens(tokenizer: Any) -> list[str]:
    """The texts of the added tokens that are control tokens."""
    added = tokenizer.added_tokens_decoder.values()
    return [str(token.content) for token in added if token.special]


def _logprobs(model: Any, ids: Sequence[int]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([list(ids)], device=model.device)).logits[0]
    return logits.float().log_softmax(-1).cpu()


def _adapter(xllamacpp: Any, path: Path) -> Any:
    info = xllamacpp.CommonAdapterLoraInfo()
    info.path = str(path)
    info.scale = 1.0
    return info
