import torch

from lora_engine.memory.measured import peak_cpu_bytes


def test_the_most_bytes_alive_at_once():
    held = []

    def work():
        a = torch.empty(1000, dtype=torch.float32)
        b = torch.empty(3000, dtype=torch.uint8)
        del a
        c = torch.empty(500, dtype=torch.float32)
        held.append((b, c))

    assert [peak_cpu_bytes(work) for _ in range(3)] == [7000] * 3


def test_what_was_alive_before_counts_as_alive_to_the_end():
    before = [torch.empty(10_000)]

    def work():
        before.clear()
        return torch.empty(100)

    assert peak_cpu_bytes(work) == 400
