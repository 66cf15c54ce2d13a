"""A try before the run: right models pass, and all models stay as they were."""

import copy
import json
import random
from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
from test_adapters import BOTH, NAMES, PARTS, two_adapters
from torch import nn
from training_helpers import (
    accelerated,
    assert_same_bits,
    count_targets,
    layer,
    lines,
    make_dataset,
    make_examples,
    make_trainer,
    one_batch,
    oracle_loss_sum,
    rows,
    tiny_llama,
    tiny_lora,
    trainable,
)
from transformers import OlmoeConfig, OlmoeForCausalLM

from lora_engine import UserError, accelerate, preflight
from lora_engine.data.dataset import TokenizedDataset
from lora_engine.objectives.sft import SFT
from lora_engine.training.preflight.trial import trial

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


RIGHT = {
    "lora": lambda dtype: tiny_lora(dtype=dtype),
    "lora in the model's dtype": lambda dtype: tiny_lora(dtype=dtype, autocast_adapter_dtype=False),
    "dropout": lambda dtype: tiny_lora(0.3, dtype),
    "DoRA": lambda dtype: tiny_lora(dtype=dtype, use_dora=True),
    "rsLoRA": lambda dtype: tiny_lora(dtype=dtype, use_rslora=True),
    "full": tiny_llama,
}
RIGHT_IN_FLOAT32 = {
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
    "head in full": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [1, 2]},
    "embedding and tied head": {"ensure_weight_tying": True, "modules_to_save": ["embed_tokens"]},
}


SINGLE, BRAIN, HALF, DOUBLE = DTYPES
TRIED = [
    *(("lora", dtype, fast) for dtype in DTYPES for fast in (False, True)),
    *(("full", dtype, False) for dtype in DTYPES),
    ("full", SINGLE, True),
    ("lora in the model's dtype", BRAIN, True),
    ("lora in the model's dtype", HALF, False),
    ("dropout", SINGLE, False),
    ("dropout", BRAIN, True),
    ("DoRA", SINGLE, False),
    ("DoRA", BRAIN, True),
    ("rsLoRA", SINGLE, True),
]


@pytest.mark.parametrize(("case", "dtype", "fast"), TRIED)
@pytest.mark.filterwarnings("ignore:.*float16:UserWarning")
def test_right_models_pass(case, dtype, fast):
    model = RIGHT[case](dtype)
    if fast:
        accelerate(model)
    for batch in (rows(), one_batch(make_examples(6))):
        report = preflight(model, batch)
        assert 0.9 * report.loss_before < report.loss_after < 0.99 * report.loss_before
        assert (report.parameters, report.unreached) == (len(trainable(model)), 0)
        assert all(norm > 0 for norm in report.gradient_norms.values())


@pytest.mark.parametrize(
    ("case", "fast"),
    [("PiSSA", False), ("tokens", False), *((case, True) for case in list(RIGHT_IN_FLOAT32)[1:])],
)
def test_right_adapters_of_other_kinds_pass(case, fast):
    model = tiny_lora(**RIGHT_IN_FLOAT32[case])
    if fast:
        accelerate(model)
    report = preflight(model, rows())
    assert report.loss_after < 0.99 * report.loss_before
    assert report.unreached == 0


def test_what_it_measures_is_right():
    model = tiny_lora()
    batch, examples = rows(), make_examples(6)
    loss = model(**batch).loss
    loss.backward()
    of_b = torch.cat([p.grad.flatten() for n, p in model.named_parameters() if "lora_B" in n])
    report = preflight(model, batch)
    assert report.loss_before == pytest.approx(loss.item(), rel=1e-6)
    assert set(report.gradient_norms) == {"lora_A", "lora_B"}
    assert report.gradient_norms["lora_B"] == pytest.approx(of_b.norm().item(), rel=1e-5)
    assert report.parameters == 28
    assert 0 < report.seconds < 60
    packed = preflight(model, one_batch(examples))
    mean = oracle_loss_sum(model, examples) / count_targets(examples)
    assert packed.loss_before == pytest.approx(mean.item(), rel=1e-5)
    assert str(packed).startswith(f"loss {packed.loss_before:.4g} falls to {packed.loss_after:.4g}")
    assert "reach 28 of 28 trained tensors" in str(packed)


class Norm(nn.BatchNorm1d):
    """Changes its buffers, and itself, in every pass."""

    calls = 0

    def __init__(self, size):
        super().__init__(size)
        self.register_buffer("counts", torch.zeros(3, dtype=torch.long))

    def forward(self, x):
        self.calls += 1
        self.counts += 1
        return super().forward(x.flatten(0, 1)).view_as(x)


def restless_model():
    """With dropout, gradients, changing buffers, some parts in training and some not."""
    model = tiny_lora(dropout=0.2)
    layer(model).post_attention_layernorm = Norm(32).requires_grad_(False)
    model.eval()
    layer(model).mlp.train()
    for parameter in model.parameters():
        parameter.grad = torch.rand_like(parameter) if parameter.requires_grad else None
    return model


def everything(model):
    """Values, gradients, modes, attributes and generators."""
    state = {name: x.clone() for name, x in model.state_dict().items()}
    state |= {
        f"grad {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }
    state["modes"] = torch.tensor([module.training for module in model.modules()])
    state["calls"] = torch.tensor(getattr(layer(model).post_attention_layernorm, "calls", 0))
    state["torch"] = torch.get_rng_state()
    state["numpy"] = torch.from_numpy(np.random.get_state()[1].astype(np.int64))  # noqa: NPY002
    state["python"] = torch.tensor(random.getstate()[1])
    return state


def stop_in_pass(model, number, error):
    """Raises `error` in the middle of one of the forward passes."""
    left = [number]

    def hook(*args):
        left[0] -= 1
        if left[0] == 0:
            raise error

    layer(model).register_forward_pre_hook(hook)


@pytest.mark.parametrize(
    ("end", "fast"),
    [
        ("passes", False),
        ("passes", True),
        ("fails", True),
        ("fails late", False),
        ("interrupted", False),
        ("interrupted late", True),
    ],
)
def test_the_model_is_left_as_it_was(end, fast):
    model = restless_model()
    if fast:
        accelerate(model)
    batch = rows()
    if end == "fails":
        layer(model).mlp.register_forward_hook(lambda module, args, output: output.detach())
    elif end == "fails late":
        layer(model).mlp.up_proj.lora_A["default"].weight.register_hook(torch.neg)
    elif end != "passes":
        stop_in_pass(model, 1 if end == "interrupted" else 7, KeyboardInterrupt())
    before, gradients = everything(model), [p.grad for p in model.parameters()]
    tensors = {key: value.clone() for key, value in batch.items()}
    error = {"passes": None, "fails": UserError, "fails late": UserError}.get(
        end, KeyboardInterrupt
    )
    if error is None:
        assert preflight(model, batch).loss_after > 0
    else:
        with pytest.raises(error):
            preflight(model, batch)
    assert_same_bits(everything(model), before)
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    assert_same_bits(batch, tensors)


def test_an_interrupt_while_all_is_put_back(monkeypatch):
    model = restless_model()
    before = everything(model)
    with pytest.raises(KeyboardInterrupt), trial(model, rows(), SFT()) as tried:
        tried.shake(list(tried.trained))
        put = tried._put

        def interrupted(values):
            monkeypatch.setattr(tried, "_put", put)
            next(iter(tried.trained.values())).zero_()
            raise KeyboardInterrupt

        monkeypatch.setattr(tried, "_put", interrupted)
    assert_same_bits(everything(model), before)


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "accelerated"])
def test_dropout_draws_the_same_in_every_pass(fast):
    model = two_adapters(["default"]) if fast else tiny_lora()
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.lora_dropout["default"] = nn.Dropout(0.5)
            nn.init.normal_(module.lora_B["default"].weight)
    with trial(model, rows(), SFT()) as tried:
        first = tried.loss()
        assert tried.loss() == first
    torch.manual_seed(1)  # other draws give another loss
    assert model.train()(**rows()).loss.item() != first


def test_optimisers_in_the_backward_pass_do_not_step():
    model, stepped = tiny_lora(), []
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(stepped.append)
    preflight(model, rows())
    assert not stepped
    model(**rows()).loss.backward()
    assert len(stepped) == 28


@pytest.fixture(scope="module", params=["learned", "at its lowest"])
def learned(request):
    """A model, trained until its loss is near zero, or as low as contradictory examples let it."""
    model, batch = tiny_llama(), rows(4, 6)
    batch["attention_mask"][:] = 1
    batch["labels"] = batch["input_ids"].clone()
    if request.param == "at its lowest":
        batch["input_ids"][:] = batch["input_ids"][0].clone()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(250):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return request.param, model, batch


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_what_is_learned_already_passes(learned, dtype):
    kind, model, batch = learned
    report = preflight(copy.deepcopy(model).to(dtype), batch)
    assert report.loss_after <= report.loss_before
    assert (report.loss_before < 0.01) == (kind == "learned")


def preference(model, batch):
    """−log σ(chosen − rejected), each the log-probability of its rows' tokens."""
    logits = model(**batch).logits[:, :-1].log_softmax(-1)
    taken = logits.gather(-1, batch["input_ids"][:, 1:, None]).sum((1, 2))
    chosen, rejected = taken.chunk(2)
    return -nn.functional.logsigmoid(0.1 * (chosen - rejected))


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "accelerated"])
def test_a_loss_of_the_users_own(fast):
    model = accelerated(tiny_lora()) if fast else tiny_lora()
    batch = {key: value for key, value in rows(4).items() if key != "labels"}
    report = preflight(model, batch, loss=preference)
    expected = preference(model, batch).mean().item()
    assert report.loss_before == pytest.approx(expected, rel=1e-5)
    assert report.loss_after < 0.99 * report.loss_before
    layer(model).mlp.up_proj.lora_B["default"].weight.register_hook(torch.neg)
    with pytest.raises(UserError, match=r"up_proj\.lora_B\.default\.weight is wrong"):
        preflight(model, batch, loss=preference)
    with pytest.raises(UserError, match="the loss function returned"):
        preflight(model, batch, loss=lambda model, batch: 1.0)


def test_a_loss_that_is_zero_where_it_begins_falls():
    """As GRPO's, whose advantages sum to zero."""
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])[:, None]
    batch = {key: value for key, value in rows(4).items() if key != "labels"}

    def taken(model, batch):
        logits = model(**batch).logits[:, :-1].log_softmax(-1)
        return logits.gather(-1, batch["input_ids"][:, 1:, None])[..., 0]

    def loss(model, batch):
        return -(taken(model, batch) - old).exp() * advantages

    model = tiny_lora()
    old = taken(model, batch).detach()
    report = preflight(model, batch, loss=loss)
    assert report.loss_after < -5e-5 < report.loss_before < 1e-6
    layer(model).mlp.up_proj.lora_B["default"].weight.register_hook(torch.neg)
    with pytest.raises(UserError, match=r"up_proj\.lora_B\.default\.weight is wrong"):
        preflight(model, batch, loss=loss)


@pytest.mark.parametrize(
    ("dtype", "seed"), [(SINGLE, 0), (SINGLE, 1), (SINGLE, 2), (BRAIN, 0), (BRAIN, 3)]
)
def test_routed_experts_pass(dtype, seed):
    """Which experts a token is routed to jumps, and the loss with it, where routers move."""
    sizes = {"hidden_size": 32, "intermediate_size": 16, "moe_intermediate_size": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    config = OlmoeConfig(vocab_size=61, num_experts=8, num_experts_per_tok=2, **sizes, **heads)
    torch.manual_seed(seed)
    preflight(OlmoeForCausalLM(config).to(dtype), rows(3, 16))


def test_a_loss_of_zero_passes():
    model, batch = tiny_llama(), rows(1, 4)
    with torch.no_grad():
        model.model.norm.weight.mul_(1e4)
    batch["attention_mask"][:] = 1
    with torch.no_grad():
        following = model(batch["input_ids"]).logits[0, 0].argmax()
    batch["labels"] = torch.tensor([[-100, following, -100, -100]])
    report = preflight(model, batch)
    assert report.loss_before == report.loss_after == 0
    assert "learned already" in str(report)


def test_gradients_of_rounding_alone_pass():
    """Where there is one key, q and k change nothing, and their gradients are zero but for that."""
    config = peft.LoraConfig(target_modules=["q_proj", "k_proj"])
    model = peft.get_peft_model(tiny_llama(), config)

    def rounds(module, args, output):  # some machines' products are exact here
        output.register_hook(lambda gradient: gradient + 1e-9 * torch.randn_like(gradient))

    for module in model.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            module.register_forward_hook(rounds)
    report = preflight(model, rows(1, 2) | one_key())
    assert report.loss_after == report.loss_before


def one_key():
    return {"attention_mask": torch.ones(1, 2, dtype=torch.long), "labels": torch.tensor([[3, 5]])}


def test_autocast_does_not_keep_the_weights_of_an_earlier_pass():
    model = tiny_lora(dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        report = preflight(model, rows())
    assert report.loss_after < 0.99 * report.loss_before


def test_layers_that_the_batch_does_not_reach_pass():
    model = tiny_llama()
    model.spare = nn.ModuleDict({"self_attn": nn.Linear(32, 32)})
    config = peft.LoraConfig(target_modules=["q_proj", "spare.self_attn"])
    report = preflight(peft.get_peft_model(model, config), rows())
    assert (report.parameters, report.unreached) == (6, 2)
    assert "reach 4 of 6 trained tensors" in str(report)


def test_tokens_that_the_batch_does_not_hold_pass():
    model = tiny_llama()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    config = peft.TrainableTokensConfig(token_indices=[5], target_modules=["embed_tokens"])
    batch = rows()
    batch["input_ids"][batch["input_ids"] == 5] = 6
    model = peft.get_peft_model(model, config)
    report = preflight(model, batch)
    assert (report.parameters, report.unreached) == (1, 1)
    assert "reaches nothing that is trained" in str(report)
    batch["input_ids"][:, -2] = 5
    assert preflight(model, batch).unreached == 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_models_pass(reentrant):
    model = tiny_lora()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert preflight(model, rows()).unreached == 0


def test_records_of_one_adapter_leave_the_other_be():
    model = two_adapters()
    report = preflight(model, one_batch(PARTS["other"]))
    assert (report.parameters, report.unreached) == (56, 28)
    assert report.gradient_norms["other.lora_A"] > 0 == report.gradient_norms["default.lora_A"]
    report = preflight(model, one_batch(BOTH.examples))
    assert report.unreached == 0
    assert set(report.gradient_norms) == {f"{n}.{f}" for n in NAMES for f in ("lora_A", "lora_B")}


def test_a_frozen_view_of_what_is_trained_may_follow_it():
    model = tiny_llama()
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.data, requires_grad=False)
    report = preflight(model, rows())
    assert report.unreached == 0


def fitted(folder, model, **config):
    make_trainer(folder, model, **config).fit()
    measured = [{k: v for k, v in x.items() if k != "tokens_per_second"} for x in lines(folder)]
    for line in measured:
        line.pop("peak_memory_bytes", None)
    return measured, trainable(model)


def test_a_run_is_the_same_with_and_without(tmp_path):
    results = []
    for number, wanted in enumerate((True, False)):
        model = tiny_lora(dropout=0.2)
        folder = tmp_path / str(number)
        results.append(fitted(folder, accelerated(model), preflight=wanted))
    (measured, weights), (measured_without, weights_without) = results
    assert measured == measured_without
    assert_same_bits(weights, weights_without)


def test_a_run_that_fails_leaves_the_one_before(tmp_path):
    make_trainer(tmp_path).fit()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    model = tiny_lora()
    layer(model).mlp.register_forward_hook(lambda module, args, output: output.detach())
    with pytest.raises(UserError, match="gets no gradient"):
        make_trainer(tmp_path, model, overwrite=True).fit()
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_it_runs_before_each_sitting_with_steps_left(tmp_path, monkeypatch):
    tried = []

    def noted(model, batch, **options):
        tried.append(batch)
        return preflight(model, batch, **options)

    monkeypatch.setattr("lora_engine.training.trainer.preflight", noted)
    make_trainer(tmp_path, max_steps=2).fit()
    make_trainer(tmp_path, max_steps=4, schedule="cosine").fit(resume=True)
    make_trainer(tmp_path, max_steps=4).fit(resume=True)  # all is done
    make_trainer(tmp_path, max_steps=6, preflight=False).fit(resume=True)
    assert len(tried) == 2
    assert [batch.origins for batch in tried] == [tried[0].origins] * 2


def test_a_run_that_goes_on_tries_the_weights_of_its_checkpoint(tmp_path, monkeypatch):
    seen = []

    def noted(model, batch, **options):
        seen.append((trainable(model), preflight(model, batch, **options)))

    first = make_trainer(tmp_path, max_steps=4)
    first.fit()
    reached = trainable(first.model)
    monkeypatch.setattr("lora_engine.training.trainer.preflight", noted)
    model = tiny_lora()
    before = trainable(model)
    trainer = make_trainer(tmp_path, model, max_steps=6)
    trainer.preflight(trainer.check_folder(resume=True))
    [(tried, report)] = seen
    assert_same_bits(tried, reached)
    assert report.loss_before < 0.98 * preflight(model, trainer._train_source.first(64)).loss_before
    assert_same_bits(trainable(model), before)


def test_batches_without_targets_are_passed_over(tmp_path):
    idle = [replace(e, supervised=[False] * len(e)) for e in make_examples(30)]
    data = TokenizedDataset([*idle, *make_examples(2)])
    make_trainer(tmp_path / "some", train=data, tokens_per_batch=14, max_steps=1).fit()
    trainer = make_trainer(tmp_path / "none", train=TokenizedDataset(idle), max_steps=1)
    with pytest.raises(UserError, match="no token of the batch is supervised"):
        trainer.fit()


def test_its_report_is_made_of_plain_numbers():
    from dataclasses import asdict

    report = asdict(preflight(tiny_lora(), one_batch(make_dataset(4).examples)))
    assert json.loads(json.dumps(report, allow_nan=False)) == report
