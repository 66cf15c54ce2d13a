"""A step's time on one GPU and on many, from sizes alone: the tables of docs/scaling.md.

    python -m benchmarks.gpu.scaling

Everything that it prints is modelled (`lora_engine.memory`); nothing is measured, no GPU is asked.
"""

import argparse
from typing import NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import output
from lora_engine.memory.plan import Candidate, best, budget_of, candidates
from lora_engine.memory.sizes import ModelSizes, Storing, sizes_of
from lora_engine.memory.speed import GPUS, Machine, step_seconds
from lora_engine.memory.timeline import Load
from lora_engine.models.peft.adapters import LoraConfig
from lora_engine.quantization.formats import writable_format

TOKENS, LENGTH = 8192, 2048  # of a micro-batch, and of a sequence
REACHED = 0.7  # of a link's nominal rate, an assumption


class Model(NamedTuple):
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = False


MODELS = {
    "1B": Model(2048, 8192, 16, 32, 8, 128256, tied=True),
    "8B": Model(4096, 14336, 32, 32, 8, 128256),
    "70B": Model(8192, 28672, 80, 64, 8, 128256),
}


class Cluster(NamedTuple):
    """link: bytes a second that a GPU sends and receives at the slowest place between two."""

    gpu: str
    count: int
    link: float
    what: str


PCIE, NVLINK, NETWORK = 32e9, 450e9, 50e9
CLUSTERS = (
    Cluster("rtx-4090", 1, PCIE, "one card"),
    Cluster("rtx-4090", 2, PCIE, "PCIe 4.0, 32 GB/s"),
    Cluster("a100-80gb", 8, 300e9, "NVLink, 300 GB/s"),
    Cluster("h100", 1, NVLINK, "one card"),
    Cluster("h100", 8, NVLINK, "NVLink, 450 GB/s"),
    Cluster("h100", 64, NETWORK, "8 nodes, 50 GB/s a GPU"),
)


def sizes(name: str, format: str | None) -> ModelSizes:
    of = MODELS[name]
    with torch.device("meta"):
        config = LlamaConfig(
            vocab_size=of.vocab,
            hidden_size=of.hidden,
            intermediate_size=of.inner,
            num_hidden_layers=of.layers,
            num_attention_heads=of.heads,
            num_key_value_heads=of.kv_heads,
            tie_word_embeddings=of.tied,
        )
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    storing = Storing(None if format is None else writable_format(format, None, False))
    return sizes_of(model, LoraConfig(), torch.bfloat16, storing)


def sharded(whole: ModelSizes, count: int) -> ModelSizes:
    """What one of `count` processes holds: its part of linears, and two slots of a layer's."""
    linears = whole.weights["linears"]
    slots = 2 * linears // whole.layers  # more than two groups take
    weights = {**whole.weights, "linears": linears // count + slots}
    return whole.__class__(**{**vars(whole), "weights": weights})


class Row(NamedTuple):
    way: str
    found: Candidate
    compute: float  # seconds of a step
    waiting: float  # for links


def of_cluster(cluster: Cluster, whole: ModelSizes) -> Row | None:
    """The quickest of replicating and sharding that fits; None: neither does."""
    gpu = GPUS[cluster.gpu]
    rows = []
    for way in ("replicated", "sharded") if cluster.count > 1 else ("alone",):
        own = sharded(whole, cluster.count) if way == "sharded" else whole
        found = fitting(own, gpu)
        if found is None:
            continue
        compute = step_seconds(own, found.load, gpu, LENGTH)
        rows.append(Row(way, found, compute, waiting(cluster, whole, found, way, compute)))
    return min(
        rows, key=lambda row: (row.compute + row.waiting) / row.found.load.rows, default=None
    )


def fitting(own: ModelSizes, gpu: Machine) -> Candidate | None:
    device = torch.device("cuda")
    load = Load(TOKENS, TOKENS, device=device)
    return best(candidates(own, load, budget_of(gpu.memory, device, None), gpu, LENGTH))


def waiting(
    cluster: Cluster, whole: ModelSizes, found: Candidate, way: str, compute: float
) -> float:
    """Seconds of a step that links take beyond what is computed meanwhile."""
    share, link = (cluster.count - 1) / cluster.count, REACHED * cluster.link
    if cluster.count == 1:
        return 0.0
    reduced = 2 * share * 4 * whole.adapter_values / link  # after the last backward pass
    if way == "replicated":
        return reduced
    passes = 2 + (found.load.policy.every > 0)
    gathered = passes * share * whole.weights["linears"] / link  # while products are computed
    return reduced + max(0.0, gathered - compute)


def table() -> str:
    lines = []
    for name in MODELS:
        for format in (None, "nf4"):
            whole = sizes(name, format)
            for cluster in CLUSTERS:
                row = of_cluster(cluster, whole)
                model = f"{name}, {format or 'bfloat16'}"
                where = f"{cluster.count} × {cluster.gpu}"
                if row is None:
                    lines.append([model, where, "does not fit", "", "", "", "", ""])
                    continue
                tokens, seconds = row.found.load.rows, row.compute + row.waiting
                lines.append(
                    [
                        *(model, where, row.way, row.found.policy, f"{tokens:,}"),
                        f"{row.found.highest.total / 1e9:.1f}" if row.found.fits else "all",
                        f"{cluster.count * tokens / seconds:,.0f}",
                        f"{row.waiting / seconds:.1%}",
                    ]
                )
    columns = [
        *("model", "GPUs", "base", "checkpointing", "tokens a micro-batch", "GB a GPU"),
        *("tokens/s, all", "waits for links"),
    ]
    return output.table(columns, lines)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(table())
