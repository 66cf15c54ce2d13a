"""What a prompt's own tokens are worth to a model."""

import pytest
import torch

from lora_engine.evaluation.modes import inference
from lora_engine.generation.prompt import read_prompt
from lora_engine.models.attach.accelerate import accelerate
from lora_engine.testing import tiny_llama, with_lora

IDS = [(7 * i + 3) % 250 for i in range(150)]  # more than the rows of logits at once


@pytest.mark.parametrize("kind", ["plain", "accelerated", "scaled logits"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_logprobs_are_those_of_the_logits(kind: str, temperature: float) -> None:
    model = with_lora(tiny_llama(vocab_size=260)).eval()
    if kind == "scaled logits":  # of a model whose head is not ours to call
        head = model.get_output_embeddings()
        head.register_forward_hook(lambda module, inputs, output: 2 * output)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([IDS])).logits[0]
    if kind == "accelerated":
        accelerate(model)
    with inference(model):
        read = read_prompt(model, IDS, count=3, temperature=temperature)
    expected = (logits / temperature).log_softmax(-1)
    assert [one.token for one in read] == IDS
    assert read[0].logprob is None and read[0].likeliest == ()
    for one, row in zip(read[1:], expected, strict=False):
        assert one.logprob == pytest.approx(float(row[one.token]), abs=1e-4)
        assert [p for _, p in one.likeliest] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)


def test_a_prompt_of_one_token_needs_no_model() -> None:
    (one,) = read_prompt(torch.nn.Linear(1, 1), [5], count=2)
    assert (one.token, one.logprob, one.likeliest) == (5, None, ())
