"""Preferences made of docstrings: the better answer is the function's own."""

import pytest

from lora_engine.data.docstrings import docstring_records
from lora_engine.data.preferred_docstrings import docstring_labels, docstring_pairs
from lora_engine.data.records import read_records
from lora_engine.errors import UserError

SOURCE = "".join(
    f'def f{i}(x):\n    """Return number {i}."""\n    return x + {i}\n\n' for i in range(8)
)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "numbers.py").write_text(SOURCE)
    return tmp_path


def test_pairs(root):
    pairs, plain = docstring_pairs(root), docstring_records(root)
    for i, (pair, record) in enumerate(zip(pairs, plain, strict=True)):
        assert (pair.kind, pair.origin, pair.group) == ("preference", record.origin, record.group)
        assert (*pair.prompt, *pair.chosen) == record.messages
        (worse,) = pair.rejected
        if i % 2 == 0:
            assert worse["content"].startswith(
                f"This function is a Python function that is used to return number {i}. It takes"
            )
        else:
            assert worse["content"] == f"Return number {(i + 4) % 8}."


def test_labels(root):
    judged, pairs = docstring_labels(root), docstring_pairs(root)
    assert [record.label for record in judged] == [True, True, False, False] * 2
    for record, pair in zip(judged, pairs, strict=True):
        assert record.completion == (pair.chosen if record.label else pair.rejected)
        assert (record.kind, record.prompt) == ("unpaired", pair.prompt)


def test_they_are_sources_by_name(monkeypatch, root):
    import sysconfig

    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(root))
    assert [r.kind for r in read_records("docstring_pairs")] == ["preference"] * 8
    assert [r.kind for r in read_records("docstring_labels")] == ["unpaired"] * 8
    with pytest.raises(UserError, match="did you mean docstring_pairs"):
        read_records("docstring_pair")
