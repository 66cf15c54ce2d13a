"""One fit in a process of its own, which test_kill.py kills and interrupts."""

import os
import signal

import torch
from training_helpers import make_dataset, tiny_lora

from lora_engine.training.config import TrainConfig
from lora_engine.training.run import checkpoint
from lora_engine.training.trainer import Trainer


def fit(output_dir, action, pipe):
    """Resume if there is something to resume; send the result's `stopped` through `pipe`.

    action: "run", or one of
        kill-at-step-N       SIGKILL itself after step N
        kill-while-saving-N  SIGKILL itself in the middle of writing the checkpoint of step N
        pause-at-step-N      after step N, send "paused" and wait for "go on"
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGHUP, signal.SIGTERM):  # ignored under nohup, say
        signal.signal(number, signal.SIG_DFL)
    kind, _, number = action.rpartition("-")
    callbacks = []
    if kind == "kill-at-step":
        callbacks.append(AtStep(int(number), kill_self))
    elif kind == "pause-at-step":
        callbacks.append(AtStep(int(number), lambda: pause(pipe)))
    elif kind == "kill-while-saving":
        kill_while_saving(int(number))
    else:
        assert action == "run", action
    config = TrainConfig(
        output_dir=output_dir,
        max_steps=9,
        tokens_per_batch=40,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        warmup_steps=2,
        weight_decay=0.01,
        eval_every=4,
        save_every=3,
        final_weights="last",
    )
    model = tiny_lora(dropout=0.2, init_lora_weights=False)
    train_data, eval_data = make_dataset(40), make_dataset(6, seed=1)
    trainer = Trainer(model, None, train_data, eval_data, config, callbacks=callbacks)
    pipe.send(trainer.fit(resume=True).stopped)


class AtStep:
    """Acts after a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step(self, metrics):
        if metrics.step == self.step:
            self.action()


def kill_self():
    os.kill(os.getpid(), signal.SIGKILL)


def pause(pipe):
    pipe.send("paused")
    assert pipe.recv() == "go on"


def kill_while_saving(step):
    write = checkpoint.save_file

    def save_file(tensors, path):
        write(tensors, path)
        if f"step-{step:08d}" in str(path) and path.stem == "exp_avg":
            kill_self()

    checkpoint.save_file = save_file
