"""A model for lm-evaluation-harness (Gao et al.), which has to be installed: `pip install lm_eval`.

import lm_eval
from lora_engine.evaluation.harness import HarnessModel

lm_eval.simple_evaluate(model=HarnessModel(model, tokenizer), tasks=["arc_easy"])
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from lora_engine.data.render import Example
from lora_engine.errors import UserError
from lora_engine.evaluation.modes import inference
from lora_engine.evaluation.samples import stop_tokens
from lora_engine.evaluation.scores import Score, score_examples
from lora_engine.generation.engine import Generator, Request
from lora_engine.generation.sampling import Sampling

_NEW_TOKENS = 256  # of a task that does not say


class HarnessModel(LM):
    """Log-probabilities without logits, rows packed, and texts side by side.

    model: a transformers (or PEFT) causal language model, best an accelerated one; its adapters are
        those that are active. tokenizer: its own. A text begins with the token that the tokenizer
        puts before every text, if it has one.
    tokens: read at once.
    """

    def __init__(self, model: Any, tokenizer: Any, *, tokens: int = 2048) -> None:
        super().__init__()
        self.model, self.tokenizer, self.tokens = model, tokenizer, tokens
        config = model.config.get_text_config()
        self._longest = getattr(config, "max_position_embeddings", 2048)
        opening = tokenizer.encode("")
        first = opening[:1] if opening[:1] == [tokenizer.bos_token_id] else []
        self._first: list[int] = first
        start = tokenizer.bos_token_id
        self._prefix: int | None = tokenizer.eos_token_id if start is None else start

    @property
    def tokenizer_name(self) -> str:
        """A file's name can have it."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return None if chat_template is False else self.tokenizer.get_chat_template()

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        text: str = self.tokenizer.apply_chat_template(
            list(chat_history),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(log p of the continuation, whether each of its tokens is the likeliest)."""
        examples = [self._pair(*request.args) for request in requests]
        return [(-score.nats, score.correct == score.targets) for score in self._scores(examples)]

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """log p of a whole text, in windows of what the model was made for."""
        examples: list[Example] = []
        counts = []
        for request in requests:
            windows = get_rolling_token_windows(
                self._encode(request.args[0]), self._start(), self._longest - 1, 1
            )
            parts = [_example(*make_disjoint_window(window)) for window in windows]
            examples += parts
            counts.append(len(parts))
        nats = iter([score.nats for score in self._scores(examples)])
        return [-sum(next(nats) for _ in range(count)) for count in counts]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Each context gone on with, up to the first of the texts in `until`."""
        stop = stop_tokens(self.model, self.tokenizer)
        with inference(self.model):
            generator = Generator(self.model, self.tokenizer, stop_tokens=stop)
            made = generator.run([self._request(*request.args) for request in requests])
        return [completion.text for (completion,) in made]

    def _request(self, context: str, settings: Mapping[str, Any]) -> Request:
        until = settings.get("until") or []
        new = int(settings.get("max_gen_toks") or _NEW_TOKENS)
        drawn = bool(settings.get("do_sample", settings.get("temperature", 0) > 0))
        if new >= self._longest:
            raise UserError(
                f"max_gen_toks={new}: the model was made for {self._longest}; give fewer"
            )
        ids = self._with_first(self._encode(context)) or [self._start()]
        sampling = Sampling(
            max_new_tokens=new,
            temperature=float(settings.get("temperature", 1.0)) if drawn else 0.0,
            top_p=float(settings.get("top_p", 1.0)),
            top_k=int(settings.get("top_k", 0)),
            stop=tuple([until] if isinstance(until, str) else until),
        )
        return Request(tuple(ids[-(self._longest - new) :]), sampling)

    def _pair(self, context: str, continuation: str) -> Example:
        """A space between the two belongs to the continuation, whose tokens begin with it."""
        stripped = context.rstrip()
        continuation, context = context[len(stripped) :] + continuation, stripped
        before = self._with_first(self._encode(context))
        if not before:
            return self._cut([self._start()], self._encode(continuation))
        both = self._with_first(self._encode(context + continuation))
        return self._cut(both[: len(before)], both[len(before) :])

    def _cut(self, before: list[int], after: list[int]) -> Example:
        """At the left, to what the model was made for."""
        room = self._longest - len(after)
        if room < 1:
            raise UserError(
                f"a continuation of {len(after)} tokens: the model was made for {self._longest}"
            )
        return _example(before[-room:], after)

    def _scores(self, examples: Sequence[Example]) -> list[Score]:
        if not any(example.supervised[1:].count(True) for example in examples):
            return [Score(origin="", targets=0, nats=0.0, correct=0) for _ in examples]
        return score_examples(self.model, examples, tokens=self.tokens)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _with_first(self, ids: list[int]) -> list[int]:
        return ids if ids[:1] == self._first else [*self._first, *ids]

    def _start(self) -> int:
        """What stands before a text that has nothing before it."""
        if self._prefix is None:
            raise UserError("the tokenizer has no token that begins or ends a text")
        return self._prefix


def _example(before: list[int], after: list[int]) -> Example:
    return Example([*before, *after], [False] * len(before) + [True] * len(after))
