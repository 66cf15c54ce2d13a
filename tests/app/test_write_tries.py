"""`lora-engine generate` and `chat`: a run's answers, and what cannot be answered."""

import io
import json
import signal
from pathlib import Path

import pytest
from broken_machine import in_a_child, killed_at
from tries import FAILED, MISTAKE, Try, check, run, snapshot, tries

from lora_engine.app import writing
from lora_engine.errors import UserError

PROMPTS = [{"prompt": "say 1"}, {"messages": [{"role": "user", "content": "say 2"}]}]


def write_prompts(folder: Path) -> None:
    (folder / "asked.jsonl").write_text("".join(json.dumps(p) + "\n" for p in PROMPTS))


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_file_of_prompts_becomes_a_file_of_answers(finished, capfd):
    write_prompts(finished)
    call = ("generate", "run", "asked.jsonl", "--max-new-tokens", "5", "--count", "2")
    status, printed, _ = run(capfd, *call, "--temperature", "1", "--out", "answers.jsonl")
    assert status == 0 and printed == ""
    found = lines((finished / "answers.jsonl").read_text())
    assert [(line.get("prompt"), line["number"]) for line in found] == [
        ("say 1", 0), ("say 1", 1), (None, 0), (None, 1),
    ]  # fmt: skip
    assert found[2]["messages"] == PROMPTS[1]["messages"]
    for line in found:
        assert 1 <= line["tokens"] <= 5
        assert line["finish"] in ("stop", "length") and line["logprob"] < 0
    status, printed, _ = run(capfd, *call, "--temperature", "1")
    assert status == 0 and lines(printed) == found, "another run of the same is another text"
    before = snapshot(finished)
    status, _, told = run(capfd, *call, "--out", "answers.jsonl")
    assert status == MISTAKE and "answers.jsonl: is there already" in told
    assert snapshot(finished) == before


def write_answers(target: Path) -> None:
    with writing.result_file(target) as file:
        file.write("answer\n")


def test_answers_that_were_killed_are_removed_by_the_next(tmp_path):
    """At any moment the file is whole or not there; another's files stay."""
    target, other = tmp_path / "a.jsonl", tmp_path / ".tmp-b-1.jsonl-7"
    other.touch()
    whole, hidden = [], []
    for event in range(1, 200):
        target.unlink(missing_ok=True)
        status = killed_at(event, lambda: write_answers(target))
        whole.append(target.exists())
        hidden.append(sum(path not in (target, other) for path in tmp_path.iterdir()))
        assert not target.exists() or target.read_text() == "answer\n"
        if status == 0:
            break
        assert status == signal.SIGKILL
    assert whole == sorted(whole) and whole[-1] and not whole[0]
    assert max(hidden) == 2 and hidden[-1] == 0  # a lock and unfinished answers, of one process
    assert {path.name for path in tmp_path.iterdir()} == {target.name, other.name}


def test_one_writes_a_file_of_answers_and_the_next_does_not_replace_it(tmp_path):
    target = tmp_path / "a.jsonl"
    with writing.result_file(target) as file:

        def work() -> None:
            from lora_engine.training.run import lock

            lock._holders.clear()  # which the fork has copied
            with pytest.raises(UserError, match="is running in it"):
                write_answers(target)

        assert in_a_child(work) == 0
        file.write("first\n")
    with pytest.raises(UserError, match=r"a\.jsonl: is there already"):
        write_answers(target)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    assert target.read_text() == "first\n"


def test_the_adapter_is_what_writes(finished, capfd):
    """The answer of a run is PEFT's own greedy text, and not that of its base."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("tiny")
    base = AutoModelForCausalLM.from_pretrained("tiny", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, "run/adapter").eval()
    torch.manual_seed(0)
    with torch.no_grad():  # so that the adapter shows in few tokens
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    model.save_pretrained("changed")
    ids = tokenizer("say 3", return_tensors="pt").input_ids
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1}
    expected = model.generate(input_ids=ids, **options)[0, ids.shape[1] :]
    with model.disable_adapter():
        plain = model.generate(input_ids=ids, **options)[0, ids.shape[1] :]
    more = ("--prompt", "say 3", "--max-new-tokens", "8", "--dtype", "float32")
    status, printed, _ = run(capfd, "generate", "changed", "--base", "tiny", *more)
    assert status == 0
    assert printed == tokenizer.decode(expected, skip_special_tokens=True) + "\n"
    status, printed, _ = run(capfd, "generate", "tiny", *more)
    assert status == 0
    assert printed == tokenizer.decode(plain, skip_special_tokens=True) + "\n"
    assert expected.tolist() != plain.tolist()


def test_lines_of_a_text_file_are_prompts(finished, capfd):
    (finished / "asked.txt").write_text("one\n\ntwo\n")
    status, printed, _ = run(
        capfd, "generate", "run", "asked.txt", "--chat", "--max-new-tokens", "2"
    )
    assert status == 0
    assert [line["messages"][0]["content"] for line in lines(printed)] == ["one", "two"]


def test_only_line_breaks_end_a_prompt_of_a_text_file(finished, capfd):
    """No separator of another kind does, and the mark of UTF-8 is no part of the first."""
    text = "\ufeffone\r\nt\x0bw\x0co\u2028\x85\n"
    (finished / "asked.txt").write_bytes(text.encode())
    status, printed, _ = run(capfd, "generate", "run", "asked.txt", "--max-new-tokens", "1")
    assert status == 0
    assert [line["prompt"] for line in lines(printed)] == ["one", "t\x0bw\x0co\u2028\x85"]


def talk(capfd, monkeypatch: pytest.MonkeyPatch, said: str, *more: str) -> str:
    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    status, printed, told = run(capfd, "chat", *more, "--max-new-tokens", "3")
    assert status == 0, told
    return printed


def test_a_conversation_with_and_without_the_adapter(finished, capfd, monkeypatch):
    printed = talk(
        capfd, monkeypatch, "hi\n/both\nand now\n/adapter\nhm\n/new\n/what\n/quit\nnever\n", "run"
    )
    for shown in (
        "/adapter on or off", "both side by side", "[without the adapter]", "[with the adapter]",
        "the adapter is off", "a new conversation",
    ):  # fmt: skip
        assert shown in printed
    assert printed.count("/quit") == 2, "an unknown command shows those that there are"
    assert "never" not in printed


def test_a_base_has_no_adapter_to_switch(finished, capfd, monkeypatch):
    assert "this model has no adapter" in talk(capfd, monkeypatch, "/both\nhi\n", "tiny")


def test_a_conversation_that_grows_too_long_can_begin_anew(finished, capfd, monkeypatch):
    long = "x" * 600
    printed = talk(capfd, monkeypatch, f"{long}\n/new\nhi\n", "tiny")
    assert "more than the 512 that the model was made for" in printed


def test_a_line_that_is_no_text_does_not_end_a_conversation(finished, capfd, monkeypatch):
    said = io.TextIOWrapper(io.BytesIO(b"caf\xe9\nhi\n"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", said)
    status, printed, told = run(capfd, "chat", "tiny", "--max-new-tokens", "3")
    assert status == 0, told
    assert "half a character (U+DCE9); /new begins anew" in printed
    assert printed.count("> ") == 3


def test_an_answer_has_what_is_left_for_it(finished, capfd, monkeypatch):
    """Of 512 positions, where 512 new tokens are asked for."""
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    status, printed, _ = run(capfd, "chat", "tiny", "--temperature", "0")
    assert status == 0 and "more than" not in printed and len(printed.split("> ")[1]) > 1


MISTAKES = [
    Try("no tokens", ["generate", "tiny", "--prompt", "x", "--max-new-tokens", "0"],
        ["--max-new-tokens"]),
    Try("no model", ["generate", "nothing", "--prompt", "x"], ["nothing"]),
    Try("nothing asked", ["generate", "tiny"], ["give a file of prompts"]),
    Try("asked twice", ["generate", "tiny", "rows.jsonl", "--prompt", "x"], ["give a file"]),
    Try("no such file", ["generate", "tiny", "asked.jsonl"], ["asked.jsonl"]),
    Try("no such text", ["generate", "tiny", "asked.txt"], ["asked.txt", "cannot be read"]),
    Try("an empty text", ["generate", "tiny", "asked.txt"], ["asked.txt", "holds no prompts"],
        prepare=lambda folder: (folder / "asked.txt").write_text("\n\n")),
    Try("an empty prompt", ["generate", "tiny", "--prompt", ""], ["the prompt is empty"]),
    Try("too long", ["generate", "tiny", "--prompt", "x" * 600], ["600 tokens", "512"]),
    Try("half a character", ["generate", "tiny", "--prompt", "caf\udce9"],
        ["--prompt holds half a character", "U+DCE9"]),
    Try("a stop of half a character",
        ["chat", "tiny", "--stop", "\udce9"], ["--stop holds half a character"]),
    Try("more answers than anybody counts",
        ["generate", "tiny", "--prompt", "x", "--count", "1000000000"], ["--count", "10000"]),
    Try("a file without a name", ["generate", "tiny", ""], ["PROMPTS", "is empty"]),
    Try("answers without a name", ["generate", "tiny", "--prompt", "x", "--out", ""],
        ["--out", "is empty"]),
    Try("answers that are there", ["generate", "tiny", "--prompt", "x", "--out", "."],
        ["is there already"]),
    Try("answers in no folder", ["generate", "tiny", "--prompt", "x", "--out", "no/answers"],
        ["no/answers", "no such file or folder"], status=FAILED),
    Try("answers where a link leads nowhere",
        ["generate", "tiny", "--prompt", "x", "--out", "link"], ["link: is there already"],
        prepare=lambda folder: (folder / "link").symlink_to("nowhere")),
    Try("a base of a whole model", ["generate", "tiny", "--prompt", "x", "--base", "run"],
        ["--base run: tiny is a whole model"]),
    Try("a base of a model's name", ["chat", "smollm2", "--base", "tiny"],
        ["--base tiny: smollm2 is a whole model"]),
    Try("no end of heat", ["generate", "tiny", "--prompt", "x", "--temperature", "inf"],
        ["temperature", "finite"]),
    Try("temperature", ["generate", "tiny", "--prompt", "x", "--temperature=-1"], ["temperature"]),
    Try("top_p", ["chat", "tiny", "--top-p", "1.5"], ["top_p", "1.5"]),
    Try("adapter of a model", ["generate", "tiny", "--prompt", "x", "--adapter", "a"],
        ["tiny is a whole model"]),
    Try("unknown adapter", ["generate", "run", "--prompt", "x", "--adapter", "other"],
        ["no adapter 'other'"]),
    Try("dtype", ["generate", "tiny", "--prompt", "x", "--dtype", "int8"], ["int8"]),
]  # fmt: skip


@tries(MISTAKES)
def test_mistakes(finished, capfd, entry):
    check(capfd, finished, entry)
