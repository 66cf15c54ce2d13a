"""Runs by `finetune` of run.yaml in the working folder, and what is asked of them."""

import json
import signal

from lora_engine.app.config import load_config
from lora_engine.app.finetune import finetune


def run(*overrides, resume=False, observer=None):
    return finetune(load_config("run.yaml", overrides), resume=resume, observer=observer)


def read_metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


class Recorder:
    """An observer that remembers, and can do something at a step."""

    def __init__(self, at_step=None, action=None):
        self.stages, self.steps, self.evals, self.told = [], [], [], []
        self.at_step, self.action = at_step, action

    def stage(self, text):
        self.stages.append(text)

    def on_data(self, lines):
        assert not self.steps
        self.told += lines

    def on_step(self, metrics):
        self.steps.append(metrics.step)
        if metrics.step == self.at_step:
            self.action()

    def on_eval(self, step, result):
        self.evals.append(step)


def interrupt():
    signal.raise_signal(signal.SIGINT)


def measure_by_the_first_three(settings):
    """Hold out nothing; measure by the first three rows of the training data."""
    config = settings / "run.yaml"
    held_out = "eval: rows.jsonl, eval_limit: 3"
    config.write_text(config.read_text().replace("eval_fraction: 0.2", held_out))


def everything_in(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
