"""What a run learns from and is measured on, as tokens: training and held-out data, and a probe."""

import logging
from dataclasses import replace

from torch import nn

from lora_engine.data.account import account, lines
from lora_engine.data.adapters import check_adapters
from lora_engine.data.dataset import TokenizedDataset, prepare
from lora_engine.data.pairs import check_labels, check_roles
from lora_engine.data.prompts import PromptDataset, prepare_prompts
from lora_engine.data.records import Source
from lora_engine.data.stream import ExampleStream, StreamedDataset
from lora_engine.data.template import Tokenizer
from lora_engine.data.vocabulary import check_vocabulary
from lora_engine.errors import UserError
from lora_engine.models.attach.head import transformers_model
from lora_engine.models.peft.routing import active_adapters
from lora_engine.objectives.base import Objective
from lora_engine.objectives.weighted import with_weights
from lora_engine.training.batches import fingerprint
from lora_engine.training.config import TrainConfig
from lora_engine.training.run.fingerprint import json_sha256

logger = logging.getLogger(__name__)


class RunData:
    """The data of a run, tokenised and checked against its model and objective.

    writes: whether the model writes what it learns from; the data are prompts then. Raises
    UserError for data that cannot be learned from.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer | None,
        config: TrainConfig,
        train: "Source | TokenizedDataset",
        heldout: "Source | TokenizedDataset | None",
        *,
        writes: bool,
    ) -> None:
        self._model, self._tokenizer, self._config = model, tokenizer, config
        self._writes = writes
        tokenized = _tokenized_prompts if writes else _tokenized
        self.train = tokenized(train, tokenizer, config, "train_data")
        self.heldout = (
            None if heldout is None else tokenized(heldout, tokenizer, config, "eval_data")
        )
        self.probe: TokenizedDataset | None = None

    @property
    def stream(self) -> ExampleStream | None:
        """What the training data are read from while they are learned from; None: all are here."""
        return self.train.stream if isinstance(self.train, StreamedDataset) else None

    def weighted(self, objective: Objective) -> Objective:
        """The objective with the weights that records have.

        Raises UserError for examples that the model or the objective cannot take.
        """
        check_labels(self.train.examples, self.train.name)
        datasets = [dataset for dataset in (self.train, self.heldout) if dataset is not None]
        for dataset in datasets:
            self._check(dataset, objective)
        weighted = with_weights(objective, datasets)
        if self.stream is not None:
            self.stream.checks = [lambda part: self._check_part(part, weighted)]
        return weighted

    def take_probe(self, source: "Source | TokenizedDataset | None", objective: Objective) -> None:
        """Keeps the probe's examples, of several adapters for each of them.

        Raises UserError for a probe, or its absence, that the run has no use for.
        """
        if source is not None:
            self.probe = self._probe(source, objective)
        if self.probe is not None and self.heldout is None:
            raise UserError("probe: is measured with the held-out data; give eval_data too")
        if self.probe is None and self._config.stop_on_forgetting is not None:
            raise UserError("train.stop_on_forgetting: there is no probe to tell it by; give one")

    def identity(self) -> dict[str, str | None]:
        """Hashes of the data, which a resumed run must agree in."""
        training = _fingerprint(self.train) if self.stream is None else self.stream.identity()
        return {
            "training data": training,
            "held-out data": None if self.heldout is None else _fingerprint(self.heldout),
            "probe": None if self.probe is None else _fingerprint(self.probe),
        }

    def _check(self, dataset: TokenizedDataset, objective: Objective) -> None:
        kind = "prompts" if self._writes else objective.reads.examples
        check_roles(dataset.examples, kind, objective.name, dataset.name)
        check_adapters(dataset, active_adapters(self._model))
        check_vocabulary(dataset, transformers_model(self._model), self._tokenizer)

    def _check_part(self, part: TokenizedDataset, objective: Objective) -> None:
        """The same for a later part of a stream, whose weights have the objective of the first."""
        self._check(part, objective)
        if with_weights(objective, [part]) is not objective:
            raise UserError(
                f"{part.name}: the first records have no 'weight' and later ones do; give one "
                "to a record of the first ones too"
            )

    def _probe(self, source: "Source | TokenizedDataset", objective: Objective) -> TokenizedDataset:
        if not objective.reads.predicts_tokens:
            raise UserError(f"probe: objective {objective.name} predicts no tokens; leave it out")
        dataset = _tokenized(source, self._tokenizer, self._config, "probe")
        check_roles(dataset.examples, "plain", "sft", dataset.name)
        check_vocabulary(dataset, transformers_model(self._model), self._tokenizer)
        if len(names := active_adapters(self._model)) < 2:
            return dataset
        each = [replace(example, adapter=name) for example in dataset for name in names]
        return replace(dataset, examples=each)


def _tokenized(
    data: "Source | TokenizedDataset", tokenizer: Tokenizer | None, config: TrainConfig, what: str
) -> TokenizedDataset:
    if isinstance(data, TokenizedDataset):
        if config.max_length is not None:
            raise UserError(f"max_length has no effect on {what}, which is tokenised already")
        dataset = data
    elif tokenizer is None:
        raise UserError(f"{what} is not tokenised yet: give the trainer a tokenizer")
    else:
        dataset = _prepared(data, tokenizer, what, config.max_length)
    if not len(dataset):
        raise UserError(f"{what} has no examples to learn from")
    return dataset


def _tokenized_prompts(
    data: "Source | TokenizedDataset", tokenizer: Tokenizer | None, config: TrainConfig, what: str
) -> TokenizedDataset:
    """Prompts alone, of an online run."""
    if isinstance(data, TokenizedDataset) and not isinstance(data, PromptDataset):
        raise UserError(
            f"{what} is tokenised for learning from answers; an online run takes prompts, as "
            "lora_engine.data.prepare_prompts makes them"
        )
    if tokenizer is None:
        raise UserError(f"{what}: an online run writes texts; give the trainer a tokenizer")
    if isinstance(data, PromptDataset):
        return data
    dataset = prepare_prompts(data, tokenizer, max_length=config.max_length)
    _tell_left_out(dataset, what)
    return dataset


def _prepared(
    data: "Source", tokenizer: Tokenizer, what: str, max_length: int | None
) -> TokenizedDataset:
    """max_length None: that of `prepare`."""
    if max_length is None:
        dataset = prepare(data, tokenizer)
    else:
        dataset = prepare(data, tokenizer, max_length=max_length)
    _tell_left_out(dataset, what)
    return dataset


def _tell_left_out(dataset: TokenizedDataset, what: str) -> None:
    """Warns of what was dropped, cut or not read."""
    if said := lines([{**account(dataset), "name": what}]):
        logger.warning("%s", "\n".join(said))


def _fingerprint(dataset: TokenizedDataset) -> str:
    """Of the tokens, and of the columns of prompts, which rewards read."""
    own = fingerprint(dataset)
    return own if not isinstance(dataset, PromptDataset) else json_sha256([own, *dataset.keys])
