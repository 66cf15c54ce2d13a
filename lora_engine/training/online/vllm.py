"""Completions written by a vLLM server, which is handed the adapter as it is at the time."""

import shutil
import tempfile
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from torch import nn

from lora_engine.errors import UserError
from lora_engine.evaluation.modes import inference
from lora_engine.evaluation.samples import TextTokenizer, stop_tokens
from lora_engine.export.adapter import read_adapter
from lora_engine.export.lint import lint
from lora_engine.generation.engine import Completion, Request
from lora_engine.generation.prompt import read_prompt
from lora_engine.generation.text import TextStream
from lora_engine.models.attach.head import transformers_model
from lora_engine.models.families.modules import PeftCausalLm
from lora_engine.models.peft.routing import active_adapters, is_peft
from lora_engine.training.online.config import RolloutConfig
from lora_engine.training.online.vllm_server import Choice, VllmServer

# Mean difference in nats between the server's log-probabilities and the model's. 16 bits and other
# kernels cost some hundredths; another base, or no adapter once it matters, costs more than this.
MOST_OFF = 0.2
LOCAL = "http://127.0.0.1:8000"  # where `vllm serve` listens
_COMPARED = 4  # completions


class VllmEngine:
    """Goes on with prompts as `Generator.run` does.

    The adapter's files are written to a folder that the server reads, under a new name each time
    the weights may have changed: what it kept of other weights cannot be taken for theirs. What it
    says of the first completions is compared with the model. Raises UserError for models without
    one LoRA adapter that vLLM takes, for a server that is not there, serves something else or has
    too few positions.
    """

    def __init__(self, model: nn.Module, tokenizer: TextTokenizer, settings: RolloutConfig) -> None:
        if not is_peft(model):
            raise UserError("rollout.engine: vllm is handed an adapter; give lora")
        self._model, self._tokenizer, self._settings = model, tokenizer, settings
        self._server = VllmServer(settings.server or LOCAL, settings.server_timeout)
        self._run = f"lora-engine-{uuid.uuid4().hex[:8]}"
        self._count = 0
        self._loaded: str | None = None
        self._folder: Path | None = None
        self._positions: int | None = None

    def run(self, requests: Sequence[Request], check: Callable[[], None]) -> list[list[Completion]]:
        """The completions of each request, in order, with the weights that the model has now."""
        if self._positions is None:
            self._positions = self._served_positions()
        for request in requests:
            self._check_length(request)
        self._hand_over()
        assert self._loaded is not None
        ends = stop_tokens(transformers_model(self._model), self._tokenizer)
        written = self._server.complete(self._loaded, requests, ends, check)
        config: Any = transformers_model(self._model).config.get_text_config()
        vocabulary = config.vocab_size
        largest = max(max(choice.token_ids) for group in written for choice in group)
        if largest >= vocabulary:
            raise UserError(
                f"{self._server.url}: wrote token {largest}, the model has {vocabulary}; it has to "
                "serve the base of the run"
            )
        self._compare(requests, written)
        return [
            [self._completion(choice, request, ends) for choice in group]
            for request, group in zip(requests, written, strict=True)
        ]

    def close(self) -> None:
        """Takes the adapter back from the server, and removes its files."""
        if self._loaded is not None:
            with suppress(UserError):  # the run is over; a server that is gone has none of it
                self._server.unload(self._loaded)
            self._loaded = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _served_positions(self) -> int:
        """The most tokens that it takes; 0 where it does not say."""
        bases = [one for one in self._server.models() if one.get("parent") is None]
        if not bases:
            raise UserError(f"{self._server.url}: serves no model")
        return int(bases[0].get("max_model_len") or 0)

    def _check_length(self, request: Request) -> None:
        most, new = self._positions, request.sampling.max_new_tokens
        if most and len(request.prompt_ids) + new > most:
            raise UserError(
                f"{self._server.url}: a prompt of {len(request.prompt_ids):,} tokens and "
                f"max_new_tokens {new:,} are more than its {most:,}; start it with a larger "
                "--max-model-len"
            )

    def _hand_over(self) -> None:
        """Has the server load the adapter as it is now, in place of what it had."""
        if self._folder is None:
            place = self._settings.server_folder
            if place is not None:
                Path(place).mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(prefix=f"{self._run}-", dir=place)).resolve()
            self._folder.chmod(0o755)
        name = f"{self._run}-{self._count}"
        folder = self._folder / name
        save_adapter(self._model, folder)
        if self._count == 0 and (problems := lint(read_adapter(folder))):
            raise UserError(f"rollout.engine: vllm does not take the adapter: {problems[0]}")
        if self._loaded is not None:
            self._server.unload(self._loaded)
            shutil.rmtree(self._folder / self._loaded)
            self._loaded = None
        self._server.load(name, folder)
        self._loaded, self._count = name, self._count + 1

    def _compare(self, requests: Sequence[Request], written: Sequence[Sequence[Choice]]) -> None:
        """UserError where the server's log-probabilities are not the model's."""
        off, count = 0.0, 0
        with inference(self._model):
            for request, group in list(zip(requests, written, strict=True))[:_COMPARED]:
                temperature = request.sampling.temperature or 1.0
                ids = [*request.prompt_ids, *group[0].token_ids]
                read = read_prompt(self._model, ids, temperature=temperature)
                own = [one.logprob for one in read[len(request.prompt_ids) :]]
                for ours, theirs in zip(own, group[0].logprobs, strict=True):
                    assert ours is not None, "no token but the first of all has none"
                    off, count = off + abs(ours - theirs), count + 1
        if not off / count <= MOST_OFF:
            mode = "raw" if requests[0].sampling.temperature in (0.0, 1.0) else "processed"
            raise UserError(
                f"{self._server.url}: its log-probabilities are not the model's (off by "
                f"{off / count:.2g} nats, at most {MOST_OFF:g}); it has to serve the base of the "
                f"run, with --logprobs-mode {mode}_logprobs"
            )

    def _completion(self, choice: Choice, request: Request, ends: Sequence[int]) -> Completion:
        """With the text as our own engine makes it, cut where that stops."""
        stream = TextStream(self._tokenizer, request.sampling.stop)
        finish, count = choice.finish, 0
        for token in choice.token_ids:
            count += 1
            if token in ends or (stream.push(token) is not None and stream.stopped):
                finish = "stop"
                break
        stream.finish()
        if stream.stopped:  # by what was kept back, too
            finish = "stop"
        return Completion(
            token_ids=choice.token_ids[:count],
            logprobs=choice.logprobs[:count],
            text=stream.text,
            finish=finish,
        )


def save_adapter(model: nn.Module, folder: Path) -> None:
    """The active adapter of a PeftModel as PEFT's files, while it is being trained."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    adapted = cast(PeftCausalLm, model)
    (name,) = active_adapters(adapted)
    folder.mkdir()
    state = get_peft_model_state_dict(cast(Any, adapted), adapter_name=name)
    tensors = {key: tensor.detach().cpu().clone() for key, tensor in state.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings: Any = adapted.peft_config[name]
    settings.save_pretrained(folder)
