import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No trainer asks the network for anything, or draws a bar."""
    import datasets

    def refuse(*_: Any) -> NoReturn:
        raise AssertionError("a trainer opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    datasets.disable_progress_bars()


@pytest.fixture(scope="session")
def plain_runs() -> dict[Any, Any]:
    """Runs without acceleration, by case and settings."""
    return {}


@pytest.fixture
def compare(tmp_path: Path, plain_runs: dict[Any, Any]) -> Callable[..., None]:
    """Asserts that a trainer says and learns the same with and without acceleration.

    compare(case, when, tolerance=…, **settings): the settings are those of `trainer_cases.run`.
    """
    from benchmarks.drop_in import trainer_cases

    def asserts(
        case: Any,
        when: str,
        *,
        tolerance: float = trainer_cases.TOLERANCE,
        **settings: Any,
    ) -> None:
        key = case, *settings.items()
        if key not in plain_runs:
            plain_runs[key] = trainer_cases.run(case, None, tmp_path / "plain", **settings)
        theirs = plain_runs[key]
        ours = trainer_cases.run(case, when, tmp_path / "ours", **settings)
        assert len(theirs.logs) > trainer_cases.STEPS
        assert trainer_cases.moved(theirs) > 2 * tolerance  # so that a wrong update shows
        logged, what = trainer_cases.log_difference(ours, theirs, case.but)
        assert logged <= tolerance, what
        learned, which = trainer_cases.weight_difference(ours, theirs)
        assert learned <= tolerance, which

    return asserts
