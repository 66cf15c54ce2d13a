import itertools
from collections.abc import Callable

import pytest
import torch
from transformers import masking_utils as theirs

from lora_engine.errors import UserError
from lora_engine.models.attach import attention_function
from lora_engine.models.attach.attention_function import attend, padding_mask, proving
from lora_engine.models.attach.masks import causal_mask, dense_mask

PACKED = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
LEFT = torch.zeros(1, dtype=torch.int64)


def packed(function: Callable[..., object]) -> Callable[..., object]:
    """As transformers does for sequences in one row: releases differ in whether they remap."""
    remap = getattr(theirs, "remap_positions_for_packed_sequence", None)
    inner = remap(function, POSITIONS) if remap else function
    return theirs.and_masks(theirs.packed_sequence_mask_function(PACKED), inner)


KNOWN = {
    "causal": theirs.causal_mask_function,
    "window": theirs.sliding_window_causal_mask_function(3),
    "packed": packed(theirs.causal_mask_function),
    "packed window": packed(theirs.sliding_window_causal_mask_function(3)),
}
OTHERS = {
    "both ways": theirs.bidirectional_mask_function,
    "window both ways": theirs.sliding_window_bidirectional_mask_function(3),
    "chunks": theirs.chunked_causal_mask_function(3, LEFT),
    "blocks": theirs.or_masks(theirs.causal_mask_function, theirs.blockwise_overlay(PACKED)),
    "a user's": lambda b, h, q, k: k <= q,
    "window alone": theirs.sliding_window_overlay(3),
    "with a user's": theirs.and_masks(theirs.causal_mask_function, lambda b, h, q, k: k > 1),
}


@pytest.mark.parametrize("name", KNOWN)
def test_causal_masks_are_known(name: str) -> None:
    assert causal_mask(KNOWN[name]) is not None


def test_windows_and_packed_sequences_are_read() -> None:
    assert causal_mask(KNOWN["causal"]) == (0, None)
    assert causal_mask(KNOWN["window"]) == (3, None)
    found = causal_mask(KNOWN["packed window"])
    assert found is not None and found.window == 3 and found.sequences is PACKED


def test_the_mask_of_packed_rows_numbers_their_sequences() -> None:
    mask = padding_mask(1, 7, 7, mask_function=KNOWN["packed"])
    assert mask is not None and mask.tolist() == [[1, 1, 1, 2, 2, 2, 2]]
    padding = torch.tensor([[True, True, True, True, True, True, False]])
    mask = padding_mask(1, 7, 7, mask_function=KNOWN["packed"], attention_mask=padding)
    assert mask is not None and mask.tolist() == [[1, 1, 1, 2, 2, 2, 0]]
    assert padding_mask(1, 7, 7, mask_function=KNOWN["window"]) is None


@pytest.mark.parametrize("dropout", [0.0, 1e-9])
def test_tokens_of_a_row_attend_to_those_of_their_number(dropout: float) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 8, 8)
    mask = torch.tensor([[0, 1, 1, 0, 1, 2, 2, 0]])
    out, _ = attend(torch.nn.Module(), q, k, v, mask, dropout=dropout)
    for places in ([1, 2, 4], [5, 6]):
        parts = (x[:, :, places] for x in (q, k, v))
        alone = torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=True)
        assert torch.allclose(out[:, places], alone.transpose(1, 2), atol=1e-5)


@pytest.mark.parametrize("name", OTHERS)
def test_other_masks_are_not(name: str) -> None:
    assert causal_mask(OTHERS[name]) is None


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("index", [None, [0, 1, 2, 3, 6, 7, 8, 9]])
def test_the_dense_mask_is_that_of_the_sequences(
    causal: bool, window: int, index: list[int] | None
) -> None:
    bounds = torch.tensor([0, 2, 4, 8] if index else [0, 5, 7, 10], dtype=torch.int32)
    places = None if index is None else torch.tensor(index)
    mask = dense_mask(bounds, places, 2, 5, causal=causal, window=window)
    assert mask.shape == (2, 1, 5, 5)
    owner = {}
    for s, (begin, end) in enumerate(itertools.pairwise(bounds.tolist())):
        for token in range(begin, end):
            owner[index[token] if index else token] = s
    for b, q, k in itertools.product(range(2), range(5), range(5)):
        at, to = owner.get(5 * b + q), owner.get(5 * b + k)
        allowed = at is not None and at == to
        allowed &= (not causal or k <= q) and (not window or q - k < window)
        assert bool(mask[b, 0, q, k]) is (allowed or (at is None and q == k)), (b, q, k)


@pytest.mark.parametrize("padded", [False, True])
def test_attention_with_dropout_is_causal_and_skips_padding(padded: bool) -> None:
    """Of all that a query may see, dropping nearly nothing leaves what attention gives without."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 6, 8)
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[1, :2] = 0
    given = mask if padded else None
    module = torch.nn.Module()
    expected, _ = attend(module, q, k, v, given)
    actual, _ = attend(module, q, k, v, given, dropout=1e-9)
    kept = mask.bool() if padded else torch.ones(2, 6, dtype=torch.bool)
    assert torch.allclose(actual[kept], expected[kept], atol=1e-5)


def test_attention_that_is_not_causal_is_one_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    """No mask [Q, K] is made; with a window, which sees no token ahead, one is.

    Beside a mask of padding tokens are causal all the same: it stands for a causal one.
    """
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 6, 8)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    module = torch.nn.Module()
    with monkeypatch.context() as patched:
        patched.setattr(attention_function, "sdpa", lambda *_, **__: pytest.fail("sdpa runs"))
        actual, _ = attend(module, q, k, v, None, is_causal=False)
    assert torch.allclose(actual, expected.transpose(1, 2), atol=1e-5)
    near, _ = attend(module, q, k, v, None, is_causal=False, sliding_window=2)
    assert not torch.allclose(near, actual, atol=1e-3)
    padding = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    kept = padding.bool()
    masked, _ = attend(module, q, k, v, padding, is_causal=False)
    causal, _ = attend(module, q, k, v, padding)
    assert torch.equal(masked[kept], causal[kept])


def test_within_a_proof_a_layer_has_the_window_of_its_mask() -> None:
    q = torch.randn(1, 2, 7, 8)
    module = torch.nn.Module()
    with proving():
        mask = padding_mask(1, 7, 7, mask_function=KNOWN["window"])
        attend(module, q, q, q, mask, sliding_window=3)
        for window in (None, 4, 400):
            with pytest.raises(UserError, match="window"):
                attend(module, q, q, q, mask, sliding_window=window)
        with pytest.raises(UserError, match="window"):
            attend(module, q, q, q, None, sliding_window=400)
    attend(module, q, q, q, None, sliding_window=400)


def test_values_of_another_width() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 2, 5, 8)
    v = torch.randn(1, 2, 5, 6)
    out, _ = attend(torch.nn.Module(), q, k, v, None)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(out, expected.transpose(1, 2), atol=1e-5)


def test_a_mask_of_more_tokens_than_the_batch_has_is_cut() -> None:
    longer = torch.tensor([[True, True, True, False, False, False]])
    mask = padding_mask(1, 4, 4, mask_function=KNOWN["causal"], attention_mask=longer)
    assert mask is not None and mask.shape == (1, 1, 4, 4)
    assert mask[0, 0, -1].tolist() == [True, True, True, False]
