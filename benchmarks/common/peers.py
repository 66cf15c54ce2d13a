"""Other people's packages that are measured beside ours, and which of them this machine has."""

from collections.abc import Mapping
from importlib import metadata

# What each is called, its distribution, and how it is set up.
PEERS = {
    "PyTorch": ("torch", "eager, and torch.compile(dynamic=False)"),
    "transformers": ("transformers", "sdpa attention; its generate with a cache"),
    "PEFT": ("peft", "adapters in the weights' dtype"),
    "TRL": ("trl", "SFTTrainer padded and padding_free, DPOTrainer, GRPOTrainer"),
    "bitsandbytes": ("bitsandbytes", "dequantize_4bit, Linear4bit"),
    "Unsloth": ("unsloth", "FastLanguageModel with UNSLOTH_ALLOW_CPU=1"),
    "Liger-Kernel": ("liger-kernel", "its functions, on a GPU"),
    "mlx": ("mlx", "mx.fast and mx.compile, on a CPU"),
}
MISSING = "not installed"


def version(package: str) -> str | None:
    """Of an installed distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def states() -> dict[str, str]:
    """Of each peer its version, or MISSING."""
    return {name: version(package) or MISSING for name, (package, _) in PEERS.items()}


def sentence(found: Mapping[str, str]) -> str:
    """`states` as one line."""
    here = [f"{name} {state}" for name, state in found.items() if state != MISSING]
    missing = [name for name, state in found.items() if state == MISSING]
    line = f"Peers installed: {', '.join(here)}." if here else "No peer is installed."
    return line + (f" Not installed, so not measured: {', '.join(missing)}." if missing else "")
