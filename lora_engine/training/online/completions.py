"""completions.jsonl: every completion that was rewarded, with its rewards."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from lora_engine.data.prompts import PromptDataset
from lora_engine.training.online.rollouts import Answer
from lora_engine.training.run.lines import GrowingFile, Written, line_of


class CompletionsLog(GrowingFile):
    """A line a completion: `round`, or `step` and `heldout`; `prompt` (text or messages),
    `completion`, `reward`, `rewards` by name, `tokens`, `finish`, `origin`, and `advantage` where
    the completion has one number for it. `left_out`: it was not learned from."""

    def __init__(self, path: Path, written: Written | None = None) -> None:
        super().__init__(path, written, is_line=lambda line: "completion" in (line_of(line) or {}))

    def append(  # type: ignore[override]
        self, about: Mapping[str, object], prompts: PromptDataset, answers: Sequence[Answer]
    ) -> None:
        """about: what the lines of all of them begin with."""
        for answer in answers:
            advantage = answer.columns.get("advantages")
            super().append(
                {
                    **about,
                    "prompt": prompts.prompts[answer.prompt].asked,
                    "completion": answer.text,
                    "reward": answer.reward,
                    "rewards": answer.parts,
                    **({"advantage": advantage} if isinstance(advantage, float) else {}),
                    "tokens": len(answer.token_ids),
                    "finish": answer.finish,
                    "origin": prompts[answer.prompt].origin,
                }
            )
