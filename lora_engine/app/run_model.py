"""The model of a run: loaded, hashed, and in shards where the configuration says so."""

from collections.abc import Callable
from typing import Any

from lora_engine.app.config import RunConfig
from lora_engine.distributed.world import World
from lora_engine.errors import UserError
from lora_engine.models.load.load import load_model, resolve_device
from lora_engine.models.quantized.linear import QuantizedLinear
from lora_engine.models.sharded.shard import shard_model
from lora_engine.training.run.identity import model_weights_sha256

Progress = Callable[[int, int], None]


def run_model(config: RunConfig, progress: Progress | None, world: World) -> tuple[Any, Any, str]:
    """The run's model, its tokenizer, and the fingerprint of the weights as they were loaded.

    A model in shards is loaded on the CPU, by one process after the other: only one of them holds
    all of it. Raises UserError for a model that nothing could train.
    """
    device = config.model.device
    offloads = "offload_host" if config.model.offload_host else "offload_folder"
    if getattr(config.model, offloads) and world.size > 1:
        raise UserError(
            f"model.{offloads}: is for one process; with several set model.shard=true instead"
        )
    if not config.model.shard or world.size == 1:
        model, tokenizer = _load(config, device, progress)
        return model, tokenizer, model_weights_sha256(model)
    for rank in range(world.size):
        if rank == world.rank:
            model, tokenizer = _load(config, "cpu", progress)
            fingerprint = model_weights_sha256(model)
            shard_model(model, world)
            model = model.to(resolve_device(device))
        world.gather(None)
    return model, tokenizer, fingerprint


def _load(config: RunConfig, device: str, progress: Progress | None) -> tuple[Any, Any]:
    stated = config.model
    # A merge-aware run keeps the weights, and packs them once they have their adapters.
    merge_aware = config.lora is not None and config.lora.merge_aware
    model, tokenizer = load_model(
        stated.path,
        dtype=stated.dtype,
        device=device,
        quantize=None if merge_aware else stated.quantize,
        double_quant=stated.double_quant and not merge_aware,
        quantize_skip=None if merge_aware else stated.quantize_skip,
        keep_quantized=stated.keep_quantized,
        offload_folder=stated.offload_folder,
        offload_host=stated.offload_host,
        progress=progress,
    )
    if config.lora is None and any(isinstance(m, QuantizedLinear) for m in model.modules()):
        raise UserError(
            f"{stated.path}: its weights are in packed bits, which are frozen; give lora"
        )
    if merge_aware and any(isinstance(m, QuantizedLinear) for m in model.modules()):
        raise UserError(
            f"{stated.path}: its weights are in packed bits already; lora.merge_aware needs the "
            "model of 16 bits that they were made from"
        )
    return model, tokenizer
