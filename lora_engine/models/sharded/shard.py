"""A model's frozen linears in shards, one for each process."""

from torch import nn

from lora_engine.distributed.world import World
from lora_engine.errors import UserError
from lora_engine.models.quantized.linear import QuantizedLinear
from lora_engine.models.quantized.quantize import SKIPPED, linears_to_quantize
from lora_engine.models.sharded.linear import ShardedLinear
from lora_engine.ops.sharded_weight import shard_weight
from lora_engine.ops.stored_weight import HostMemory, store_weight
from lora_engine.scratch_file import ScratchFile


def shard_model(model: nn.Module, world: World) -> None:
    """Puts a `ShardedLinear` in the place of every linear of `model`, dense or in packed bits.

    For LoRA over a model that does not fit: shard, then `peft.get_peft_model`, then `accelerate`.
    Each process gives the same model, and keeps 1/W of the linears' bytes of it. Norms, embeddings,
    the head and what is no linear stay whole in each. Raises UserError for a model that has
    adapters or was accelerated, and where there is no linear.
    """
    for name, module in model.named_modules():
        if "forward" in vars(module) or hasattr(module, "base_layer"):
            what = f"{name or type(model).__name__} has an adapter or a forward of its own"
            raise UserError(f"shard_model: {what}; shard the model before that")
    packed = [module for module in model.modules() if type(module) is QuantizedLinear]
    dense: list[nn.Linear] = []
    if not packed or any(type(module) is nn.Linear for module in model.modules()):
        try:
            dense = list(linears_to_quantize(model, SKIPPED))
        except UserError as error:
            if not packed:
                raise UserError(str(error).replace("quantize_model", "shard_model")) from error
    found: list[nn.Linear] = [*packed, *dense]
    del packed, dense
    while found:  # the model's is then the last reference to a whole weight
        linear = found.pop()
        weight = linear.quantized if isinstance(linear, QuantizedLinear) else linear.weight
        sharded = ShardedLinear(shard_weight(weight, world), linear.bias).train(linear.training)
        for parent in list(model.modules()):
            for child, module in parent._modules.items():
                if module is linear:
                    setattr(parent, child, sharded)
        del weight


def store_linear(linear: nn.Linear, place: ScratchFile | HostMemory) -> ShardedLinear:
    """A linear whose frozen weight, `linear`'s, waits in `place`; nothing else of it is copied."""
    weight = linear.quantized if isinstance(linear, QuantizedLinear) else linear.weight
    return ShardedLinear(store_weight(weight, place), linear.bias).train(linear.training)


def is_sharded(model: nn.Module) -> bool:
    """Whether processes share linears of the model, so that all of them have to run it."""
    return any(isinstance(module, ShardedLinear) for module in model.modules())
