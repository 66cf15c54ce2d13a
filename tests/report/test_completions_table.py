"""The report's completions: prompts of the first and of the last round, with their rewards."""

import json

from lora_engine.report.completions import OF_EACH, PROMPTS, shown_completions


def line(number, prompt, text, reward=0.5, **more):
    about = {"round": number, "prompt": prompt, "completion": text, "reward": reward}
    return {**about, "tokens": 3, "finish": "stop", **more}


def write(path, lines):
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    return path


def test_the_first_and_the_last_round(tmp_path):
    asked = [{"role": "system", "content": "s"}, {"role": "user", "content": "1 + 1?"}]
    lines = [
        {**line(0, "held", "out"), "heldout": True, "step": 0},
        *(line(0, f"prompt {i}", f"text {n}") for i in range(4) for n in range(6)),
        line(1, "between", "not shown"),
        line(2, "left", "not shown", left_out=True),
        line(2, asked, "two", reward=None, finish="length"),
    ]
    del lines[0]["round"]
    shown = shown_completions(write(tmp_path / "completions.jsonl", lines))
    assert [one.when for one in shown] == ["first round"] * PROMPTS + ["round 3"]
    assert [one.prompt for one in shown[:PROMPTS]] == [f"prompt {i}" for i in range(PROMPTS)]
    assert shown[0].answers == [(f"text {n}", "0.5", 3, "stop") for n in range(OF_EACH)]
    assert shown[-1].prompt == "1 + 1?"
    assert shown[-1].answers == [("two", "none", 3, "length")]


def test_a_run_without_rounds_shows_none(tmp_path):
    assert shown_completions(tmp_path / "completions.jsonl") == []
    heldout = {**line(0, "held", "out"), "heldout": True}
    del heldout["round"]
    assert shown_completions(write(tmp_path / "completions.jsonl", [heldout])) == []
