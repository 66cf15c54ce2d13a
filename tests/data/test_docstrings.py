import ast
from pathlib import Path

import pytest

from lora_engine.data.docstrings import (
    docstring_records,
    documented_functions,
    shorten,
    source_without_docstring,
    summary,
)
from lora_engine.data.records import read_records, split_heldout
from lora_engine.errors import UserError

MODULE = '''\
"""The module's docstring."""


def plain(a, b):
    """Add two numbers.

    At length.
    """

    # the comment stays
    return a + b


class Thing:
    """The class's docstring."""

    @property
    def name(self):
        r\'\'\'Return the name.\'\'\'
        return "x"  # also this

    async def nothing(self):
        """Do nothing at all."""

    def undocumented(self):
        return """Return no docstring."""


if True:
    def one_line(): "Return a constant."; return 3


def outer():
    def inner():
        """Return the inner thing."""
        return 1
    return inner


def after_form_feed():
    \f
    """Say what follows a form feed."""
    return 4
'''

EXPECTED = [
    ("Add two numbers.", "def plain(a, b):\n    # the comment stays\n    return a + b"),
    ("Return the name.", '@property\ndef name(self):\n    return "x"  # also this'),
    ("Do nothing at all.", "async def nothing(self):\n    pass"),
    ("Return a constant.", "def one_line():\n    return 3"),
    ("Return the inner thing.", "def inner():\n    return 1"),
    ("Say what follows a form feed.", "def after_form_feed():\n    \f\n    return 4"),
]


def test_functions_and_their_summaries(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(MODULE)
    found = list(documented_functions(path))
    assert [(answer, source) for _, source, answer in found] == EXPECTED
    lines = MODULE.splitlines()
    for line, source, _ in found:
        name = source.partition("def ")[2].partition("(")[0]
        assert f"def {name}(" in MODULE.split("\n")[line - 1], lines


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Return the sum.", "Return the sum."),
        ("\n    Return the sum\n    ", "Return the sum"),
        ("Return the sum.\nOf two.", "Return the sum."),
        ("Return the sum\nof two.", None),
        ("Return the sum,\n\nor not.", None),
        (">>> add(1, 2)", None),
        ("x.__add__(y)", None),
        ("", None),
    ],
)
def test_summary_stands_by_itself(docstring, expected):
    assert summary(docstring) == expected


def test_shorten_cuts_after_a_line():
    source = "def f():\n    a = 1\n    b = 2\n    return a"
    assert shorten(source, len(source)) == source
    for limit in range(20, len(source)):
        short = shorten(source, limit)
        assert len(short) <= limit and short.endswith("\n    ...")
        assert source.startswith(short.removesuffix("\n    ..."))
    assert shorten(source, 30) == "def f():\n    a = 1\n    ..."


def test_a_docstring_beside_code_is_taken_out_too():
    text = 'def f():\n    """Say it."""; x = 1\n    return x\n'
    node = ast.parse(text).body[0]
    assert isinstance(node, ast.FunctionDef)
    expected = "def f():\n    x = 1\n    return x"
    assert source_without_docstring(node, text.splitlines(keepends=True)) == expected


def write_library(root: Path) -> Path:
    function = 'def f{0}():\n    """Return the number {0}."""\n    return {0}\n'
    for number, name in enumerate(["b.py", "a/x.py", "a/y.py", "test/t.py", "site-packages/s.py"]):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(function.format(number))
    (root / "copy.py").write_text(function.format(0))
    (root / "broken.py").write_text("def f(:\n")
    (root / "latin.py").write_bytes(b"# no cookie: \xff\n" + function.format(9).encode())
    return root


def test_records_of_a_folder(tmp_path):
    records = docstring_records(write_library(tmp_path))
    assert [(r.origin, r.group) for r in records] == [
        ("b.py:1", "b"),
        ("a/x.py:1", "a"),
        ("a/y.py:1", "a"),
    ]
    question, answer = records[0].messages
    assert question["role"] == "user" and "def f0():\n    return 0\n```" in question["content"]
    assert answer == {"role": "assistant", "content": "Return the number 0."}


def test_a_folder_without_sources_says_so(tmp_path):
    with pytest.raises(UserError, match="no Python sources"):
        docstring_records(tmp_path)


@pytest.fixture(scope="module")
def standard_library():
    return read_records("docstrings")


def test_standard_library(standard_library):
    assert len(standard_library) > 3500
    for record in standard_library:
        question, answer = (message["content"] for message in record.messages)
        assert len(question) <= 900 and len(answer) <= 160 and "\n" not in answer
    questions = [record.messages[0]["content"] for record in standard_library]
    assert len(set(questions)) == len(questions)
    assert not any(r.group in ("test", "idlelib", "site-packages") for r in standard_library)


def test_no_answer_is_given_away_as_a_docstring(standard_library):
    for record in standard_library[::7]:
        question, answer = (message["content"] for message in record.messages)
        assert f'"""{answer}' not in question


def test_standard_library_is_split_by_module(standard_library):
    train, heldout = split_heldout(standard_library, 0.05)
    assert 0.04 < len(heldout) / len(standard_library) <= 0.051
    assert not {r.group for r in train} & {r.group for r in heldout}
    assert len({r.group for r in heldout[:20]}) > 5  # shuffled: the first are a fair sample


def test_docstrings_have_no_splits():
    with pytest.raises(UserError, match="has no split 'test'"):
        read_records("docstrings", split="test")
