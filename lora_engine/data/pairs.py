"""Preference and unpaired records as examples: answers to one prompt, cut so that they stay whole.

Of a preference record the example is the chosen answer, with the rejected one beside it: whatever
batch has one has both, and computes the prompt once where it may. An unpaired record's example has
the answer to another prompt beside it, put behind its own prompt, of which an objective measures
how far the model has moved (arXiv:2402.01306, 4.1).
"""

from collections.abc import Sequence
from dataclasses import replace

from lora_engine.data.batch import MISMATCHED
from lora_engine.data.encode import Encoder
from lora_engine.data.formats.hints import answer_in
from lora_engine.data.preferences import Said
from lora_engine.data.records import NAMED, Record
from lora_engine.data.render import EXAMPLE_WEIGHT, WEIGHT, Example, LossOn, part, tokenize
from lora_engine.data.template import Tokenizer
from lora_engine.errors import UserError

CHOSEN, REJECTED = "chosen", "rejected"
DESIRABLE, UNDESIRABLE = "desirable", "undesirable"
# The role of an example without an answer, which the model is to write.
PROMPT = "prompt"
ROLES = {"pairs": (CHOSEN, REJECTED), "labelled": (DESIRABLE, UNDESIRABLE)}

IDENTICAL = "nothing to compare: chosen and rejected are the same"
NO_TARGET = "nothing to compare: an answer has no tokens"


def example_of(
    record: Record,
    tokenizer: Tokenizer,
    *,
    max_length: int | None = None,
    loss_on: LossOn = "assistant",
    encoder: Encoder | None = None,
    train_on_reasoning: bool = True,
    train_on_tool_calls: bool = True,
) -> Example:
    """`tokenize` for a record of any kind that has answers. Raises UserError for one without."""
    encoder = encoder or Encoder(tokenizer)
    match record.kind:
        case "preference":
            return tokenize_pair(record, tokenizer, max_length=max_length, encoder=encoder)
        case "unpaired":
            return tokenize_judged(record, tokenizer, max_length=max_length, encoder=encoder)
        case "prompt":
            answer = answer_in(record.columns)
            fields = ", ".join(map(repr, list(record.columns)[:NAMED])) or "nothing else"
            hint = f"if that is {answer!r}, say data.columns: {{user: prompt, assistant: {answer}}}"
            raise UserError(
                f"{record.origin}: has a 'prompt' but no answer to learn from; "
                + (hint if answer else "give 'completion', or 'chosen' and 'rejected', beside it")
                + f" (it has {fields})"
            )
    return tokenize(
        record,
        tokenizer,
        max_length=max_length,
        loss_on=loss_on,
        encoder=encoder,
        train_on_reasoning=train_on_reasoning,
        train_on_tool_calls=train_on_tool_calls,
    )


def tokenize_pair(
    record: Record,
    tokenizer: Tokenizer,
    *,
    max_length: int | None = None,
    encoder: Encoder | None = None,
) -> Example:
    """The chosen answer of a preference record, the rejected one among its `others`.

    max_length: of each sequence; the prompt loses its beginning, the same in both, and only an
    answer that is longer by itself its end. Raises UserError as `tokenize` does.
    """
    encoder = encoder or Encoder(tokenizer)
    chosen, rejected = cut_prompts(
        [
            replace(_answered(record, answer, tokenizer, encoder), role=role)
            for answer, role in ((record.chosen, CHOSEN), (record.rejected, REJECTED))
        ],
        max_length,
    )
    columns = dict(chosen.columns)
    if "margin" in record.columns:
        columns["margin"] = float(str(record.columns["margin"]))
    return replace(chosen, others=(rejected,), columns=columns)


def tokenize_judged(
    record: Record,
    tokenizer: Tokenizer,
    *,
    max_length: int | None = None,
    encoder: Encoder | None = None,
) -> Example:
    """The answer of an unpaired record, cut as those of a pair are; without `others` yet."""
    encoder = encoder or Encoder(tokenizer)
    example = _answered(record, record.completion, tokenizer, encoder)
    role = DESIRABLE if record.label else UNDESIRABLE
    return cut_prompts([replace(example, role=role)], max_length)[0]


def with_mismatched(examples: Sequence[Example], max_length: int | None = None) -> list[Example]:
    """Each judged example with the answer of the one before it, the last one's for the first.

    Other examples stay as they are where any is not judged.
    """
    if not examples or any(example.role not in ROLES["labelled"] for example in examples):
        return list(examples)
    matched = []
    for place, example in enumerate(examples):
        answered = examples[place - 1]
        before, asked = prompt_length(answered), prompt_length(example)
        other = replace(
            example,
            input_ids=[*example.input_ids[:asked], *answered.input_ids[before:]],
            supervised=[*example.supervised[:asked], *answered.supervised[before:]],
            role=MISMATCHED,
            notes=(),
            columns={k: x for k, x in answered.columns.items() if isinstance(x, Sequence)},
        )
        matched.append(replace(example, others=(cut_prompts([other], max_length)[0],)))
    return matched


def prompt_length(example: Example) -> int:
    """Tokens before the first that is learned from; all of them if there is none."""
    supervised = list(example.supervised)
    return supervised.index(True) if True in supervised else len(supervised)


def cut_prompts(examples: Sequence[Example], max_length: int | None) -> list[Example]:
    """Examples of one prompt, none longer than `max_length`: the prompts lose their beginning, all
    as much, down to one token; then the answers their end."""
    if max_length is None or max(map(len, examples)) <= max_length:
        return list(examples)
    asked = max(map(prompt_length, examples))
    surplus = min(max(map(len, examples)) - max_length, max(asked - 1, 0))
    cut = []
    for example in examples:
        begin = min(surplus, max(prompt_length(example) - 1, 0))
        kept = range(begin, min(begin + max_length, len(example)))
        cut.append(replace(part(example, kept), truncated=True))
    return cut


def check_answers(example: Example) -> str | None:
    """Why nothing is learned from a pair or a judged answer, or None."""
    sequences = [each for each in example.sequences if each.role != MISMATCHED]
    if any(sequence.num_targets == 0 for sequence in sequences):
        return NO_TARGET
    if len(sequences) == 2 and list(sequences[0].input_ids) == list(sequences[1].input_ids):
        return IDENTICAL
    return None


def check_roles(examples: Sequence[Example], kind: str, objective: str, name: str) -> None:
    """UserError unless every example is of the kind that the objective learns from.

    kind: "plain", "pairs", "labelled" or "prompts". name: what the data is called in the message.
    """
    first = {"pairs": (CHOSEN,), "labelled": ROLES["labelled"], "prompts": (PROMPT,)}
    wrong = [example for example in examples if example.role not in first.get(kind, ("",))]
    if wrong:
        raise UserError(
            f"{name}: objective {objective} learns from records of {_FIELDS[kind]}, and "
            f"{len(wrong):,} of {len(examples):,} are not ({wrong[0].origin}); give such records, "
            "or another objective"
        )


_FIELDS = {
    "plain": "'messages', 'prompt' and 'completion', or 'text'",
    "pairs": "'chosen' and 'rejected'",
    "labelled": "'prompt', 'completion' and 'label'",
    "prompts": "'prompt' alone",
}


def check_labels(examples: Sequence[Example], name: str) -> None:
    """UserError where every judged example has the same label: nothing tells good from bad."""
    roles = {example.role for example in examples}
    if len(roles) == 1 and (role := roles.pop()) in ROLES["labelled"]:
        label = str(role == DESIRABLE).lower()
        raise UserError(
            f"{name}: every label is {label}, so that nothing tells wanted answers from unwanted "
            f"ones; add records with label {str(role != DESIRABLE).lower()}"
        )


def _answered(record: Record, answer: Said, tokenizer: Tokenizer, encoder: Encoder) -> Example:
    """The record's prompt with an answer, the tokens of the answer alone being learned from.

    The weight of the record is the example's. Raises UserError for messages of several weights.
    """
    prompt = record.prompt
    if isinstance(prompt, str):
        whole = replace(record, kind="completion", completion=answer)
        example = tokenize(whole, tokenizer, encoder=encoder)
    else:
        assert not isinstance(answer, str)
        whole = replace(record, kind="messages", messages=(*prompt, *answer))
        example = tokenize(whole, tokenizer, encoder=encoder, asked=len(prompt))
    if isinstance(example.columns.get(WEIGHT), Sequence):
        raise UserError(
            f"{record.origin}: a message of a compared or judged answer weighs 0 or 1; give the "
            "record the 'weight'"
        )
    columns = {name: value for name, value in example.columns.items() if name != WEIGHT}
    if record.weight != 1:
        columns[EXAMPLE_WEIGHT] = record.weight
    return replace(example, columns=columns)
