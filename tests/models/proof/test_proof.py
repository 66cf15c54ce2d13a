"""accelerate() replaces what gives the model's own results, and says what it leaves and why."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as t
from tiny_model import SMALL

import lora_engine
from lora_engine.errors import UserError
from lora_engine.models.proof import proof
from lora_engine.testing import tiny_llama, with_lora

SIZES = {**SMALL, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BERT = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "intermediate_size")}
BERT |= {"num_hidden_layers": 2, "num_attention_heads": 4}
BERT |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
IDS = torch.arange(3, 43).view(2, 20)


def spread(model: Any) -> Any:
    """Larger attention scores, router weights and sinks, so that what is left out would show."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 3 or "sinks" in name:
                p.normal_(0, 0.1 if p.dim() == 3 else 1.0)
            elif "q_proj" in name or "k_proj" in name:
                p.mul_(8)
    return model


def gpt_oss() -> Any:
    config = t.GptOssConfig(**SIZES, head_dim=8, num_local_experts=4, num_experts_per_tok=2)
    return spread(t.GptOssForCausalLM(config))


def mixtral() -> Any:
    options = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
    return t.MixtralForCausalLM(t.MixtralConfig(**SIZES, **options, router_aux_loss_coef=0.1))


def llama4(chunk: int) -> Any:
    options = {"num_local_experts": 4, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 48}
    config = t.Llama4TextConfig(**SIZES, **options, head_dim=8, attention_chunk_size=chunk)
    return spread(t.Llama4ForCausalLM(config))


def gemma2() -> Any:
    config = t.Gemma2Config(**SIZES, head_dim=8, query_pre_attn_scalar=8, sliding_window=6)
    return spread(t.Gemma2ForCausalLM(config))


def gemma3_both_ways() -> Any:
    config = t.Gemma3TextConfig(**SIZES, head_dim=8, use_bidirectional_attention=True)
    return t.Gemma3ForCausalLM(config)


def own_loss() -> Any:
    model = tiny_llama()
    model.loss_function = lambda logits, labels, **options: logits.float().square().mean()
    return model


def scaled_hidden() -> Any:
    """A head that does something before its product."""
    config = t.ModernBertDecoderConfig(**SIZES, local_attention=16, cls_token_id=3, sep_token_id=4)
    return t.ModernBertDecoderForCausalLM(config)


# A model, what is left of it, and a word of the reason.
LEFT: dict[str, tuple[Callable[[], Any], str, str]] = {
    "sinks": (gpt_oss, "attention", "s_aux"),
    "soft-capped attention": (gemma2, "attention", "softcap"),
    "routers' loss": (mixtral, "linear_cross_entropy", "routers' loss"),
    "bert decoder": (
        lambda: t.BertLMHeadModel(t.BertConfig(**BERT, is_decoder=True)),
        "linear_cross_entropy",
        "",
    ),
    "masked language model": (
        lambda: t.BertForMaskedLM(t.BertConfig(**BERT)),
        "linear_cross_entropy",
        "another loss",
    ),
    "head with a transform": (scaled_hidden, "linear_cross_entropy", "more than its head's"),
    "loss of the user's": (own_loss, "linear_cross_entropy", "another loss"),
}
# Of these no part needs to be left.
RIGHT: dict[str, Callable[[], Any]] = {
    "llama": tiny_llama,
    "chunked attention": lambda: llama4(8),
    "attention both ways": gemma3_both_ways,
    "encoder": lambda: t.BertModel(t.BertConfig(**BERT)),
    "classifier of sequences": lambda: t.LlamaForSequenceClassification(t.LlamaConfig(**SIZES)),
    "classifier of tokens": lambda: t.Qwen3ForTokenClassification(
        t.Qwen3Config(**SIZES, head_dim=8)
    ),
}


def results(model: Any) -> list[torch.Tensor]:
    """Logits or hidden states, whole and padded, and gradients of the loss where there is one."""
    mask = torch.ones_like(IDS)
    mask[1, :7] = 0
    found = []
    for given in ({"input_ids": IDS}, {"input_ids": IDS, "attention_mask": mask}):
        output = model.eval()(**given)
        rows = output["logits"] if "logits" in output else output["last_hidden_state"]
        of_tokens = len(given) == 2 and rows.shape[:2] == mask.shape
        found.append((rows[mask.bool()] if of_tokens else rows).detach())
    if model.get_output_embeddings() is not None:
        loss = model.train()(input_ids=IDS, labels=IDS).loss
        trained = [p for p in model.parameters() if p.requires_grad]
        found.append(loss.detach())
        grads = torch.autograd.grad(loss, trained, allow_unused=True)
        found += [g for g in grads if g is not None]
    return found


def assert_same(model: Any, plain: Any) -> None:
    ours, theirs = results(model), results(plain)
    assert len(ours) == len(theirs)
    scale = max(float(x.abs().max()) for x in theirs[3:] or theirs)
    for i, (x, y) in enumerate(zip(ours, theirs, strict=True)):
        of = scale if i > 2 else float(y.abs().max())
        assert float((x - y).abs().max()) <= 2e-4 * of, f"result {i}"


@pytest.mark.parametrize("name", LEFT)
def test_what_differs_is_left_and_the_report_says_why(name: str) -> None:
    torch.manual_seed(0)
    make, operation, reason = LEFT[name]
    plain = make()
    model = copy.deepcopy(plain)
    report = lora_engine.accelerate(model)
    details = [entry.detail for entry in report.left if entry.operation == operation]
    assert details and any(reason in detail for detail in details), str(report)
    assert_same(model, plain)


@pytest.mark.parametrize("name", RIGHT)
def test_other_masks_are_served(name: str) -> None:
    torch.manual_seed(0)
    plain = RIGHT[name]()
    model = copy.deepcopy(plain)
    report = lora_engine.accelerate(model)
    assert "attention" not in {entry.operation for entry in report.left}, str(report)
    assert_same(model, plain)


POSITIONS = torch.cat((torch.arange(8), torch.arange(12)))[None]


def bart() -> Any:
    sizes = {"vocab_size": 97, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4}
    return t.BartForCausalLM(t.BartConfig(**sizes, decoder_ffn_dim=48, dropout=0.0))


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("make", [tiny_llama, bart])
def test_restarting_positions_separate_what_they_do_in_transformers(
    make: Callable[[], Any], use_cache: bool
) -> None:
    """In a Llama without a cache; with one, or in a model that ignores them, they do not."""
    torch.manual_seed(0)
    plain = spread(make()).eval()
    model = copy.deepcopy(plain)
    lora_engine.accelerate(model)
    given = {"input_ids": IDS[:1], "position_ids": POSITIONS, "use_cache": use_cache}
    ours, theirs = (each(**given).logits for each in (model, plain))
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_results_may_be_changed_in_place() -> None:
    """OLMo's clip_qkv clamps what its projections return; XLM masks what its norms return."""
    torch.manual_seed(0)
    config = t.OlmoConfig(**SIZES, clip_qkv=0.05)
    plain = with_lora(t.OlmoForCausalLM(config))
    model = copy.deepcopy(plain)
    lora_engine.accelerate(model)
    assert_same(model, plain)
    sizes = {"vocab_size": 97, "emb_dim": 32, "n_layers": 2, "n_heads": 4}
    xlm = t.XLMWithLMHeadModel(t.XLMConfig(**sizes, dropout=0.0, attention_dropout=0.0))
    model = copy.deepcopy(xlm)
    lora_engine.accelerate(model)
    assert_same(model, xlm)


def test_norms_with_a_gate_are_left() -> None:
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_heads": 4, "head_dim": 16, "n_groups": 1}
    plain = t.Mamba2ForCausalLM(t.Mamba2Config(**sizes, state_size=16, num_hidden_layers=2))
    model = copy.deepcopy(plain)
    report = lora_engine.accelerate(model)
    assert "MambaRMSNormGated" in {entry.operation for entry in report.left}
    assert_same(model, plain)


def test_a_window_of_a_layer_that_its_mask_has_not_is_left() -> None:
    """Transformers' attention goes by the mask; the window is longer than what is tried."""
    plain = tiny_llama()
    for layer in plain.model.layers:
        layer.self_attn.sliding_window = 300
    report = lora_engine.accelerate(plain)
    assert any("window of 300" in entry.detail for entry in report.left), str(report)


def test_a_llama_is_covered_whole() -> None:
    assert not lora_engine.accelerate(with_lora(tiny_llama())).left


def test_the_report_accounts_for_every_weight() -> None:
    report = lora_engine.accelerate(with_lora(tiny_llama(), target_modules=["q_proj"]))
    assert report.served == report.weights > 0
    assert "100.0% of the weights" in str(report)
    model = mixtral()
    report = lora_engine.accelerate(model)
    kinds = {entry.operation for entry in report.left}
    assert {"MixtralExperts", "MixtralTopKRouter"} <= kinds, str(report)
    embedding = model.get_input_embeddings().weight.numel()
    assert report.weights == sum(p.numel() for p in model.parameters()) - embedding
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    assert report.served <= report.weights - experts
    assert report.flops == 2 * (report.weights - experts / 2)  # two experts of four
    assert report.served_flops == 2 * report.served  # of no expert
    assert f"{report.served_flops / report.flops:.1%} of their FLOPs" in str(report)
    with pytest.raises(UserError, match="MixtralExperts"):
        lora_engine.accelerate(model, strict=True)


def test_a_wrong_kernel_is_found_and_nothing_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_engine.models.attach import norm

    rms_norm = norm.ops.rms_norm
    plain = with_lora(tiny_llama())
    model = copy.deepcopy(plain)

    def wrong(*args: Any, impl: str | None = None, **options: Any) -> Any:
        y = rms_norm(*args, impl=impl, **options)
        return y if impl == "reference" else 1.01 * y  # the reference recognises norms

    monkeypatch.setattr(norm.ops, "rms_norm", wrong)
    report = lora_engine.accelerate(model)
    assert [entry.operation for entry in report.left] == ["everything"] and not report.replaced
    assert "model.layers.0" in report.left[0].detail
    monkeypatch.undo()
    assert_same(model, plain)


def test_trying_changes_no_generator_and_no_mode() -> None:
    model = with_lora(tiny_llama(), lora_dropout=0.5).train()
    model.get_base_model().model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    lora_engine.accelerate(model)
    assert torch.equal(torch.rand(3), expected)
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())


def test_a_model_that_takes_no_token_ids_keeps_its_attention_and_loss() -> None:
    config = t.ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
    )
    plain = t.ViTForImageClassification(config).eval()
    model = copy.deepcopy(plain)
    report = lora_engine.accelerate(model)
    assert "cannot be tried" in str(report)
    pixels = torch.randn(2, 3, 16, 16)
    assert torch.allclose(model(pixels).logits, plain(pixels).logits, atol=1e-5)


@pytest.mark.parametrize("argument", ["shift_labels", "ignore_index"])
def test_arguments_of_another_loss_reach_the_models_own(argument: str) -> None:
    plain = with_lora(tiny_llama())
    model = copy.deepcopy(plain)
    lora_engine.accelerate(model)
    given: dict[str, Any] = {"input_ids": IDS, "labels": IDS}
    given[argument] = IDS.roll(2, 1) if argument == "shift_labels" else 17
    ours, theirs = (each.train()(**given) for each in (model, plain))
    assert torch.allclose(ours.loss, theirs.loss, rtol=1e-5)
    assert ours.logits.shape == theirs.logits.shape


def test_attention_refuses_what_it_does_not_know() -> None:
    from lora_engine.models.attach.attention_function import attend

    q = torch.randn(1, 2, 4, 8)
    module = torch.nn.Module()
    with pytest.raises(UserError, match="s_aux"):
        attend(module, q, q, q, None, s_aux=torch.zeros(2))


def test_meta_models_are_not_tried() -> None:
    with torch.device("meta"):
        model = tiny_llama()
    assert proof.own_results(model).error == "its weights have no values yet"


def test_padding_in_a_model_whose_configuration_knows_no_cache() -> None:
    config = t.ModernBertConfig(**SIZES, cls_token_id=3, sep_token_id=4, local_attention=8)
    plain = t.ModernBertForMaskedLM(config)
    assert not hasattr(config, "use_cache")
    model = copy.deepcopy(plain)
    lora_engine.accelerate(model)
    assert_same(model, plain)


@pytest.mark.parametrize("parameters", [2**25, 1])
def test_gradients_beside_a_kink_are_compared_with_those_of_float64(
    parameters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding alone decides float32's own there. Of large models no float64 copy is made."""
    from lora_engine.models.attach import accelerate

    def beside_a_kink(model: Any) -> proof.Results:
        results = proof.own_results(model)
        name = next(name for name in results.gradients if "lora_B" in name)
        results.gradients[name] *= 1.05
        return results

    monkeypatch.setattr(accelerate, "own_results", beside_a_kink)
    monkeypatch.setattr(proof, "_MOST_EXACT", parameters)
    model = with_lora(tiny_llama(), init_lora_weights=False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    left = lora_engine.accelerate(model).left
    assert [entry.operation for entry in left] == ([] if parameters > 1 else ["everything"])
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
