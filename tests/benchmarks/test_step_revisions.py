"""How two revisions' steps are compared; the steps themselves are `train_ours`'s, tested there."""

import io
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.train import step_revisions

FIRST, SECOND = Path("first"), Path("second")


def test_revisions_take_turns_and_ratios_are_by_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {FIRST: [1.0, 4.0, 2.0], SECOND: [2.0, 2.0, 1.0]}
    asked: list[Path] = []

    class Line(io.StringIO):
        def __init__(self, folder: Path) -> None:
            super().__init__()
            self.folder = folder

        def flush(self) -> None:
            asked.append(self.folder)

    def start(case: str, folder: Path) -> SimpleNamespace:
        lines = ["ready", *map(str, seconds[folder])]
        said = io.StringIO("\n".join(lines) + "\n")
        return SimpleNamespace(stdin=Line(folder), stdout=said, communicate=lambda: None)

    monkeypatch.setattr(step_revisions, "start", start)
    ratio = step_revisions.compare("toy", [FIRST, SECOND], 3)
    assert asked == [SECOND, FIRST, FIRST, SECOND, SECOND, FIRST]
    assert ratio == step_revisions.Ratio("toy", 3, 2.0, 2.0, 0.5, 0.5, 2.0)


def test_a_worker_that_ends_is_an_error() -> None:
    with pytest.raises(SystemExit, match="a step failed"):
        step_revisions.answer(SimpleNamespace(stdout=io.StringIO("")))  # type: ignore[arg-type]
