"""Prompts made by rule, whose answers can be checked: sums of two small numbers."""

import random

from lora_engine.data.records import Record

QUESTION = "What is {a} + {b}? Answer with the number alone."
LARGEST = 20


def sum_records() -> list[Record]:
    """One "prompt" record for each pair of numbers from 1 to LARGEST, in a fixed mixed order.

    The column `answer` has the sum as text. a + b and b + a are of one group, on one side of a
    held-out split.
    """
    pairs = [(a, b) for a in range(1, LARGEST + 1) for b in range(1, LARGEST + 1)]
    random.Random(0).shuffle(pairs)
    return [
        Record(
            "prompt",
            prompt=({"role": "user", "content": QUESTION.format(a=a, b=b)},),
            columns={"answer": str(a + b)},
            origin=f"{a} + {b}",
            group=f"{min(a, b)} + {max(a, b)}",
        )
        for a, b in pairs
    ]
