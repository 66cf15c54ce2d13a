"""Examples that the model cannot take: their token ids have no embedding."""

from torch import Tensor, nn

from lora_engine.data.dataset import TokenizedDataset
from lora_engine.data.listing import raise_listed
from lora_engine.data.template import Tokenizer
from lora_engine.errors import UserError
from lora_engine.models.families.modules import CausalLm


def check_vocabulary(
    dataset: TokenizedDataset, model: CausalLm, tokenizer: Tokenizer | None
) -> None:
    """Raises UserError, with their places, for examples with ids that `model` has no row for.

    This happens where a token was added to the tokenizer and the embedding was not resized.
    Examples tokenised elsewhere may also be empty, or have a mask of another length.
    """
    check_rows(dataset, vocabulary_rows(model), tokenizer)


def check_rows(dataset: TokenizedDataset, rows: int | None, tokenizer: Tokenizer | None) -> None:
    """`check_vocabulary` for a model with `rows` embeddings; None: that is not known."""
    if rows is None:
        return
    problems: list[tuple[str, str]] = []
    for example in dataset.sequences():
        ids = example.input_ids
        if not ids or len(ids) != len(example.supervised):
            counts = f"{len(ids)} tokens and {len(example.supervised)} marks of what is learned"
            problems.append((example.origin, f"has {counts}"))
        elif max(ids) >= rows or min(ids) < 0:
            token = next(token for token in ids if not 0 <= token < rows)
            problems.append((example.origin, _problem(token, rows, tokenizer)))
    raise_listed(dataset.name, problems, dataset.num_records)


def check_same_vocabulary(theirs: Tokenizer, ours: Tokenizer, where: str) -> None:
    """Raises UserError "where: …" unless `theirs` has every token of `ours` under the same id."""
    known = theirs.get_vocab()
    for token, number in sorted(ours.get_vocab().items(), key=lambda item: item[1]):
        if known.get(token) != number:
            raise UserError(
                f"{where}: has another vocabulary than the model that is trained, whose token "
                f"{number} is {token!r}; give a model of the same tokenizer"
            )


def vocabulary_rows(model: CausalLm) -> int | None:
    """Tokens that `model` can both read and predict; None if it does not say."""
    sizes = (_rows(model.get_input_embeddings()), _rows(model.get_output_embeddings()))
    known = [size for size in sizes if size]
    return min(known) if known else None


def _rows(layer: nn.Module | None) -> int | None:
    weight: Tensor | None = getattr(layer, "weight", None)
    return weight.shape[0] if getattr(weight, "ndim", 0) == 2 and weight is not None else None


def _problem(token: int, rows: int, tokenizer: Tokenizer | None) -> str:
    name = ""
    if tokenizer is not None and 0 <= token < len(tokenizer):
        (spelling,) = tokenizer.convert_ids_to_tokens([token])
        name = f" ({spelling!r})"
    if token < 0:
        return f"token {token} is no token id"
    return (
        f"token {token}{name} is beyond the model's vocabulary of {rows:,} rows; add rows with "
        "model.resize_token_embeddings(len(tokenizer)), or take the token out of the tokenizer"
    )
