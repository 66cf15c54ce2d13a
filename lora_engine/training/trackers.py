"""`log_to`: a run told to tracking services, each through its own package."""

import importlib
import math
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from lora_engine.errors import EngineWarning, UserError
from lora_engine.evaluation.heldout import HeldoutResult
from lora_engine.training.callbacks import Beginning
from lora_engine.training.config import Service, TrainConfig
from lora_engine.training.metrics import StepMetrics

PROJECT = "lora_engine"


class Tracker(Protocol):
    """A run of a service that has been opened."""

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    """Event files in the run's folder, tensorboard/."""

    def __init__(self, package: Any, folder: Path, settings: Mapping[str, object]) -> None:
        self._writer = package.SummaryWriter(str(folder / "tensorboard"))
        self._writer.add_text("settings", "\n".join(f"    {k}: {v}" for k, v in settings.items()))

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Initialised:
    """Weights & Biases, and Trackio, which has its functions. WANDB_PROJECT and the like hold."""

    def __init__(self, package: Any, folder: Path, settings: Mapping[str, object]) -> None:
        self._package = package
        own = {"dir": str(folder)} if package.__name__ == "wandb" else {}
        project = {} if _named_elsewhere(package) else {"project": PROJECT}
        package.init(name=folder.name, config=dict(settings), **project, **own)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._package.log(dict(values), step=step)

    def close(self) -> None:
        self._package.finish()


class _MLflow:
    """A run at MLFLOW_TRACKING_URI, or where MLflow keeps runs without it."""

    def __init__(self, package: Any, folder: Path, settings: Mapping[str, object]) -> None:
        self._package = package
        package.start_run(run_name=folder.name)
        package.log_params({name: str(value)[:500] for name, value in settings.items()})

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._package.log_metrics(dict(values), step=step)

    def close(self) -> None:
        self._package.end_run()


_Opened = Callable[[Any, Path, Mapping[str, object]], Tracker]
# The module to import, and the package to install for it.
_SERVICES: dict[Service, tuple[str, str, _Opened]] = {
    "tensorboard": ("torch.utils.tensorboard", "tensorboard", _TensorBoard),
    "wandb": ("wandb", "wandb", _Initialised),
    "mlflow": ("mlflow", "mlflow", _MLflow),
    "trackio": ("trackio", "trackio", _Initialised),
}


class Tracking:
    """A callback of the Trainer: every step's and evaluation's numbers to every service.

    A service that fails while a run trains is left out from then on, with an EngineWarning.
    Raises UserError for a service whose package is not installed.
    """

    def __init__(self, config: TrainConfig, objective: str) -> None:
        self._packages = {service: _package(service) for service in config.log_to}
        self._folder = config.output_dir
        self._settings = {"objective": objective, **config.model_dump(mode="json")}
        self._open: dict[Service, Tracker] = {}

    def on_start(self, trainer: Beginning) -> None:
        for service, package in self._packages.items():
            try:
                make = _SERVICES[service][2]
                self._open[service] = make(package, self._folder, self._settings)
            except Exception as error:  # whatever a service's package raises
                _left_out(service, error)

    def on_step(self, metrics: StepMetrics) -> None:
        values = {
            "loss": metrics.loss,
            "learning_rate": metrics.learning_rate,
            "grad_norm": metrics.grad_norm,
            "tokens": float(metrics.tokens),
            "tokens_per_second": metrics.tokens_per_second,
            **metrics.metrics,
        }
        self._log("train", values, metrics.step)

    def on_eval(self, step: int, result: HeldoutResult) -> None:
        accuracy = {} if result.accuracy is None else {"accuracy": result.accuracy}
        values = {"loss": result.loss, **accuracy, **result.metrics}
        self._log("heldout", values, step)
        if result.probe is not None:
            probe = {"loss": result.probe.loss, "accuracy": result.probe.accuracy}
            self._log("probe", probe, step)

    def close(self) -> None:
        """The run is over, however it ended."""
        self._each(lambda tracker: tracker.close())
        self._open.clear()

    def _log(self, part: str, values: Mapping[str, float], step: int) -> None:
        finite = {f"{part}/{n}": v for n, v in values.items() if math.isfinite(v)}
        self._each(lambda tracker: tracker.log(finite, step))

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for service, tracker in list(self._open.items()):
            try:
                call(tracker)
            except Exception as error:  # whatever a service's package raises
                del self._open[service]
                _left_out(service, error)


def _package(service: Service) -> Any:
    module, package, _ = _SERVICES[service]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"train.log_to: {service} needs the package {package}, which cannot be imported "
            f"({error}); pip install {package}, or leave it out"
        ) from error


def _named_elsewhere(package: Any) -> bool:
    return f"{package.__name__.upper()}_PROJECT" in os.environ


def _left_out(service: Service, error: Exception) -> None:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    warnings.warn(
        f"log_to: {service} failed and is told no more of this run: {reason}",
        EngineWarning,
        stacklevel=2,
    )
