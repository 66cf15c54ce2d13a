"""A language model whose head makes one number of a token."""

import copy
from typing import Any

import torch
from torch import nn

from lora_engine.errors import UserError
from lora_engine.models.attach.head import transformers_model


def add_value_head(model: Any) -> None:
    """A `value_head` beside the head for tokens of a (PEFT) causal language model, to be trained.

    Its values are 0 until it learns. What saves an adapter leaves it out.
    """
    inner = transformers_model(model)
    like = next(inner.parameters())
    config: Any = inner.config.get_text_config()
    head = nn.Linear(config.hidden_size, 1, device=like.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    inner.value_head = head  # in float32, as adapters are


def with_scalar_head(model: Any, *, pad_token_id: int | None = None, seed: int = 0) -> Any:
    """transformers' sequence classifier with one label around the layers of `model`.

    model: a causal language model of transformers, which gives its layers away. pad_token_id: by
    which the classifier finds a sequence's last token where rows are padded; the model's own if
    None. seed: of the head's initial values, of the deviation that the model's config says.

    What is trained of it is saved and loaded as transformers and PEFT save and load a classifier.
    Raises UserError for models of which transformers has none.
    """
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(model.config)
    config.num_labels = 1
    if pad_token_id is not None:
        config.pad_token_id = pad_token_id
    try:
        with torch.device("meta"):
            made = AutoModelForSequenceClassification.from_config(config)
    except ValueError as error:
        raise UserError(
            f"{type(model).__name__}: transformers has no sequence classifier of this model to "
            "make a reward model of"
        ) from error
    setattr(made, made.base_model_prefix, getattr(model, model.base_model_prefix))
    head = getattr(made, "score", None)
    if not isinstance(head, nn.Linear):
        raise UserError(f"{type(made).__name__}: its head is no linear layer called 'score'")
    like = next(model.parameters())
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(head.weight.shape, generator=generator)
    values *= getattr(config.get_text_config(), "initializer_range", 0.02)
    made.score = nn.Linear(head.in_features, 1, bias=False)
    made.score.weight.data = values.to(like.device, model.dtype)
    return made.eval()
