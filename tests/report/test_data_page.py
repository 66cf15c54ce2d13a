"""The page about data: what was understood, token by token, and nothing of it as markup."""

import pytest
from small_tokenizers import make_byte_level

from lora_engine.data.dataset import prepare
from lora_engine.data.inspect import report
from lora_engine.errors import UserError
from lora_engine.report.data_page import data_page, write_data_page


@pytest.fixture(scope="module")
def reports():
    tokenizer = make_byte_level()
    rows = [{"prompt": f"<b>{i} ", "completion": "é<|im_end|>", "x": 1} for i in range(6)]
    train = prepare([*rows, rows[0], {"prompt": "a", "completion": ""}], tokenizer)
    return [report(train, tokenizer), report(train, tokenizer, train=train)]


def test_the_page_tells_what_was_understood(reports):
    page = data_page("a<b.jsonl", reports)
    assert (
        "a&lt;b.jsonl" in page
        and "<b>0" not in page
        and "&lt;b&gt;" in page.replace("</span><span>", "")
    )
    for said in (
        "prompt-completion (8)",
        "1 records are dropped",
        "record:6 repeats record:0",
        "Also in the training data",
        "not read: x (7)",
        '<span class="learned">',
        "To be mended",
    ):
        assert said in page, said
    assert "http" not in page  # self-contained


def test_the_answers_of_a_judged_source_are_told_by_their_kind():
    tokenizer = make_byte_level()
    rows = [{"prompt": f"a{i}", "completion": f" b{i}", "label": i % 3 > 0} for i in range(6)]
    page = data_page("a", [report(prepare(rows, tokenizer), tokenizer)])
    assert "2 undesirable, 6 to other prompts, for comparison, 4 desirable" in page


def test_it_is_written_where_it_is_asked_for(reports, tmp_path):
    write_data_page(tmp_path / "a/data.html", "a", reports)
    assert (tmp_path / "a/data.html").read_text().startswith("<!doctype html>")
    with pytest.raises(UserError, match="--html: is empty"):
        write_data_page(" ", "a", reports)
