"""Data: read records, render and mask them, pack them into batches, and say what is in them."""

from lora_engine.data.batch import PackedBatch, collate
from lora_engine.data.dataset import TokenizedDataset, prepare
from lora_engine.data.records import Record, read_records, split_heldout
from lora_engine.data.render import Example, tokenize
from lora_engine.data.sampler import PackedSampler

__all__ = [
    "Example",
    "PackedBatch",
    "PackedSampler",
    "Record",
    "TokenizedDataset",
    "collate",
    "prepare",
    "read_records",
    "split_heldout",
    "tokenize",
]
