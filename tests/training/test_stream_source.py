"""Training on a stream: the same batches, and bitwise the same weights, after a resumption."""

import json

import pytest
import torch
from small_tokenizers import make_byte_level
from training_helpers import (
    EVAL,
    SignalAtStep,
    assert_same_bits,
    make_examples,
    make_trainer,
    tiny_lora,
    trainable,
)

from lora_engine.data.recipe import Recipe
from lora_engine.data.stream import ExampleStream, StreamPart, streamed
from lora_engine.errors import UserError
from lora_engine.training.state import Position, TrainState
from lora_engine.training.stream_source import StreamSource

TOKENS = 40


def write(path, count, extra=""):
    rows = [
        json.dumps({"input_ids": e.input_ids, "loss_mask": list(map(int, e.supervised))})
        for e in make_examples(count)
    ]
    path.write_text("\n".join(rows) + "\n" + extra)
    return path


def stream(path, **options) -> ExampleStream:
    options = {"records": 16, **options}
    return ExampleStream("rows", [StreamPart((path,), Recipe())], make_byte_level(), **options)


def saved(position: Position) -> Position:
    """The position as a checkpoint gives it back."""
    state = TrainState(position=position).to_json()
    return TrainState.from_json(json.loads(json.dumps(state))).position


def test_batches_are_the_same_from_any_position(tmp_path):
    path = write(tmp_path / "a.jsonl", 50)
    position, positions, batches = Position(), [], []
    source = StreamSource(stream(path), TOKENS)
    for _ in range(25):
        positions.append(position)
        (batch,), position = source.take(position, 1)
        batches.append(batch)
    assert position.epoch > 1  # several buffers
    assert all(batch.num_tokens <= TOKENS for batch in batches)
    for begin in (0, 7, 20):
        some, _ = StreamSource(stream(path), TOKENS).take(saved(positions[begin]), 5)
        for one, other in zip(some, batches[begin:], strict=False):
            assert torch.equal(one.input_ids, other.input_ids) and one.origins == other.origins


def test_every_example_of_a_buffer_is_in_its_batches(tmp_path):
    source = stream(write(tmp_path / "a.jsonl", 50))
    batches, position = [], Position()
    packed = StreamSource(source, TOKENS)
    while position.epoch == 0:
        (batch,), position = packed.take(position, 1)
        batches.append(batch)
    origins = sorted(origin for batch in batches[:-1] for origin in batch.origins)
    first = sorted(example.origin for example in source.first()[0])
    assert origins == first or sorted(origins + list(batches[-1].origins)) == first


@pytest.mark.parametrize("helpers", [0, 1])
def test_a_resumed_run_has_bitwise_the_same_weights(tmp_path, helpers):
    path = write(tmp_path / "a.jsonl", 50)

    def trainer(folder, **options):
        data = streamed(stream(path, helpers=helpers))
        config = {"max_steps": 12, "tokens_per_batch": TOKENS, "save_every": 5, **options}
        return make_trainer(tmp_path / folder, tiny_lora(), data, EVAL, **config)

    whole = trainer("whole")
    whole.fit()
    parts = trainer("parts", callbacks=[SignalAtStep(7)])
    assert parts.fit().stopped == "interrupted"
    again = trainer("parts")
    result = again.fit(resume=True)
    assert result.steps == 12
    assert_same_bits(trainable(again.model), trainable(whole.model))


def test_malformed_records_stop_the_run_and_lose_nothing(tmp_path):
    path = write(tmp_path / "a.jsonl", 40, extra="{oops\n")
    trainer = make_trainer(
        tmp_path / "out",
        tiny_lora(),
        streamed(stream(path)),
        EVAL,
        max_steps=60,
        tokens_per_batch=TOKENS,
    )
    with pytest.raises(UserError, match=r"a\.jsonl:41: is not valid JSON"):
        trainer.fit()
    assert trainer.state.step > 2
    assert trainer.folder.checkpoints.path(trainer.state.step).is_dir()


def test_a_stream_needs_a_number_of_steps(tmp_path):
    path = write(tmp_path / "a.jsonl", 40)
    with pytest.raises(UserError, match=r"a stream has no end that is known: give train.max_steps"):
        make_trainer(tmp_path / "out", tiny_lora(), streamed(stream(path)), EVAL, max_steps=None)
