"""A language model whose head makes one number of a token."""

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_engine.errors import UserError, reason
from lora_engine.models.attach.head import transformers_model

# Beside an adapter's files: a policy's value head, under the names of TRL's
# AutoModelForCausalLMWithValueHead, in the file that LLaMA-Factory and ms-swift read.
VALUE_HEAD_FILE = "value_head.safetensors"
_NAMES = {"weight": "v_head.summary.weight", "bias": "v_head.summary.bias"}


def add_value_head(model: Any, folder: Path | None = None) -> None:
    """A `value_head` beside the head for tokens of a (PEFT) causal language model, to be trained.

    It is the one in the folder's VALUE_HEAD_FILE; where there is none, its values are 0 until it
    learns. Raises UserError for a file that holds no value head of the model.
    """
    inner = transformers_model(model)
    like = next(inner.parameters())
    config: Any = inner.config.get_text_config()
    head = nn.Linear(config.hidden_size, 1, device=like.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    path = None if folder is None else folder / VALUE_HEAD_FILE
    if path is not None and path.is_file():
        with torch.no_grad():
            for name, tensor in _saved(path, head).items():
                head.get_parameter(name).copy_(tensor)
    inner.value_head = head  # in float32, as adapters are


def has_value_head(model: Any) -> bool:
    return hasattr(transformers_model(model), "value_head")


def save_value_head(model: Any, folder: Path) -> None:
    """Writes VALUE_HEAD_FILE into the folder where the model has a `value_head`."""
    head = getattr(transformers_model(model), "value_head", None)
    if head is not None:
        state = head.state_dict()
        tensors = {_NAMES[key]: state[key].detach().cpu().clone() for key in _NAMES}
        save_file(tensors, folder / VALUE_HEAD_FILE, metadata={"format": "pt"})


def _saved(path: Path, head: nn.Linear) -> dict[str, Tensor]:
    """The file's tensors by the head's names."""
    try:
        stored = load_file(path)
        found = {name: stored[theirs] for name, theirs in _NAMES.items()}
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(
            f"{path}: holds no value head ({reason(error)}); get the complete one"
        ) from error
    for name, tensor in found.items():
        expected = head.get_parameter(name).shape
        if tensor.shape != expected:
            raise UserError(
                f"{path}: {_NAMES[name]} is {list(tensor.shape)}, the model's value head "
                f"{list(expected)}; give the model that it was trained on"
            )
    return found


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
