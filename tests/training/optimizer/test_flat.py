from contextlib import contextmanager

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from training_helpers import rows, tiny_lora

from lora_engine import backends
from lora_engine.errors import UserError
from lora_engine.models.attach.accelerate import accelerate
from lora_engine.training.optimizer.flat import ALIGNMENT, FlatParameters


def named(*shapes, dtype=torch.float32):
    return [(f"p{i}", nn.Parameter(torch.randn(s).to(dtype))) for i, s in enumerate(shapes)]


shapes = st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), min_size=1, max_size=6)


@settings(deadline=None)
@given(shapes, st.sampled_from([torch.float32, torch.bfloat16]))
def test_values_survive_and_every_parameter_is_aligned(shapes, dtype):
    parameters = named(*shapes, dtype=dtype)
    before = [p.detach().clone() for _, p in parameters]
    flat = FlatParameters(parameters)
    assert flat.numel == sum(p.numel() for p in before)
    for (_, p), expected, entry in zip(parameters, before, flat.entries, strict=True):
        assert torch.equal(p, expected)
        assert torch.equal(entry.view(flat.data), expected.float())
        assert entry.offset * 4 % ALIGNMENT == 0
    flat.release()
    for (_, p), expected in zip(parameters, before, strict=True):
        assert torch.equal(p, expected)
        assert p.dtype == dtype


def test_float32_parameters_and_gradients_are_views():
    (_, a), (_, b) = parameters = named((3, 5), (7,))
    flat = FlatParameters(parameters)
    flat.data.fill_(2.0)
    assert a.unique().tolist() == b.unique().tolist() == [2.0]
    for _ in range(2):
        ((a * 3).sum() + (b * 5).sum()).backward()
    assert [e.view(flat.grad).unique().tolist() for e in flat.entries] == [[6.0], [10.0]]
    assert flat.grad.sum() == 15 * 6 + 7 * 10
    flat.zero_grad()
    assert not a.grad.any()


def test_zero_grad_takes_back_gradients_that_someone_else_dropped():
    ((_, a),) = parameters = named((4,))
    flat = FlatParameters(parameters)
    a.grad = None
    flat.zero_grad()
    a.sum().backward()
    assert flat.entries[0].view(flat.grad).tolist() == [1, 1, 1, 1]


def test_collected_gradients_add_up_in_few_launches(monkeypatch):
    """Small ones in one call; autograd adds large and tied ones, a hook those of 16 bits."""
    monkeypatch.setattr("lora_engine.training.optimizer.flat.MOST_COLLECTED", 20)
    tied = torch.ones(4, 2)
    parameters = [*named((3, 5), (7,), (5, 5), (2,)), ("half", nn.Parameter(torch.ones(6).half()))]
    parameters += [("tied", nn.Parameter(tied)), ("transpose", nn.Parameter(tied.t()))]
    flat, seen, calls = FlatParameters(parameters), [], []
    a, b, large, _, half, first, second = (p for _, p in parameters)
    add = torch._foreach_add_
    monkeypatch.setattr(torch, "_foreach_add_", lambda x, y: calls.append(len(x)) or add(x, y))
    a.register_hook(seen.append)
    for factor in (1, 10):
        with flat.collecting():
            total = sum((p * i).sum() for i, p in enumerate((a, b, large, half), 1))
            ((total + first.sum() + (second * 2).sum()) * factor).backward()
    sums = [entry.view(flat.grad).unique().tolist() for entry in flat.entries]
    assert sums == [[11.0], [22.0], [33.0], [0.0], [44.0], [33.0]]
    assert calls == [2, 2] and [grad.unique().tolist() for grad in seen] == [[1.0], [10.0]]
    for entry in flat.entries[:4]:
        assert entry.parameters[0].grad.data_ptr() == entry.view(flat.grad).data_ptr()


def gradients_of_two_passes(model, kwargs):
    """The flat gradients by name, and how many of them came through autograd in each pass."""
    flat, arrived = FlatParameters(model.named_parameters()), []
    for factor in (1.0, 0.37):
        with counted_arrivals(arrived), flat.collecting():
            (model(**kwargs).loss * factor).backward()
    return flat.named_copies(flat.grad), arrived


@contextmanager
def counted_arrivals(arrived):
    with pytest.MonkeyPatch.context() as patch:
        add, count = torch._foreach_add_, []
        patch.setattr(torch, "_foreach_add_", lambda x, y: count.append(len(x)) or add(x, y))
        yield
    arrived.append(sum(count))


def adapted(**kwargs):
    model = tiny_lora(init_lora_weights=False, **kwargs)
    accelerate(model.train())
    return model


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"dtype": torch.bfloat16}, {"use_dora": True}, {"rank": 3}],
    ids=["float32", "bfloat16", "dora", "rank 3"],
)
def test_products_add_gradients_with_the_bits_of_autograd(monkeypatch, kwargs):
    direct, arrived = gradients_of_two_passes(adapted(**kwargs), rows())
    apart = backends.factors_plan(torch.device("cpu"), torch.float32)._replace(adds=False)
    monkeypatch.setattr("lora_engine.backends.factors_plan", lambda device, dtype: apart)
    by_autograd, all_of_them = gradients_of_two_passes(adapted(**kwargs), rows())
    assert direct.keys() == by_autograd.keys()
    for name, expected in by_autograd.items():
        assert torch.equal(direct[name], expected) and expected.any(), name
    magnitudes = sum("magnitude" in name for name in direct)
    assert len(all_of_them) == 2 and arrived == [magnitudes] * 2


def test_hooks_of_an_adapter_are_called_and_frozen_factors_get_nothing():
    """The group of a factor with a hook goes through autograd, others are added by products."""
    model, seen = adapted(), []
    named = dict(model.named_parameters())
    hooked = next(p for name, p in named.items() if "q_proj.lora_A" in name)
    hooked.register_hook(seen.append)
    flat = FlatParameters(named.items())
    frozen = next(p for name, p in named.items() if "down_proj.lora_B" in name)
    frozen.requires_grad_(False)
    expected, _ = gradients_of_two_passes(adapted(), rows())
    arrived = []
    for factor in (1.0, 0.37):
        with counted_arrivals(arrived), flat.collecting():
            (model(**rows()).loss * factor).backward()
    # A and B of q, k and v of one layer.
    assert arrived == [6, 6] and len(seen) == 2
    for name, gradient in flat.named_copies(flat.grad).items():
        if named[name] is frozen:
            assert not gradient.any()
        else:
            assert torch.equal(gradient, expected[name]), name


def test_outside_of_a_pass_of_ours_autograd_has_all_gradients():
    """What others' loops and `torch.autograd.grad` are given is not added to the totals."""
    model = adapted()
    flat = FlatParameters(model.named_parameters())
    factors = [p for p in model.parameters() if p.requires_grad]
    with flat.collecting():
        model(**rows()).loss.backward()
    added = flat.grad.clone()
    parts = torch.autograd.grad(model(**rows()).loss, factors)
    assert torch.equal(flat.grad, added)
    for entry, part in zip(flat.entries, parts, strict=True):
        assert torch.equal(entry.view(added), part)
    model(**rows()).loss.backward()
    assert torch.equal(flat.grad, added * 2)


def test_a_pass_that_fails_leaves_the_gradients_views():
    ((_, a),) = parameters = named((4,))
    flat = FlatParameters(parameters)
    with pytest.raises(ZeroDivisionError), flat.collecting():
        a.sum().backward()
        raise ZeroDivisionError
    assert a.grad.data_ptr() == flat.grad.data_ptr() and not flat.grad.any()


def test_bfloat16_gradients_accumulate_in_float32():
    ((_, p),) = parameters = named((1,), dtype=torch.bfloat16)
    flat = FlatParameters(parameters)
    (p * 256).sum().backward()
    for _ in range(3):
        p.sum().backward()  # bfloat16 would round 256 + 1 back to 256
    assert flat.grad[0] == 259
    assert p.grad is None


def test_publish_rounds_masters_and_bumps_versions():
    parameters = [*named((4,), dtype=torch.bfloat16), ("f", nn.Parameter(torch.ones(3)))]
    flat = FlatParameters(parameters)
    versions = [p._version for _, p in parameters]
    flat.data.fill_(1 + 2**-12)
    flat.publish()
    low, full = (p for _, p in parameters)
    assert low.tolist() == [1.0] * 4
    assert flat.entries[0].view(flat.data).tolist() == [1 + 2**-12] * 4
    assert full.tolist() == [1 + 2**-12] * 3
    assert all(p._version > v for (_, p), v in zip(parameters, versions, strict=True))


def test_tied_parameters_are_counted_once_and_stay_tied():
    weight = torch.randn(4, 3)
    a, b = nn.Parameter(weight), nn.Parameter(weight)
    flat = FlatParameters([("a", a), ("b", b)])
    assert [e.name for e in flat.entries] == ["a"]
    (a.sum() + 2 * b.sum()).backward()
    assert flat.entries[0].view(flat.grad).unique().tolist() == [3.0]
    flat.data.zero_()
    flat.release()
    assert a.data_ptr() == b.data_ptr()
    assert not b.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_transpose_is_the_same_parameter(dtype):
    weight = torch.randn(4, 3).to(dtype)
    a, b = nn.Parameter(weight), nn.Parameter(weight.t())
    before, storage = a.detach().clone(), a.data_ptr()
    flat = FlatParameters([("a", a), ("b", b)])
    assert (flat.numel, [e.name for e in flat.entries]) == (12, ["a"])
    (a.sum() + (b * torch.arange(4)).sum()).backward()
    expected = (1 + torch.arange(4.0))[:, None].expand(4, 3)
    assert torch.equal(flat.entries[0].view(flat.grad), expected)
    flat.data -= flat.grad
    flat.publish()
    assert torch.equal(a, (before.float() - expected).to(dtype))
    assert torch.equal(a, b.t())
    flat.release()
    assert torch.equal(a, (before.float() - expected).to(dtype))
    assert a.data_ptr() == b.data_ptr() and torch.equal(a, b.t())
    assert (a.data_ptr() == storage) == (dtype == torch.bfloat16)


def test_first_of_a_tied_pair_may_be_the_transpose(tmp_path):
    weight = torch.randn(4, 3)
    flat = FlatParameters([("b", nn.Parameter(weight.t())), ("a", nn.Parameter(weight))])
    copies = flat.named_copies(flat.data)
    assert torch.equal(copies["b"], weight.t())
    save_file(copies, tmp_path / "w.safetensors")
    flat.data.zero_()
    flat.load_named(flat.data, load_file(tmp_path / "w.safetensors"))
    assert torch.equal(flat.entries[0].parameters[1], weight)


def test_a_parameter_given_twice_counts_once():
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    flat = FlatParameters([("a", p), ("b", p)])
    p.sum().backward()
    assert [e.parameters for e in flat.entries] == [(p,)]
    assert flat.entries[0].view(flat.grad).tolist() == [1, 1, 1]


def test_a_frozen_view_follows_the_trained_parameter():
    weight = torch.randn(3, 2)
    frozen, trained = nn.Parameter(weight, requires_grad=False), nn.Parameter(weight)
    flat = FlatParameters([("frozen", frozen), ("trained", trained)])
    assert [e.name for e in flat.entries] == ["trained"]
    flat.data.fill_(5.0)
    version = frozen._version
    flat.publish()
    flat.release()
    assert frozen.unique().tolist() == [5.0] and frozen.grad is None
    assert frozen.data_ptr() == trained.data_ptr() and frozen._version > version


WHOLE = torch.randn(6, 4)
OVERLAPPING = {
    "windows": (WHOLE[:4], WHOLE[2:]),
    "one inside the other": (WHOLE, WHOLE[1:3]),
    "a column of the whole": (WHOLE, WHOLE[:, 1]),
    "column windows": (WHOLE[:, :3], WHOLE[:, 2:]),
    "another type": (WHOLE, WHOLE.view(torch.bfloat16)),
}


@pytest.mark.parametrize("tensors", OVERLAPPING.values(), ids=OVERLAPPING)
@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True)], ids=str)
def test_partly_shared_memory_is_refused(tensors, trained):
    named = [(n, nn.Parameter(*given)) for n, *given in zip("ab", tensors, trained, strict=True)]
    with pytest.raises(UserError, match="a and b share a part of their memory"):
        FlatParameters(named)


def test_elements_that_share_memory_are_refused():
    with pytest.raises(UserError, match="a: its elements share memory with each other"):
        FlatParameters([("a", nn.Parameter(torch.ones(1, 4).expand(3, 4)))])
    with pytest.raises(UserError, match="a: its elements share memory with each other"):
        FlatParameters([("a", nn.Parameter(torch.ones(9).as_strided((3, 4), (2, 1))))])


def test_column_slices_are_parameters_of_their_own():
    weight = torch.randn(5, 4)
    parts = weight[:, :2].clone(), weight[:, 2:].clone()
    flat = FlatParameters([("a", nn.Parameter(weight[:, :2])), ("b", nn.Parameter(weight[:, 2:]))])
    for entry, part in zip(flat.entries, parts, strict=True):
        assert torch.equal(entry.parameters[0], part)
        assert entry.parameters[0].is_contiguous()


def test_neighbours_in_one_storage_are_fine():
    weight = torch.randn(6)
    parts = weight[:3].clone(), weight[3:].clone()
    flat = FlatParameters([("a", nn.Parameter(weight[:3])), ("b", nn.Parameter(weight[3:]))])
    for entry, part in zip(flat.entries, parts, strict=True):
        assert torch.equal(entry.parameters[0], part)


def test_nothing_to_train_is_a_clear_error():
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(UserError, match=r"no trainable parameters.*get_peft_model"):
        FlatParameters(frozen.named_parameters())


def test_named_copies_can_be_saved_and_loaded(tmp_path):
    flat = FlatParameters(named((3, 5), (7,), ()))
    expected = flat.data.clone()
    save_file(flat.named_copies(flat.data), tmp_path / "w.safetensors")
    flat.data.zero_()
    flat.load_named(flat.data, load_file(tmp_path / "w.safetensors"))
    assert torch.equal(flat.data, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("p0"), "p0 is missing"),
        (lambda t: t.update(other=torch.ones(1)), "other is not a parameter"),
        (lambda t: t.update(p1=torch.ones(8)), r"p1 has shape \[8\], not \[7\]"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_other_tensors_are_refused(change, message):
    flat = FlatParameters(named((3, 5), (7,)))
    tensors = flat.named_copies(flat.data)
    change(tensors)
    before = flat.data.clone()
    with pytest.raises(UserError, match=message):
        flat.load_named(flat.data, tensors)
    assert torch.equal(flat.data, before)


@pytest.mark.parametrize("released", [False, True], ids=["while flat", "released"])
def test_peft_saves_the_right_adapter(tmp_path, released):
    model = tiny_lora(init_lora_weights=False)
    expected = peft.get_peft_model_state_dict(model)
    expected = {name: tensor.clone() for name, tensor in expected.items()}
    flat = FlatParameters(model.named_parameters())
    if released:
        flat.release()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in expected)
