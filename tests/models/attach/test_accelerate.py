import copy
from typing import Any

import peft
import pytest
import torch
import transformers
from transformers_models import MODELS, SIZES, assert_same, batch, loss_and_gradients, make

import lora_engine
from lora_engine import backends
from lora_engine.errors import UserError
from lora_engine.models.attach import decoder_layer
from lora_engine.models.attach.lazy_logits import LazyLogits
from lora_engine.testing import error, tiny_llama, with_lora


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_peft(name: str, padding: str) -> None:
    model = with_lora(make(name))
    theirs = loss_and_gradients(model, batch(padding))
    report = lora_engine.accelerate(model, strict=True)
    assert report.replaced and not report.left
    assert_same(loss_and_gradients(model, batch(padding)), theirs, 1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_full_training_without_peft(name: str) -> None:
    model = make(name)
    theirs = loss_and_gradients(model, batch("right"))
    lora_engine.accelerate(model)
    assert_same(loss_and_gradients(model, batch("right")), theirs, 1e-4)


def test_norms_of_heads_can_be_trained() -> None:
    model = with_lora(make("qwen3"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or "_norm.weight" in name)
    theirs = loss_and_gradients(model, batch())
    assert sum("q_norm" in name or "k_norm" in name for name in theirs[1]) == 4
    lora_engine.accelerate(model, strict=True)
    assert_same(loss_and_gradients(model, batch()), theirs, 1e-4)


def test_norms_of_heads_that_are_not_ours_run_as_modules() -> None:
    """PEFT's wrapper around a norm trained in full is no norm that we know."""
    model = with_lora(make("qwen3"), modules_to_save=["q_norm", "k_norm"])
    theirs = loss_and_gradients(model, batch())
    lora_engine.accelerate(model)
    assert_same(loss_and_gradients(model, batch()), theirs, 1e-4)


def test_the_mlp_half_is_one_function_where_attention_has_no_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    theirs = loss_and_gradients(with_lora(make("llama")), batch())
    explain, runs_fused = backends.explain, backends.runs_fused

    def without_attention(operation: str, *args: Any, **kwargs: Any) -> Any:
        forced = {"impl": "reference"} if operation == "attention" else {}
        return explain(operation, *args, **kwargs, **forced)

    monkeypatch.setattr(backends, "explain", without_attention)
    monkeypatch.setattr(
        backends, "runs_fused", lambda name, *on: "mlp" in name and runs_fused(name, *on)
    )
    calls = []
    block = decoder_layer.mlp_block
    monkeypatch.setattr(
        decoder_layer, "mlp_block", lambda *args, **kw: calls.append(1) or block(*args, **kw)
    )
    model = with_lora(make("llama"))
    report = lora_engine.accelerate(model)
    assert [entry.operation for entry in report.left] == ["attention"]
    calls.clear()  # of the tries
    assert_same(loss_and_gradients(model, batch()), theirs, 1e-4)
    assert len(calls) == 2


def test_bfloat16_is_close() -> None:
    model = with_lora(tiny_llama(dtype=torch.bfloat16))
    exact = with_lora(tiny_llama(dtype=torch.float32))
    exact.load_state_dict(model.state_dict())
    oracle = loss_and_gradients(exact, batch())
    theirs = loss_and_gradients(model, batch())
    lora_engine.accelerate(model, strict=True)
    ours = loss_and_gradients(model, batch())
    assert abs(ours[0] - oracle[0]) <= abs(theirs[0] - oracle[0]) + 2e-3 * oracle[0]
    scale = max(grad.abs().max().item() for grad in oracle[1].values())
    for parameter, grad in oracle[1].items():
        limit = error(theirs[1][parameter], grad, scale) + 1e-2
        assert error(ours[1][parameter], grad, scale) <= limit, parameter


def test_packed_rows_equal_separate_rows() -> None:
    model = with_lora(tiny_llama())
    ids = torch.randint(0, 97, (30,))
    positions = torch.cat((torch.arange(12), torch.arange(18)))
    labels = ids.clone()
    labels[[0, 12]] = -100
    lora_engine.accelerate(model)
    packed = model(
        input_ids=ids[None], position_ids=positions[None], labels=labels[None], use_cache=False
    ).loss
    parts = [model(input_ids=x[None], labels=x[None].clone()).loss for x in ids.split([12, 18])]
    assert torch.allclose(packed * 28, parts[0] * 11 + parts[1] * 17, rtol=1e-5)


def test_restore_brings_everything_back() -> None:
    model = with_lora(tiny_llama())
    before = {name: (p.clone(), p.stride()) for name, p in model.named_parameters()}
    forwards = {name: vars(module).get("forward") for name, module in model.named_modules()}
    theirs = loss_and_gradients(model, batch())
    lora_engine.accelerate(model)
    loss_and_gradients(model, batch())
    lora_engine.restore(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0]) and parameter.stride() == before[name][1]
    assert forwards == {n: vars(module).get("forward") for n, module in model.named_modules()}
    assert model.config._attn_implementation != "lora_engine"
    again = loss_and_gradients(model, batch())
    assert again[0] == theirs[0]
    assert all(torch.equal(again[1][name], grad) for name, grad in theirs[1].items())


def test_accelerating_twice_is_accelerating_once() -> None:
    model = with_lora(tiny_llama())
    lora_engine.accelerate(model)
    first = loss_and_gradients(model, batch())
    report = lora_engine.accelerate(model, strict=True)
    assert not report.left and loss_and_gradients(model, batch())[0] == first[0]


def test_disabled_and_merged_adapters_are_honoured() -> None:
    model = with_lora(tiny_llama())
    plain = copy.deepcopy(model)
    lora_engine.accelerate(model)
    ids = batch()["input_ids"]
    with torch.no_grad():
        with model.disable_adapter(), plain.disable_adapter():
            assert torch.allclose(model(ids).logits, plain(ids).logits, atol=1e-5)
        expected = plain(ids).logits
        assert torch.allclose(model(ids).logits, expected, atol=1e-5)
        model.merge_adapter()
        assert torch.allclose(model(ids).logits, expected, atol=1e-4)
        model.unmerge_adapter()
        assert torch.allclose(model(ids).logits, expected, atol=1e-4)


def test_another_adapter_can_be_switched_to() -> None:
    model = with_lora(tiny_llama())
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules="all-linear"))
    plain = copy.deepcopy(model)
    lora_engine.accelerate(model)
    for name in ("other", "default"):
        model.set_adapter(name), plain.set_adapter(name)
        assert_same(loss_and_gradients(model, batch()), loss_and_gradients(plain, batch()), 1e-4)


def test_moved_weights_are_noticed() -> None:
    for _ in range(2):  # of each model
        model = with_lora(tiny_llama())
        lora_engine.accelerate(model)
        model.double()
        with pytest.warns(UserWarning, match="were moved or exchanged after"):
            assert torch.isfinite(model(**batch()).loss)


@pytest.mark.parametrize("adapted", ["q_proj", "lm_head"])
@pytest.mark.parametrize("change", ["transposed", "fewer"])
def test_another_part_or_order_of_the_same_memory_is_noticed(adapted: str, change: str) -> None:
    plain = with_lora(tiny_llama(), target_modules=[adapted])
    ours = copy.deepcopy(plain)
    lora_engine.accelerate(ours)
    ids = batch()["input_ids"]
    before = plain(ids).logits
    for model in (plain, ours):
        layer = model.get_base_model().model.layers[0]
        if change == "transposed":  # of the same shape
            layer.self_attn.o_proj.weight.data = layer.self_attn.o_proj.weight.data.t()
        else:  # as units are pruned
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
                linear.weight.data = linear.weight.data[:20]
            layer.mlp.down_proj.weight.data = layer.mlp.down_proj.weight.data[:, :20]
    expected = plain(ids).logits
    assert not torch.allclose(before, expected, atol=1e-3)
    with pytest.warns(UserWarning, match="were moved or exchanged after"):
        assert torch.allclose(ours(ids).logits, expected, atol=1e-5)


@pytest.mark.parametrize("padding", ["none", "left"])
def test_generation_is_unchanged(padding: str) -> None:
    model = with_lora(tiny_llama()).eval()
    given = {k: v for k, v in batch(padding).items() if k != "labels"}
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**given, **options)
    lora_engine.accelerate(model)
    assert torch.equal(model.generate(**given, **options), expected)


def test_evaluation_still_returns_logits() -> None:
    model = with_lora(tiny_llama())
    lora_engine.accelerate(model)
    assert isinstance(dict(model(**batch()).items())["logits"], LazyLogits)
    assert model.eval()(**batch()).logits.shape == (3, 20, 97)
    assert model.train()(batch()["input_ids"]).logits.shape == (3, 20, 97)


def test_num_items_in_batch_divides_the_loss() -> None:
    model = with_lora(tiny_llama())
    theirs = model(**batch(), num_items_in_batch=torch.tensor(100)).loss
    lora_engine.accelerate(model)
    assert torch.allclose(model(**batch(), num_items_in_batch=torch.tensor(100)).loss, theirs)


def test_what_is_not_covered_is_left_right_and_said() -> None:
    reason = "DoRA with lora_dropout > 0"
    biased = tiny_llama(mlp_bias=True, attention_bias=True)
    model = with_lora(biased, use_dora=True, lora_dropout=0.1)
    plain = copy.deepcopy(model)
    report = lora_engine.accelerate(model)
    assert any(reason in entry.detail for entry in report.left)
    assert reason in str(report)
    ours, theirs = (loss_and_gradients(each.eval(), batch()) for each in (model, plain))
    assert_same(ours, theirs, 1e-4)
    with pytest.raises(UserError, match="left parts"):
        lora_engine.accelerate(model, strict=True)


def test_a_model_with_other_parts_keeps_them() -> None:
    model = with_lora(tiny_llama(hidden_act="relu"))
    theirs = loss_and_gradients(model, batch("right"))
    report = lora_engine.accelerate(model)
    assert any("not SiLU or GELU" in entry.detail for entry in report.left)
    assert_same(loss_and_gradients(model, batch("right")), theirs, 1e-4)


def test_gemmas_mlp_is_covered() -> None:
    torch.manual_seed(0)
    config = transformers.GemmaConfig(**SIZES, head_dim=8, tie_word_embeddings=True)
    model = with_lora(transformers.AutoModelForCausalLM.from_config(config))
    theirs = loss_and_gradients(model, batch("right"))
    report = lora_engine.accelerate(model)
    covered = {entry.module for entry in report.replaced if entry.operation == "glu (gelu_tanh)"}
    assert len(covered) == SIZES["num_hidden_layers"]
    assert_same(loss_and_gradients(model, batch("right")), theirs, 1e-4)


def test_verify_passes_and_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_lora(tiny_llama())
    lora_engine.accelerate(model, verify=batch())
    from lora_engine.models.attach import decoder_layer

    block = decoder_layer.mlp_block

    def wrong_gradients(*args: Any, **options: Any) -> torch.Tensor:
        y = block(*args, **options)
        return y + 0.5 * (y - y.detach())

    monkeypatch.setattr(decoder_layer, "mlp_block", wrong_gradients)
    monkeypatch.setattr("lora_engine.models.attach.accelerate.same_training", lambda *tried: None)
    with pytest.raises(ValueError, match="verify"):
        lora_engine.accelerate(model, verify=batch())
    assert model.config._attn_implementation != "lora_engine"


def test_verify_judges_float32_adapters_by_the_bfloat16_weights_under_them() -> None:
    model = with_lora(tiny_llama(dtype=torch.bfloat16))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    lora_engine.accelerate(model, verify=batch("right"))


def test_adapter_saved_by_peft_loads_into_a_plain_model(tmp_path: Any) -> None:
    model = with_lora(tiny_llama())
    lora_engine.accelerate(model)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    ids = batch()["input_ids"]
    assert torch.allclose(loaded(ids).logits, model.eval()(ids).logits, atol=1e-5)


def test_gradient_checkpointing_runs_layers_again_for_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lora_engine.models.attach import decoder_layer

    model = with_lora(tiny_llama(), lora_dropout=0.3)
    lora_engine.accelerate(model)
    runs, block = [], decoder_layer.mlp_block
    monkeypatch.setattr(
        decoder_layer, "mlp_block", lambda *a, **k: (runs.append(1), block(*a, **k))[1]
    )
    results = []
    for layers in (2, 4):
        runs.clear()
        torch.manual_seed(0)
        results.append(loss_and_gradients(model, batch()))
        assert len(runs) == layers
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    assert_same(results[1], results[0], 1e-5)


@pytest.mark.parametrize("with_adapters", [True, False])
def test_models_that_are_not_of_transformers_are_refused_in_one_line(with_adapters: bool) -> None:
    model: Any = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    if with_adapters:
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"]))
    else:
        model = torch.nn.Sequential(tiny_llama())
    with pytest.raises(UserError, match=r"^accelerate: Sequential is no model of transformers.*$"):
        lora_engine.accelerate(model)


class HasModel:
    model = None


@pytest.mark.parametrize(
    "given,mend",
    [
        (None, "NoneType .* give a model, not its name or parts"),
        ("smollm2", "str .* give a model, not its name or parts"),
        (HasModel(), r"HasModel .* give trainer\.model"),
    ],
)
def test_what_is_no_module_is_refused_in_one_line(given: Any, mend: str) -> None:
    with pytest.raises(UserError, match=f"^accelerate: {mend}$"):
        lora_engine.accelerate(given)
    with pytest.raises(UserError, match=r"^restore: \w+ is no model; give the accelerated one$"):
        lora_engine.restore(given)


@pytest.mark.parametrize(
    "mode", [torch.device("meta"), torch.autocast("cpu", torch.bfloat16), torch.no_grad()]
)
def test_the_mode_in_which_it_is_called_does_not_count(mode: Any) -> None:
    model = with_lora(tiny_llama(), init_lora_weights=False)
    with mode:
        report = lora_engine.accelerate(model)
    assert report.replaced and not report.left
