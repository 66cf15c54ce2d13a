"""What people do with an accelerated model: right, or as the model's own."""

import copy
import functools
import inspect
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import lora_engine
from lora_engine.errors import UserError
from lora_engine.testing import tiny_llama, with_lora

IDS = torch.arange(3, 43).view(2, 20)


def pair(**options: Any) -> tuple[Any, Any]:
    """An accelerated model and a plain copy of it."""
    plain = with_lora(tiny_llama(), **{"init_lora_weights": False, **options})
    ours = copy.deepcopy(plain)
    lora_engine.accelerate(ours)
    return ours, plain


def gradients(model: Any, between: Any = None) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    if between is not None:
        between(model)
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    scale = max(grad.abs().max() for grad in theirs.values())
    for name, grad in theirs.items():
        assert (ours[name] - grad).abs().max() <= 1e-4 * scale, name


def reference_pass(model: Any) -> None:
    with torch.no_grad(), model.disable_adapter():
        model(input_ids=IDS)


def pass_of_another_adapter(model: Any) -> None:
    model.set_adapter("other")
    with torch.no_grad():
        model(input_ids=IDS)
    model.set_adapter("default")


@pytest.mark.parametrize("between", [reference_pass, pass_of_another_adapter])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_other_passes_before_the_backward_pass(variant: str, between: Any) -> None:
    """Preference losses compare with the base model, or another adapter, on the way."""
    plain = with_lora(tiny_llama(), init_lora_weights=False, use_dora=variant == "dora")
    plain.add_adapter("other", peft.LoraConfig(r=2, target_modules="all-linear"))
    ours = copy.deepcopy(plain)
    lora_engine.accelerate(ours)
    assert_equal(gradients(ours, between), gradients(plain, between))


def test_factors_changed_before_the_backward_pass_are_an_error_as_in_torch() -> None:
    def step(model: Any) -> None:
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(1.0)

    for model in pair():
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradients(model, step)


def test_unfrozen_base_weights_get_gradients() -> None:
    results = []
    for model in pair():
        for name, parameter in model.named_parameters():
            if "base_layer" in name:
                parameter.requires_grad_(True)
        results.append(gradients(model))
    assert any("base_layer" in name for name in results[0])
    assert_equal(*results)


def test_functional_call_computes_with_what_it_is_given() -> None:
    ours, plain = pair()
    other = {name: 0.5 * p.detach() for name, p in plain.named_parameters()}
    logits = [
        torch.func.functional_call(m.eval(), other, (), {"input_ids": IDS}).logits
        for m in (ours, plain)
    ]
    assert torch.allclose(*logits, atol=1e-5)


@pytest.mark.parametrize("where", ["v_proj", "lora_A.default", "base_layer", "mlp", "layers.1"])
def test_forward_hooks_change_results_as_without(where: str) -> None:
    results = []
    for model in pair():
        for name, module in model.named_modules():
            if name.endswith(where):
                module.register_forward_hook(lambda module, args, output: output * 1.5)
        results.append(gradients(model))
    assert_equal(*results)


def test_hooks_see_all_rows_of_the_last_layer() -> None:
    seen: list[list[torch.Size]] = []
    labels = IDS.clone()
    labels[:, :12] = -100
    for model in pair():
        seen.append([])
        layers = model.get_base_model().model.layers
        layers[-1].mlp.register_forward_hook(lambda m, args, y, to=seen[-1]: to.append(y.shape))
        model.train()(input_ids=IDS, labels=labels).loss.backward()
    assert seen[0] == seen[1]


def test_backward_hooks_run() -> None:
    counts = []
    for model in pair():
        calls: list[str] = []
        for name, module in model.named_modules():
            if name.endswith(("q_proj", "mlp")):
                module.register_full_backward_hook(lambda m, gi, go, to=calls: to.append("x"))
        gradients(model)
        counts.append(len(calls))
    assert counts[0] == counts[1] > 0


def test_every_replaced_forward_shows_what_the_original_does() -> None:
    model = with_lora(tiny_llama(), target_modules=["q_proj", "down_proj", "embed_tokens"])
    plain = {name: module.forward for name, module in model.named_modules()}
    plain = {name: (inspect.signature(f), f.__name__, f.__doc__) for name, f in plain.items()}
    lora_engine.accelerate(model)
    replaced = 0
    for name, module in model.named_modules():
        forward = vars(module).get("forward")
        if forward is not None:
            replaced += 1
            assert (inspect.signature(forward), forward.__name__, forward.__doc__) == plain[name]
    assert replaced > 8


def test_a_single_argument_can_be_given_by_its_name() -> None:
    model = with_lora(tiny_llama(), target_modules=["q_proj", "down_proj"])
    lora_engine.accelerate(model)
    x = torch.randn(2, 3, model.config.hidden_size)
    inner = model.get_base_model()
    layer = inner.model.layers[0]
    for module in (inner.lm_head, layer.mlp, layer.input_layernorm):
        assert "forward" in vars(module)
        (name, *_) = inspect.signature(module.forward).parameters
        assert torch.equal(module(**{name: x}), module(x))
        with pytest.raises(TypeError):
            module(nothing=x)


def test_left_padding_reaches_models_that_need_positions() -> None:
    """generate() asks the forward's signature whether it takes position_ids."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4)
    model = transformers.GPT2LMHeadModel(config).eval()
    mask = torch.ones_like(IDS)
    mask[1, :9] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    given = {"input_ids": IDS, "attention_mask": mask}
    expected = model.generate(**given, **options)
    lora_engine.accelerate(model)
    assert torch.equal(model.generate(**given, **options), expected)


def test_peft_s_trainer_steps_as_without(tmp_path: Path) -> None:
    """transformers' Trainer takes the columns that the forward's signature names."""
    import datasets

    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in IDS.repeat(4, 1)]
    losses = []
    for model in pair():
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=3,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
            learning_rate=1e-2,
        )
        data = datasets.Dataset.from_list(rows)
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_peft_around_an_accelerated_base(tmp_path: Path) -> None:
    base = tiny_llama()
    plain = with_lora(copy.deepcopy(base), init_lora_weights=False).eval()
    plain.save_pretrained(tmp_path)
    lora_engine.accelerate(base)
    model = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    expected = plain(IDS).logits
    assert torch.allclose(model(IDS).logits, expected, atol=1e-5)
    report = lora_engine.accelerate(model)
    assert not report.left
    assert torch.allclose(model(IDS).logits, expected, atol=1e-5)


def plain_forwards(model: nn.Module) -> bool:
    return all("forward" not in vars(module) for module in model.modules())


@pytest.mark.parametrize("way_out", ["merge_and_unload", "unload"])
def test_what_peft_unloads_is_an_ordinary_model(way_out: str, tmp_path: Path) -> None:
    ours, plain = (getattr(model.eval(), way_out)() for model in pair())
    assert plain_forwards(ours)
    assert all(p.is_contiguous() for p in ours.parameters())
    ours.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.allclose(loaded(IDS).logits, plain(IDS).logits, atol=1e-5)
    ours.requires_grad_(True), plain.requires_grad_(True)
    assert_equal(gradients(ours), gradients(plain))


def test_the_base_under_peft_saves_all_its_weights(tmp_path: Path) -> None:
    saved = []
    for name, model in zip(("ours", "plain"), pair(), strict=True):
        model.get_base_model().save_pretrained(tmp_path / name)
        saved.append(load_file(tmp_path / name / "model.safetensors"))
    assert not all(p.is_contiguous() for p in pair()[0].parameters())
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])


def test_a_copy_is_restored_by_itself() -> None:
    ours, plain = pair()
    twin = copy.deepcopy(ours)
    lora_engine.restore(twin)
    assert plain_forwards(twin) and not plain_forwards(ours)
    assert torch.equal(twin.eval()(IDS).logits, plain.eval()(IDS).logits)
    lora_engine.accelerate(twin)
    assert_equal(gradients(twin), gradients(plain))
    assert_equal(gradients(ours), gradients(plain))


def test_restoring_leaves_what_others_put_there() -> None:
    ours, _ = pair()
    inner = ours.get_base_model()
    accelerated = inner.forward

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return accelerated(*args, **kwargs)

    inner.forward = wrapper
    lora_engine.restore(ours)
    assert inner.forward is wrapper


def results(model: Any) -> torch.Tensor:
    """A step's loss, the sum of its gradients, and the next token's logits [500]."""
    found = gradients(model)
    loss = model(input_ids=IDS, labels=IDS).loss.detach()
    logits = model.eval()(IDS).logits[0, -1].detach()
    return torch.cat([torch.stack([loss, *(grad.sum() for grad in found.values())]), logits])


class ComputedInAWorker(torch.utils.data.Dataset[torch.Tensor]):
    def __init__(self, model: Any) -> None:
        self.model = model

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> torch.Tensor:
        return results(self.model)


def test_forked_workers_compute_the_same_after_the_parent_has_on_two_threads() -> None:
    ours, plain = pair()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        results(ours)
        loader = torch.utils.data.DataLoader(
            ComputedInAWorker(ours), num_workers=1, multiprocessing_context="fork", timeout=60
        )
        forked = next(iter(loader))[0]
    finally:
        torch.set_num_threads(before)
    assert (forked - results(plain)).abs().max() <= 1e-4 * forked.abs().max()


def test_a_gradient_penalty_is_refused() -> None:
    """Autograd's own `once_differentiable` would leave it out without a word."""
    model = pair()[0]
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    loss = model(inputs_embeds=embedded, labels=IDS).loss
    with pytest.raises(UserError, match=r"no second derivatives.*lora_engine\.restore\(model\)"):
        torch.autograd.grad(loss, embedded, create_graph=True)


@pytest.mark.parametrize("whole", [True, False])
def test_selective_checkpointing_computes_all_again(whole: bool) -> None:
    """A policy that keeps everything cannot know what kernels write into PyTorch's results."""
    ours, plain = pair()

    def everything(*args: Any, **options: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE

    contexts = functools.partial(create_selective_checkpoint_contexts, everything)
    options = {"use_reentrant": False, "context_fn": contexts}
    if not whole:
        ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        ours.enable_input_require_grads()
        assert_equal(gradients(ours), gradients(plain))
        return
    ours.train()
    checkpoint(lambda: ours(input_ids=IDS, labels=IDS).loss, **options).backward()
    grads = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    assert_equal(grads, gradients(plain))


def refuses(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
    raise AssertionError(f"torch.compile traced a replaced forward: {graph.code}")


@pytest.mark.parametrize("compiled", ["the model", "its layers", "their parts"])
def test_torch_compile_leaves_replaced_forwards_as_they_are(compiled: str) -> None:
    ours, _ = pair()
    expected = gradients(ours)
    layers = ours.get_base_model().model.layers
    parts = {"the model": [ours], "its layers": layers}
    for part in parts.get(compiled, [part for layer in layers for part in layer.children()]):
        part.compile(backend=refuses)
    actual = gradients(ours)
    assert all(torch.equal(actual[name], grad) for name, grad in expected.items())


def test_every_replaced_forward_is_left_uncompiled() -> None:
    """An embedding's, a layer norm's and a head's are, beside those of a Llama's layers."""
    options = {"vocab_size": 97, "hidden_size": 32, "num_attention_heads": 4, "rotary_pct": 0.5}
    sizes = {"num_hidden_layers": 2, "intermediate_size": 48}
    neox = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**options, **sizes))
    llama = with_lora(tiny_llama(), target_modules=["q_proj", "down_proj", "embed_tokens"])
    replaced = set()
    for model in (neox, llama):
        lora_engine.accelerate(model)
        replaced |= {type(vars(m).get("forward")) for m in model.modules()} - {type(None)}
    assert len(replaced) >= 8
    for kind in replaced:
        assert getattr(kind.__call__, "_torchdynamo_disable", False), kind


def test_a_pickled_copy_is_restored_and_accelerated_like_its_original() -> None:
    model = tiny_llama()
    ids = torch.arange(11)[None]
    lora_engine.accelerate(model)
    expected = model(input_ids=ids).logits
    for change in (lora_engine.restore, lora_engine.accelerate):
        copied = pickle.loads(pickle.dumps(model))
        change(copied)
        copied.train()
        torch.testing.assert_close(copied(input_ids=ids).logits, expected)
