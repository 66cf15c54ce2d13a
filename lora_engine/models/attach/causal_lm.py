"""The forward of a causal language model in training: a loss, and no logits."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from lora_engine.models.attach.attachment import attachment
from lora_engine.models.attach.backbone import takes_read_rows
from lora_engine.models.attach.forwards import ReplacedForward, uncompiled
from lora_engine.models.attach.head import Head, output_head, why_no_head
from lora_engine.models.attach.supervised_padding import computes_supervised_padding
from lora_engine.models.families.modules import BackboneOutput, CausalLm
from lora_engine.models.peft.lora_state import hooks_everywhere

# Arguments of transformers' losses that this loss does not take.
_OF_OTHER_LOSSES = ("shift_labels", "ignore_index", "weight")
_OPTIONS = ("logits_to_keep", "output_router_logits")


def why_no_loss(model: CausalLm) -> str | None:
    """Why the loss of a causal language model is not that of its head alone, or None."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    problem = why_no_head(model)
    if problem is None and getattr(model, "loss_function", None) is not ForCausalLMLoss:
        problem = "the model has another loss than the causal language models'"
    if problem is None and model.dtype == torch.float64:
        problem = "transformers rounds logits of float64 to float32 before the loss"
    if problem is None and getattr(model.config, "output_router_logits", False):
        problem = "the model adds its routers' loss (config.output_router_logits)"
    return problem


class CausalLmForward(ReplacedForward):
    """The forward of a causal language model that, given labels in training, makes no logits."""

    def __init__(self, model: CausalLm) -> None:
        self.model = model
        self.original: Callable[..., object] = model.forward

    @uncompiled
    @computes_supervised_padding
    def __call__(
        self,
        *args: object,
        labels: Tensor | None = None,  # [B, L] int64
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        **kwargs: object,
    ) -> object:
        """As the model's own; with `labels` in training `logits` are made when they are read.

        A head in a state that the loss does not cover (several adapters at once, say), a loss of
        the user's and arguments for one run as the model's own too.
        """
        if (
            labels is None
            or args
            or return_dict is False
            or not are_of_tokens(labels, kwargs)
            or self._asks_more(kwargs)
        ):
            options = {"num_items_in_batch": num_items_in_batch, "return_dict": return_dict}
            kwargs.update({key: value for key, value in options.items() if value is not None})
            return self.original(*args, labels=labels, **kwargs)
        from lora_engine.models.attach.lazy_logits import CausalLmOutput, LazyLogits

        attached = attachment(self.model)
        routed = attached is not None and attached.router.rows is not None  # not with a cache
        if routed or _means_the_same_without_cache(labels, kwargs):
            kwargs.setdefault("use_cache", False)
        targets, rows = shifted_targets(labels)
        backbone = self.model.base_model
        output: BackboneOutput = backbone(
            **kwargs | ({"read_rows": rows} if takes_read_rows(backbone) else {})
        )
        hidden, head = output.last_hidden_state, output_head(self.model)
        supervised = hidden.flatten(0, 1).index_select(0, rows)
        loss = mean_loss(supervised, head, targets, num_items_in_batch)
        logits = LazyLogits(partial(head.logits, hidden), hidden.dtype)
        if loss.requires_grad:
            given = logits.given
            loss.register_hook(lambda _: given.refuse_watchers())
            if head.is_trained:
                loss.register_hook(lambda _: logits.expire())
        return CausalLmOutput(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    def _asks_more(self, kwargs: Mapping[str, object]) -> bool:
        """Whether a call with these arguments is for the model's own loss."""
        return (
            not self.model.training
            or any(kwargs.get(name) not in (None, False, 0) for name in _OPTIONS)
            or any(kwargs.get(name) is not None for name in _OF_OTHER_LOSSES)
            or hooks_everywhere()
            or attachment(self.model) is None  # after restore(), by a caller that kept this forward
            or why_no_loss(self.model) is not None
        )


def _means_the_same_without_cache(labels: Tensor, kwargs: Mapping[str, object]) -> bool:
    """Whether transformers' mask is the same when no cache is made.

    Without a cache transformers reads two things that it else ignores: where no mask is given, the
    sequences of a packed batch off `position_ids`; and the number of keys off the mask's shape,
    which has to be the labels' then, since some models reshape masks before.
    """
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, Tensor):
        return mask is None and kwargs.get("position_ids") is None
    return mask.dim() == 4 or mask.shape == labels.shape


def are_of_tokens(labels: Tensor, arguments: Mapping[str, object]) -> bool:
    """Whether a call with these arguments has one label a token; transformers refuses others."""
    ids, embeddings = arguments.get("input_ids"), arguments.get("inputs_embeds")
    shapes = [x.shape[:2] for x in (ids, embeddings) if isinstance(x, Tensor)]
    return bool(shapes) and all(labels.shape == shape for shape in shapes)


def shifted_targets(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of labels [B, L]: those that a position before them predicts [U], and these rows [U]."""
    following = nn.functional.pad(labels[:, 1:], (0, 1), value=-100).flatten()
    rows = (following != -100).nonzero()[:, 0]  # the one read that waits for a GPU
    return following.index_select(0, rows), rows


def mean_loss(
    hidden: Tensor,  # [U, H]
    head: Head,
    targets: Tensor,  # [U] int64
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """Mean cross-entropy, or the sum over `num_items_in_batch` (transformers' accumulation).

    Without targets the mean is nan with gradients of zero, as PyTorch's is.
    """
    out = head.cross_entropy(hidden, targets, reduction="sum")
    if num_items_in_batch is None:
        return out.loss / targets.numel() if targets.numel() else out.loss + torch.nan
    return out.loss / torch.as_tensor(num_items_in_batch, device=out.loss.device)
