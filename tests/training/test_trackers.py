"""`log_to`: what each service's package is told of a run, and what happens where it fails."""

import sys
import types

import pytest
import torch
from training_helpers import EVAL, TRAIN, tiny_lora

from lora_engine import TrainConfig, Trainer, UserError
from lora_engine.errors import EngineWarning
from lora_engine.evaluation.nonfinite import NonFiniteError


class Package(types.ModuleType):
    """A service's package that keeps the calls of its functions."""

    def __init__(self, name: str, fails_at: int | None = None) -> None:
        super().__init__(name)
        self.calls: list[tuple] = []
        self.fails_at = fails_at

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            if len(self.calls) == self.fails_at:
                raise ConnectionError("no route\nto host")

        return call

    def named(self, *names: str) -> list[tuple]:
        return [call for call in self.calls if call[0] in names]


class Writer(Package):
    def SummaryWriter(self, folder: str) -> "Writer":
        self.folder = folder
        return self


def trained(tmp_path, monkeypatch, package: Package, service: str, **settings):
    monkeypatch.setitem(sys.modules, package.__name__, package)
    config = TrainConfig(
        output_dir=tmp_path / "runs/first",
        max_steps=3,
        tokens_per_batch=64,
        eval_every=2,
        log_to=[service],
        **settings,
    )
    losses = []

    class Kept:
        def on_step(self, metrics) -> None:
            losses.append(metrics.loss)

    result = Trainer(tiny_lora(), None, TRAIN, EVAL, config, callbacks=[Kept()]).fit()
    return result, losses


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_services_with_init_and_log(tmp_path, monkeypatch, name):
    monkeypatch.delenv(f"{name.upper()}_PROJECT", raising=False)
    package = Package(name)
    _, losses = trained(tmp_path, monkeypatch, package, name, learning_rate=3e-4)
    ((_, _, opened),) = package.named("init")
    assert (opened["name"], opened["project"]) == ("first", "lora_engine")
    assert opened["config"]["learning_rate"] == 3e-4 and opened["config"]["objective"] == "sft"
    assert ("dir" in opened) == (name == "wandb")
    told = {(step, k): v for _, (values,), kw in package.named("log") for k, v in values.items()
            for step in [kw["step"]]}  # fmt: skip
    assert [told[step, "train/loss"] for step in (1, 2, 3)] == losses
    assert {step for step, key in told if key == "heldout/loss"} == {0, 2, 3}
    assert [call[0] for call in package.calls][-1] == "finish"


def test_a_project_of_the_environment_holds(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    package = Package("wandb")
    trained(tmp_path, monkeypatch, package, "wandb")
    assert "project" not in package.named("init")[0][2]


def test_mlflow(tmp_path, monkeypatch):
    package = Package("mlflow")
    _, losses = trained(tmp_path, monkeypatch, package, "mlflow")
    assert package.calls[0] == ("start_run", (), {"run_name": "first"})
    metrics = [(kw["step"], values) for _, (values,), kw in package.named("log_metrics")]
    steps = [(step, v["train/loss"]) for step, v in metrics if "train/loss" in v]
    assert steps == list(zip((1, 2, 3), losses, strict=True))
    assert package.calls[-1][0] == "end_run"


def test_tensorboard_writes_into_the_run_s_folder(tmp_path, monkeypatch):
    package = Writer("torch.utils.tensorboard")
    _, losses = trained(tmp_path, monkeypatch, package, "tensorboard")
    assert package.folder == str(tmp_path / "runs/first/tensorboard")
    scalars = [args for _, args, _ in package.named("add_scalar")]
    assert [v for n, v, _ in scalars if n == "train/loss"] == losses
    assert package.calls[-1][0] == "close"


@pytest.mark.parametrize("fails_at", [1, 3])
def test_a_service_that_fails_leaves_the_run_alone(tmp_path, monkeypatch, fails_at):
    package = Package("trackio", fails_at)
    with pytest.warns(EngineWarning, match="trackio failed and is told no more .*: no route$"):
        result, losses = trained(tmp_path, monkeypatch, package, "trackio")
    assert result.steps == 3 and len(losses) == 3
    assert len(package.calls) == fails_at


def test_a_run_that_breaks_off_is_closed(tmp_path, monkeypatch):
    package = Package("wandb")
    broken = tiny_lora()
    monkeypatch.setitem(sys.modules, "wandb", package)
    config = TrainConfig(output_dir=tmp_path, max_steps=3, preflight=False, log_to=["wandb"])
    trainer = Trainer(broken, None, TRAIN, None, config)
    with torch.no_grad():
        next(p for p in broken.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(NonFiniteError):
        trainer.fit()
    assert [call[0] for call in package.calls] == ["init", "finish"]


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    config = TrainConfig(output_dir=tmp_path, max_steps=3, log_to=["trackio"])
    with pytest.raises(UserError, match=r"log_to: trackio needs .*; pip install trackio, or leave"):
        Trainer(tiny_lora(), None, TRAIN, None, config)
