"""One fine-tuning run from configuration to report: what `lora-engine train` and `demo` do.

The run's folder ends up with

    config.yaml     the whole configuration; `train` it again with --resume to continue
    metrics.jsonl   a line per step and per evaluation
    checkpoints/    from which an interrupted run continues
    adapter/        in PEFT's format, or the whole model where all weights were trained; with the
                    tokenizer and a model card (see training/run/export.py); of several adapters one
                    folder each
    summary.json    the result in numbers, the samples, the machine
    report.html     the same for people
"""

import json
import shlex
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from lora_engine.app.chat_settings import set_chat_template
from lora_engine.app.config import RunConfig, dump_config, load_config
from lora_engine.app.datasets import Reading, prepare_data, prepare_probe, prepare_prompt_data
from lora_engine.app.fit_memory import with_memory
from lora_engine.app.merge_aware import merge_aware, packing_of
from lora_engine.app.objectives import objective_of, teacher_of
from lora_engine.app.online import online_of, shown_prompts
from lora_engine.app.run_model import run_model
from lora_engine.app.run_summary import description, earlier_peak, model_name, perplexity
from lora_engine.app.samples_before import counted, read_json, samples_before
from lora_engine.app.starting_adapter import (
    StartingAdapter,
    going_on,
    starting_adapter,
    tell_other_weights,
)
from lora_engine.data import TokenizedDataset
from lora_engine.data.account import account, lines
from lora_engine.data.adapters import check_adapters
from lora_engine.data.inspect import DataReport, report
from lora_engine.data.vocabulary import check_rows, check_same_vocabulary, check_vocabulary
from lora_engine.distributed.world import World, current
from lora_engine.errors import UserError
from lora_engine.evaluation.samples import generate
from lora_engine.files import naming, write_text
from lora_engine.machine import machine_facts
from lora_engine.models.attach.accelerate import accelerate, restore
from lora_engine.models.load.load import (
    DTYPES,
    configured_vocabulary,
    load_model,
    load_tokenizer,
    resolve_device,
    resolve_dtype,
)
from lora_engine.models.load.scalar import add_value_head, with_scalar_head
from lora_engine.models.peft.adapters import add_adapters
from lora_engine.models.sharded.shard import is_sharded
from lora_engine.objectives.base import Objective, Teacher
from lora_engine.report.page import write_report
from lora_engine.training.run.folder import RunFolder
from lora_engine.training.together import check_share
from lora_engine.training.trainer import Trainer, TrainResult


class Observer(Protocol):
    """Is told what a run is doing; its further methods are callbacks of the Trainer.

    If it has a method on_data(lines), that is called before training with lines about records that
    were dropped or cut and fields that are not read, where there are any. One on_reading(source,
    bytes done, bytes in all or 0, records) is called while data are read; one on_load(bytes done,
    bytes in all) while a model is loaded tensor by tensor.
    """

    def stage(self, text: str) -> None:
        """Something that takes a while begins: "loading the model"."""


@dataclass(frozen=True)
class Outcome:
    """result: of the training loop. summary: what summary.json holds; None if interrupted, and
    where it is another process that tells the outcome, of several."""

    folder: Path
    result: TrainResult
    summary: dict[str, Any] | None
    is_told: bool = True


def finetune(
    config: RunConfig, *, resume: bool = False, observer: Observer | None = None
) -> Outcome:
    """Run `config` to its end, or until SIGINT, SIGTERM or SIGHUP.

    resume: continue the run in `config.train.output_dir` from its newest checkpoint.
    Within `distributed.world.joined` all processes call it; the first alone uses the folder, and
    has an observer.
    Raises UserError for whatever in the configuration or the data cannot be used, and OSError for
    a file that cannot be written; the last checkpoint is whole then.
    """
    folder = config.train.output_dir
    with naming(folder):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder}: is a file, train.output_dir must be a folder")
    world = current()
    check_share(world, config.train, writes=config.writes)
    if not world.is_first:
        return _finetune(config, resume, None, world)
    with RunFolder(folder).locked():
        _check_folder(config, resume)
        return _finetune(config, resume, observer, world)


def _finetune(config: RunConfig, resume: bool, observer: Observer | None, world: World) -> Outcome:
    tell = observer.stage if observer else _ignore
    folder = config.train.output_dir
    config = _with_dtype(config, resume, world)
    start = starting_adapter(config)
    if start is not None:
        config = config.model_copy(update={"lora": start.lora})
    if config.train.memory is not None:
        begun = _config_of_run(folder) if resume and world.is_first else None
        config = with_memory(config, begun, world, tell)
    tell(f"loading {model_name(config)}")
    model, tokenizer, fingerprint = run_model(config, getattr(observer, "on_load", None), world)
    origin = _origin(config, fingerprint, start)
    reads = config.chosen_objective().reads
    if not reads.predicts_tokens:
        model = with_scalar_head(
            model, pad_token_id=tokenizer.pad_token_id, seed=config.lora.seed if config.lora else 0
        )
    tell(f"reading {config.data.name()}")
    reading = getattr(observer, "on_reading", None)
    train_data, eval_data = _examples(config, tokenizer, reading)
    for dataset in (train_data, eval_data):
        check_vocabulary(dataset, model, tokenizer)
    probe = prepare_probe(config, tokenizer)
    accounts = [account(train_data), account(eval_data)]
    if said := lines(accounts):
        getattr(observer, "on_data", _ignore)(said)
    if start is not None:
        model = going_on(model, start)
    elif config.lora is not None:
        model = add_adapters(model, config.lora)
    if config.lora is not None and config.lora.merge_aware:
        merge_aware(model, packing_of(config.model))
    if start is not None:
        tell_other_weights(start, model)
    if reads.values_targets:
        add_value_head(model, None if start is None else start.folder)
    callbacks = () if observer is None else (observer,)
    train = config.train_with_rates()
    trainer = Trainer(
        model,
        tokenizer,
        train_data,
        eval_data,
        train,
        objective=_objective(config, tokenizer, next(model.parameters()).device, tell),
        probe=probe,
        online=online_of(config, tokenizer, next(model.parameters()).device, tell),
        callbacks=callbacks,
        origin=origin,
    )
    files = trainer.folder
    files.reserve_results()
    step = trainer.check_folder(resume)
    coverage = None
    if config.accelerate:
        coverage = accelerate(model, strict=config.accelerate == "strict")
    preflight = trainer.preflight(step)
    if preflight is not None:
        tell(f"preflight: {preflight}")
    writes = trainer.objective.reads.predicts_tokens
    prompts = shown_prompts(eval_data, tokenizer, config.samples.count if writes else 0)
    in_step = is_sharded(model)  # then all processes run it, to write samples, too
    writing = world.is_first or in_step
    if writing:
        kept = read_json(files.samples_before) if step is not None and world.is_first else None
        if in_step:
            kept = cast("dict[str, Any] | None", world.of_first(kept))
        before = samples_before(config, model, tokenizer, prompts, kept, tell)
    trainer.open_folder(step)
    if world.is_first:
        for path in (files.summary, files.report):  # which the run wrote when it ended earlier
            path.unlink(missing_ok=True)
        write_text(files.config, dump_config(config))
        write_text(files.samples_before, json.dumps(before))
    if step is None:
        held_out = len(eval_data)
        tell(f"measuring {held_out:,} held-out example{'s' * (held_out != 1)}, then training")
    elif step == trainer.total_steps:
        tell(f"all {step:,} steps are done; the results are written again")
    result = trainer.fit(resume=resume)
    if coverage is not None:
        restore(model)
    if result.stopped == "interrupted" or not writing:
        return Outcome(folder, result, None, is_told=world.is_first)
    if prompts:
        tell(f"writing {counted(len(prompts))}")
    after = generate(model, tokenizer, prompts, max_new_tokens=config.samples.max_new_tokens)
    if not world.is_first:
        return Outcome(folder, result, None, is_told=False)
    unit = trainer.objective.unit
    summary = {
        **result.summary(),
        "objective": trainer.objective.name,
        "loss_unit": unit,
        "accuracy_of": trainer.objective.reads.accuracy_of,
        "peak_memory_bytes": max(result.peak_memory_bytes, earlier_peak(files.metrics)),
        "heldout_perplexity_before": perplexity(result.heldout_loss_before, unit),
        "heldout_perplexity_after": perplexity(result.heldout_loss_after, unit),
        **description(config, model, train_data, eval_data),
        "data_accounts": accounts,
        "preflight": None if preflight is None else asdict(preflight),
        "samples": [
            {
                "origin": p.origin,
                "prompt": p.text,
                "before": b,
                "after": a,
                "reference": p.reference,
            }
            for p, b, a in zip(prompts, before["texts"], after, strict=True)
        ],
        "coverage": str(coverage) if coverage is not None else None,
        "config": config.model_dump(mode="json"),
        "machine": machine_facts(),
    }
    write_text(files.summary, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    write_report(files)
    return Outcome(folder, result, summary)


def examine_data(config: RunConfig, reading: Reading | None = None) -> list[DataReport]:
    """What is in the training and in the held-out data; reads the tokenizer, not the model."""
    tokenizer = load_tokenizer(config.model.path)
    train_data, eval_data = _examples(config, tokenizer, reading)
    for dataset in (train_data, eval_data):
        check_rows(dataset, configured_vocabulary(config.model.path), tokenizer)
    return [report(train_data, tokenizer), report(eval_data, tokenizer, train=train_data)]


def _examples(
    config: RunConfig, tokenizer: Any, reading: Reading | None
) -> tuple[TokenizedDataset, TokenizedDataset]:
    """`prepare_data`, with the adapters that the records name checked."""
    set_chat_template(tokenizer, config.data)
    if config.writes:
        return prepare_prompt_data(config.data, tokenizer)
    datasets = prepare_data(config.data, tokenizer, reading)
    for dataset in datasets:
        check_adapters(dataset, list(config.lora.of_adapters()) if config.lora else [])
    return datasets


def how_to_resume(folder: Path) -> str:
    """What to type to go on with the interrupted run in `folder`."""
    run = RunFolder(folder)
    if not run.is_used():
        return "there is no checkpoint yet, start again with the same command"
    return f"continue with: lora-engine train {shlex.quote(str(run.config))} --resume"


def _check_folder(config: RunConfig, resume: bool) -> None:
    """Raises UserError, before any work, if the folder holds a run that may not be replaced, no run
    to resume, or the model that the run begins with."""
    folder, overwrite = config.train.output_dir, config.train.overwrite
    run = RunFolder(folder)
    if resume and not run.holds_run():
        raise UserError(
            f"{folder.absolute()}: holds no run to resume; begin one without --resume, or give the "
            "train.output_dir of the run that is meant"
        )
    if run.is_used() and not resume and not overwrite:
        raise UserError(
            f"{folder}: already holds a run; continue it with --resume, give another "
            "train.output_dir, or discard it with train.overwrite=true"
        )
    if not resume:
        begins_with = {"model": config.model.path, "adapter": config.model.adapter}
        for what, source in begins_with.items():
            place = Path(source).resolve() if source else None
            itself = what == "adapter" and place == folder.resolve()
            if place is not None and (itself or place.is_relative_to(run.adapter.resolve())):
                raise UserError(
                    f"train.output_dir: the run in {folder} holds {source}, the {what} to begin "
                    "with, and would be discarded; choose another output_dir"
                )
        run.reserve_results()
        run.check_foreign()


def _with_dtype(config: RunConfig, resume: bool, world: World) -> RunConfig:
    """`config` with dtype `auto` resolved: as when the run began, or else for the first process's
    machine."""
    if config.model.dtype != "auto":
        return config
    dtype = "auto"
    if resume and world.is_first and (begun := _config_of_run(config.train.output_dir)):
        dtype = begun.model.dtype
    chosen = resolve_dtype(dtype, resolve_device(config.model.device))
    name = world.of_first(next(name for name, known in DTYPES.items() if known == chosen))
    return config.model_copy(update={"model": config.model.model_copy(update={"dtype": name})})


def _config_of_run(folder: Path) -> RunConfig | None:
    """What the run in the folder was configured with; None where its config.yaml is lost or
    damaged."""
    with suppress(UserError):
        return load_config(RunFolder(folder).config)
    return None


def _origin(config: RunConfig, weights: str, start: StartingAdapter | None) -> dict[str, Any]:
    """What the trained model is made from, for the identity of the run."""
    origin: dict[str, Any] = {"weights": weights}
    if config.lora is not None and config.lora.merge_aware:
        origin["lora.merge_aware"] = asdict(packing_of(config.model))
    if start is not None:
        return {**origin, "model.adapter": start.sha256}
    return origin if config.lora is None else {**origin, "lora.seed": config.lora.seed}


def _objective(config: RunConfig, tokenizer: Any, device: torch.device, tell: Any) -> Objective:
    """The objective of the run, with its teacher if it names a model of the same vocabulary."""
    source, teacher = teacher_of(config.objective), None
    if source:
        tell(f"loading the teacher, {source}")
        model, theirs = load_model(source, dtype=config.model.dtype, device=device)
        check_same_vocabulary(theirs, tokenizer, f"objective.teacher: {source}")
        if config.accelerate:
            accelerate(model)
        teacher = Teacher(model.requires_grad_(False), source)
    return objective_of(config.objective, teacher)


def _ignore(told: Any) -> None:
    """An observer's method where there is no observer."""
