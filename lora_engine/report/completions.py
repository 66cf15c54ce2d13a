"""The report's table of completions: what an online run wrote at first and at last, rewarded."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROMPTS = 3  # of the first round, and as many of the last one
OF_EACH = 4  # completions of a prompt


@dataclass(frozen=True)
class Shown:
    """A prompt of a round. answers: (completion, reward as text, tokens, why it ended)."""

    when: str
    prompt: str
    answers: list[tuple[str, str, int, str]]


def shown_completions(path: Path) -> list[Shown]:
    """Some prompts of the first and of the last round in completions.jsonl; none without it."""
    if not path.is_file():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    rounds = [line for line in lines if "round" in line and not line.get("left_out")]
    if not rounds:
        return []
    first, last = rounds[0]["round"], rounds[-1]["round"]
    shown = _of_round([x for x in rounds if x["round"] == first], "first round")
    if last != first:
        shown += _of_round([x for x in rounds if x["round"] == last], f"round {last + 1:,}")
    return shown


def _of_round(lines: Sequence[Mapping[str, Any]], when: str) -> list[Shown]:
    by_prompt: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        by_prompt.setdefault(_text(line["prompt"]), []).append(line)
    return [
        Shown(when, prompt, [_answer(line) for line in own[:OF_EACH]])
        for prompt, own in list(by_prompt.items())[:PROMPTS]
    ]


def _answer(line: Mapping[str, Any]) -> tuple[str, str, int, str]:
    reward = "none" if line["reward"] is None else f"{line['reward']:.3g}"
    return line["completion"], reward, line["tokens"], line["finish"]


def _text(prompt: object) -> str:
    """A prompt for people; of messages the last one."""
    if isinstance(prompt, str):
        return prompt
    assert isinstance(prompt, list)
    content = prompt[-1].get("content", "")
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
