"""Whatever a chat template does, a UserError names the conversation and the reason."""

import threading
import time

import pytest
from small_tokenizers import make_byte_level

from lora_engine.data import template
from lora_engine.data.dataset import prepare
from lora_engine.errors import UserError

CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
LOOP = "{% for i in range(99999) %}"
ENDLESS = LOOP * 3 + "{% endfor %}" * 3

FAILING = {
    "{% for m in messages %}": "is not valid Jinja: .* \\(its line 1\\)",
    "{{ raise_exception('roles\nmust alternate') }}": "refuses this .*: roles must alternate$",
    "{{ messages[9].content }}": "refuses this .*: list object has no element 9",
    "{{ messages[0].nothing.here }}": "refuses this .*: .*no attribute 'nothing'",
    "{% for i in range(10**9) %}x{% endfor %}": "fails on .*: OverflowError: Range too big",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "fails on .*: RecursionError",
    "{{ messages[0]['content'] + 1 }}": "fails on .*: TypeError",
    "{{ 1 / 0 }}": "fails on .*: ZeroDivisionError",
    "{{ messages[0]['content'].index('z') }}": "fails on .*: ValueError",
    "{{ messages[0]['content'] | nothing }}": "No filter named 'nothing'",
    "{{ messages[0].__class__.__mro__ }}": "refuses this .*: .*unsafe",
    "{{ 'x' * 10**7 * 2 }}": "writes 20,000,000 characters for this conversation",
    "{{ '\ud83d' }}": r"writes half a character \(U\+D83D\)",
    "{{ strftime_now('%Y', 1) }}": "fails on .*: TypeError",
}


@pytest.mark.parametrize(("text", "message"), FAILING.items())
def test_a_template_that_fails(text, message):
    tokenizer = make_byte_level(text)
    with pytest.raises(UserError, match=r"1 of 1 records.*: record:0: the chat template") as caught:
        prepare([CHAT], tokenizer)
    assert caught.match(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [{"other": "x"}, 5], ids=["no-default", "number"])
def test_a_template_that_is_no_template(text):
    tokenizer = make_byte_level()
    tokenizer.chat_template = text
    with pytest.raises(UserError, match="record:0: the chat template fails on"):
        prepare([CHAT], tokenizer)


def test_a_template_that_never_ends(monkeypatch):
    monkeypatch.setattr(template, "SECONDS", 0.2)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"record:0: .*: it does not end within 0 seconds"):
        template.render(CHAT["messages"], make_byte_level(ENDLESS), "record:0")
    assert time.monotonic() - started < 30


def test_the_time_of_other_threads_does_not_count():
    """They compute for longer than a template may, which here does next to nothing but wait."""
    done = threading.Event()

    def compute():
        while not done.is_set():
            sum(range(999))

    busy = threading.Thread(target=compute)
    busy.start()
    try:
        with template.time_limit(0.2):
            started = time.process_time()
            while time.process_time() - started < 0.8:
                busy.join(0.05)
    finally:
        done.set()
        busy.join()


def test_templates_run_in_other_threads_too():
    rendered = []
    work = threading.Thread(
        target=lambda: rendered.append(template.render(CHAT["messages"], make_byte_level("x"), ""))
    )
    work.start()
    work.join()
    assert rendered == ["x"]


def test_the_same_failure_is_told_once():
    with pytest.raises(UserError) as caught:
        prepare([CHAT] * 386, make_byte_level("{{ 1 / 0 }}"))
    assert str(caught.value) == (
        "data: 386 of 386 records cannot be used, mend or remove them: "
        "record:0, record:1, record:2 and 383 more: "
        "the chat template fails on this conversation: ZeroDivisionError: division by zero"
    )
