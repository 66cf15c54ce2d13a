"""Models that would learn nothing: each fails before the run, in one line that names the cause."""

from dataclasses import replace

import peft
import pytest
import torch
import transformers
from torch import nn
from training_helpers import (
    accelerated,
    assert_same_bits,
    layer,
    make_examples,
    one_batch,
    rows,
    tiny_llama,
    tiny_lora,
    trainable,
)

from lora_engine import UserError, preflight


def without_training(model):
    return model.requires_grad_(False), rows()


def loaded_for_inference(model, tmp_path):
    model.save_pretrained(tmp_path)
    return peft.PeftModel.from_pretrained(tiny_llama(), tmp_path), rows()


def disabled(model):
    model.base_model.disable_adapter_layers()
    return model, rows()


def merged(model):
    model.merge_adapter()
    return model, rows()


def one_layer_merged(model):
    layer(model).mlp.up_proj.merge()
    return model, rows()


def not_active(model):
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model, rows()


def all_ignored(model):
    return model, {**rows(), "labels": torch.full((3, 12), -100)}


def first_column_only(model):
    labels = torch.full((3, 12), -100)
    labels[:, 0] = 5
    return model, {**rows(), "labels": labels}


def unsupervised(model):
    examples = [replace(e, supervised=[False] * len(e)) for e in make_examples(3)]
    return model, one_batch(examples)


def no_labels(model):
    return model, {key: value for key, value in rows().items() if key != "labels"}


def no_mapping(model):
    return model, list(rows().values())


def reentrant(model):
    inner = model.get_base_model()
    inner.gradient_checkpointing_enable({"use_reentrant": True})
    inner.disable_input_require_grads()
    return model, rows()


def detached(model):
    layer(model).mlp.register_forward_hook(lambda module, args, output: output.detach())
    return model, rows()


def passed_by(model):
    up = layer(model, 0).mlp.up_proj
    up.forward = up.base_layer.forward
    return model, rows()


def copy_of_a(model):
    """B is trained, A computes with a copy of itself."""
    up = layer(model, 0).mlp.up_proj
    a, b = up.lora_A["default"].weight.detach().clone(), up.lora_B["default"].weight
    up.forward = lambda x: up.base_layer(x) + x @ a.T @ b.T
    return model, rows()


def no_gradient_of_a(model):
    """At first A has none anyway, as B is 0."""
    layer(model, 0).mlp.up_proj.lora_A["default"].weight.register_hook(torch.zeros_like)
    return model, rows()


def masked(model):
    """The only adapted layer's output is multiplied by zero later."""
    inner = tiny_llama()
    model = peft.get_peft_model(inner, peft.LoraConfig(target_modules=["layers.1.mlp.up_proj"]))
    layer(model).mlp.register_forward_hook(lambda module, args, output: output * 0)
    return model, rows()


def scaled_by_zero(model):
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.scaling["default"] = 0
    return model, rows()


def both_zero(model):
    up = layer(model).mlp.up_proj
    nn.init.zeros_(up.lora_A["default"].weight)
    return model, rows()


def computes_with_copies(model):
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            for linear in (module.lora_A["default"], module.lora_B["default"]):
                linear.forward = StaleLinear(linear)
    return model, rows()


class StaleLinear:
    """Has right gradients, and computes with the first weight for ever."""

    def __init__(self, linear):
        self.weight, self.first = linear.weight, linear.weight.detach().clone()

    def __call__(self, x):
        return nn.functional.linear(x, self.first + self.weight - self.weight.detach())


def nan_weight(model):
    with torch.no_grad():
        layer(model).mlp.up_proj.base_layer.weight[3] = torch.nan
    return model, rows()


def infinite_gradient(model):
    layer(model).mlp.up_proj.register_full_backward_hook(
        lambda module, given, taken: (given[0] * float("inf"),)
    )
    return model, rows()


def overflowing(model):
    model = tiny_llama(torch.float16)
    with torch.no_grad():
        layer(model).mlp.down_proj.weight.mul_(6e4)
    return model, rows()


def frozen_changes(model):
    @torch.no_grad()
    def grow(module, args):
        module.base_layer.weight.mul_(1.001)

    layer(model).mlp.up_proj.register_forward_pre_hook(grow)
    return model, rows()


def frozen_rows_change_places(model):
    def roll(module, args):
        weight.copy_(weight.roll(1, 0))

    weight = layer(model).mlp.up_proj.base_layer.weight.data
    layer(model).register_forward_pre_hook(roll)
    return model, rows()


def frozen_changes_to_and_fro(model):
    def turn(module, args):
        weight.neg_()

    weight = layer(model).mlp.up_proj.base_layer.weight.data
    layer(model).register_forward_pre_hook(turn)
    return model, rows()


def other_factor_frozen(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_A" in name)
    return model, rows()


def nan_where_nothing_looks(model):
    layer(model).expert = nn.Linear(3, 2).requires_grad_(False)
    nn.init.constant_(layer(model).expert.weight, torch.nan)
    return model, rows()


def too_long(model):
    sizes = {"n_embd": 8, "n_head": 1, "n_layer": 1, "n_positions": 8}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=61, **sizes)), rows()


def never_called(model):
    inner = tiny_llama()
    inner.spare = nn.ModuleDict({"q_proj": nn.Linear(8, 8)})
    return peft.get_peft_model(inner, peft.LoraConfig(target_modules=["spare.q_proj"])), rows()


def frozen_in_the_forward(model):
    weight = layer(model).mlp.up_proj.lora_B["default"].weight

    def freeze(module, args):
        weight.requires_grad_(False)

    layer(model).mlp.register_forward_pre_hook(freeze)
    return model, rows()


def takes_no_labels(model):
    model = nn.Sequential(nn.Linear(4, 4))
    return model, {"input": torch.ones(2, 4), "labels": torch.ones(2, 4)}


def gives_only_logits(model):
    class Head(nn.Linear):
        def forward(self, input):
            return (super().forward(input),)

    return Head(4, 4), {"input": torch.ones(2, 4)}


WRONG = {
    frozen_in_the_forward: ("up_proj.lora_B.default.weight", "sets its requires_grad to False"),
    takes_no_labels: ("Sequential takes no labels", "loss=f(model, batch)"),
    gives_only_logits: ("returns no loss for the batch of input", "loss=f(model, batch)"),
    without_training: ("no trainable parameters", "is_trainable=True"),
    disabled: ("no trainable parameters", "its adapters are disabled", "enable_adapter_layers()"),
    merged: ("(and 27 more)", "merged into the base weight", "unmerge_adapter()"),
    one_layer_merged: ("layers.1.mlp.up_proj.lora_A.default.weight (and 1 more)", "merged"),
    not_active: ("q_proj.lora_A.other.weight", "not active: call model.set_adapter('other')"),
    all_ignored: ("no token of the batch is supervised",),
    first_column_only: ("no token of the batch is supervised",),
    unsupervised: ("no token of the batch is supervised",),
    no_labels: ("no loss for the batch of input_ids", "give it labels"),
    no_mapping: ("the batch is list", "give a mapping"),
    reentrant: ("checkpointing is reentrant", "enable_input_require_grads()"),
    detached: ("layers.1.mlp", "lora_A.default.weight (and 5 more) gets no gradient", "detach()"),
    passed_by: ("'default' changes nothing in the output of", "layers.0.mlp.up_proj"),
    copy_of_a: ("up_proj.lora_A.default.weight changes nothing in the output of", "mlp.up_proj"),
    no_gradient_of_a: ("up_proj.lora_A.default.weight gets a gradient of zero", "a hook"),
    masked: ("adapter 'default' changes nothing in the loss", "factor of zero"),
    scaled_by_zero: ("its scaling is 0",),
    both_zero: ("layers.1.mlp.up_proj.lora_A.default.weight (and 1 more)", "both zero"),
    computes_with_copies: ("the loss stays 4.65", "computes with other values"),
    nan_weight: ("the loss is nan", "layers.1.mlp.up_proj.base_layer (its weight is not finite)"),
    infinite_gradient: ("the gradient of", "is not finite"),
    overflowing: ("mlp.down_proj", "float16 ends at 65,504"),
    nan_where_nothing_looks: ("layers.1.expert.weight holds 6 NaN", "load them again"),
    too_long: ("transformer.wpe has 8 rows", "shorter sequences"),
    never_called: ("depends on nothing that is trained", "spare.q_proj.lora_A"),
    other_factor_frozen: ("lora_A.default.weight (and 13 more)", "lora_B", "zero and frozen"),
    frozen_rows_change_places: ("up_proj.base_layer.weight is frozen", "changes it"),
    frozen_changes_to_and_fro: ("up_proj.base_layer.weight is frozen", "changes it"),
    frozen_changes: ("layers.1.mlp.up_proj.base_layer.weight is frozen", "changes it"),
}


def check_failure(model, batch, *words):
    before = trainable(model)
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(UserError) as caught:
        preflight(model, batch)
    line = str(caught.value)
    assert line.startswith("preflight: ") and "\n" not in line
    for word in words:
        assert word in line
    assert_same_bits(trainable(model), before)
    assert [p.requires_grad for p in model.parameters()] == flags


@pytest.mark.parametrize("case", WRONG, ids=lambda case: case.__name__)
def test_wrong_models_fail_in_one_line(case):
    check_failure(*case(tiny_lora()), *WRONG[case])


def test_an_adapter_loaded_for_inference(tmp_path):
    check_failure(*loaded_for_inference(tiny_lora(), tmp_path), "is_trainable=True")


@pytest.mark.parametrize("case", [merged, nan_weight, both_zero])
def test_wrong_accelerated_models_fail_too(case):
    model, _ = case(accelerated(tiny_lora()))
    check_failure(model, one_batch(make_examples(6)), "preflight: ")


LOSSES = {
    "factor of zero": (lambda model, batch: model(**batch).loss * 0, "changes nothing in the loss"),
    "constant": (
        lambda model, batch: torch.zeros((), requires_grad=True),
        "depends on nothing that is trained",
    ),
    "nan": (lambda model, batch: model(**batch).loss * torch.nan, "look at the loss function"),
}


@pytest.mark.parametrize("case", LOSSES)
def test_wrong_losses_of_the_users_own_fail_in_one_line(case):
    loss, words = LOSSES[case]
    with pytest.raises(UserError, match=words):
        preflight(tiny_lora(), rows(), loss=loss)


@pytest.mark.parametrize("model", [None, {"input_ids": torch.ones(1, 3)}], ids=["none", "batch"])
def test_what_is_no_model_is_refused_in_one_line(model):
    message = (
        rf"^preflight: {type(model).__name__} is no model; call it as preflight\(model, batch\)$"
    )
    with pytest.raises(UserError, match=message):
        preflight(model, rows())


def test_a_loss_that_is_no_function_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"^preflight: loss is Tensor, not a function; .*$"):
        preflight(tiny_lora(), rows(), loss=torch.tensor(3.0))
