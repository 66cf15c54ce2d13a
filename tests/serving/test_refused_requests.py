"""Requests that cannot be answered: the status, the field that is wrong, and OpenAI's form."""

import json
from dataclasses import dataclass
from typing import Any

import pytest
from running_server import Running, request_bytes

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SAID = {"role": "user", "content": "hi"}
ASKED = {"model": "tiny", "messages": [SAID], "max_tokens": 2}
PROMPT = {"model": "tiny", "prompt": "hi", "max_tokens": 2}


@dataclass(frozen=True)
class Refused:
    """body: bytes as they are, else JSON. param: of the error. words: in its message."""

    name: str
    body: object
    param: str | None = None
    words: str = ""
    status: int = 400
    path: str = CHAT
    method: str = "POST"


def chat(name: str, param: str, words: str = "", **changed: object) -> Refused:
    return Refused(name, {**ASKED, **changed}, param, words)


def completion(name: str, param: str, words: str = "", **changed: object) -> Refused:
    return Refused(name, {**PROMPT, **changed}, param, words, path=COMPLETIONS)


def message(name: str, param: str, **fields: object) -> Refused:
    return chat(name, param, messages=[{**SAID, **fields}])


TABLE = [
    Refused("empty", b"", words="not JSON"),
    Refused("not json", b"{'model': 1}", words="not JSON"),
    Refused("cut", b'{"model": "tiny", "messages": [', words="not JSON"),
    Refused("not utf-8", b'{"model": "\xff\xfe\xfa"}', words="not JSON"),
    Refused("a list", [ASKED], words="not a JSON object"),
    Refused("null", None, words="not a JSON object"),
    Refused("NaN", b'{"model": "tiny", "temperature": NaN}', words="NaN"),
    Refused("deep", b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    Refused("deep enough to be read", b'{"a": ' + b"[" * 500 + b"]" * 500 + b"}"),
    Refused("a number of many digits", b'{"seed": ' + b"9" * 5000 + b"}", words="not JSON"),
    Refused("half a character", b'{"model": "\\ud83d"}', words="U+D83D"),
    Refused("too large", b'{"model": "' + b"x" * (1 << 20) + b'"}', status=413, words="bytes"),
    Refused("nothing", {}, "model", "required"),
    Refused("no messages", {"model": "tiny"}, "messages", "required"),
    Refused("unknown path", ASKED, status=404, path="/v1/chat"),
    Refused("a path", b"", "model", "", 404, "/v1/models/../../etc/passwd", "GET"),
    Refused("a file's path", b"", None, "", 404, "/v1/files/../../../../etc/passwd", "GET"),
    Refused("wrong method", b"", status=405, method="GET"),
    Refused("no such model shown", b"", "model", status=404, path="/v1/models/x", method="GET"),
    Refused("no such model", {**ASKED, "model": "other"}, "model", "one, two, tiny", 404),
    Refused("a file as the model", {**ASKED, "model": "/etc/passwd"}, "model", status=404),
    chat("model is a number", "model", model=5),
    chat("messages are text", "messages", messages="hi"),
    chat("no message", "messages", messages=[]),
    chat("message is text", "messages.0", messages=["hi"]),
    chat("the last is an answer", "messages", messages=[SAID, {**SAID, "role": "assistant"}]),
    message("unknown role", "messages.0.role", role="robot"),
    message("no content", "messages.0.content", content=None),
    message("content is a number", "messages.0.content", content=5),
    message("content is an image", "messages.0.content.0.type",
            content=[{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]),
    message("calls of tools", "messages.0.tool_calls", tool_calls=[{"id": "1"}]),
    message("a field of a message", "messages.0.path", path="/etc/passwd"),
    chat("a misspelled field", "temprature", "did you mean temperature?", temprature=1),
    chat("a template", "chat_template", "unknown", chat_template="{% include '/etc/passwd' %}"),
    chat("a variable of rendering", "chat_template_kwargs", chat_template_kwargs={"tools": []}),
    chat("tools", "tools", "not supported", tools=[{"type": "function"}]),
    chat("json", "response_format", response_format={"type": "json_object"}),
    chat("penalty", "frequency_penalty", frequency_penalty=2.5),
    chat("a penalty that is text", "presence_penalty", presence_penalty="0"),
    chat("echo", "echo", "not supported", echo=True),
    chat("bias", "logit_bias", logit_bias={"5": 1}),
    chat("cold", "temperature", temperature=-0.1),
    chat("hot", "temperature", temperature=2.5),
    chat("nearly greedy", "temperature", "0.001", temperature=1e-30),
    chat("beyond floats", "temperature", temperature=10**400),
    chat("temperature is text", "temperature", temperature="1"),
    chat("temperature is true", "temperature", temperature=True),
    chat("top_p of none", "top_p", top_p=0),
    chat("top_p", "top_p", top_p=1.5),
    chat("min_p", "min_p", min_p=-1),
    chat("top_k", "top_k", top_k=-2),
    chat("penalised", "repetition_penalty", repetition_penalty=0),
    chat("no tokens", "max_tokens", max_tokens=0),
    chat("half a token", "max_tokens", max_tokens=1.5),
    chat("tokens over the limit", "max_tokens", "4096", max_tokens=5000),
    chat("tokens over the model", "messages", "more than the 512", max_tokens=512),
    chat("two lengths", "max_tokens", max_completion_tokens=3),
    chat("a long prompt", "messages", "more than the 512",
         messages=[{**SAID, "content": 600 * "x"}]),
    chat("no answer", "n", n=0),
    chat("many answers", "n", "128", n=129),
    chat("stop at nothing", "stop", stop=""),
    chat("stop at five", "stop", stop=["a"] * 5),
    chat("stop at a number", "stop", stop=5),
    chat("a large seed", "seed", seed=2**63),
    chat("stream is text", "stream", stream="yes"),
    chat("options without a stream", "stream_options", stream_options={"include_usage": True}),
    chat("unknown option", "stream_options.x", stream=True, stream_options={"x": 1}),
    chat("logprobs of many", "top_logprobs", logprobs=True, top_logprobs=21),
    chat("top logprobs alone", "top_logprobs", top_logprobs=2),
    completion("no prompt", "prompt", prompt=[]),
    completion("an empty prompt", "prompt", "empty", prompt=""),
    completion("an empty list of tokens", "prompt", "empty", prompt=[[]]),
    completion("prompts of two kinds", "prompt.1", prompt=["a", 1]),
    completion("a negative token", "prompt.0", prompt=[-1]),
    completion("a token beyond", "prompt", "token 99999", prompt=[1, 99999]),
    completion("an object", "prompt", prompt={"file": "/etc/passwd"}),
    completion("echo is text", "echo", echo="yes"),
    completion("no tokens and no echo", "max_tokens", "needs echo", max_tokens=0),
    completion("echo of a long prompt", "prompt", "more than the 512", prompt="x" * 600, echo=True,
               max_tokens=0),
    completion("suffix", "suffix", suffix="x"),
    completion("the best", "best_of", best_of=3),
    completion("many prompts", "n", prompt=["a"] * 129),
    completion("logprobs", "logprobs", logprobs=21),
    completion("logprobs as in chats", "logprobs", logprobs=True),
]  # fmt: skip
assert len(TABLE) >= 40


def check_error(body: Any, status: int) -> dict[str, Any]:
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert "\n" not in body["error"]["message"] and body["error"]["message"]
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else None
    assert body["error"]["type"] == (kind or "invalid_request_error")
    return body["error"]


@pytest.mark.parametrize("entry", TABLE, ids=lambda entry: entry.name)
def test_refused(server: Running, entry: Refused) -> None:
    status, body = server.ask(entry.method, entry.path, entry.body)
    assert status == entry.status, body
    error = check_error(body, status)
    assert error["param"] == entry.param
    assert entry.words in error["message"]
    assert server.is_idle()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": "multipart/form-data; boundary=x"}, 415),
        ({"Host": "evil.example"}, 403),
        ({"Host": "evil.example:127"}, 403),
        ({"Host": ""}, 403),
    ],
    ids=["text", "form", "files", "another host", "with a port", "none"],
)
def test_what_pages_of_others_can_send_is_refused(
    server: Running, headers: dict[str, str], status: int
) -> None:
    found, body = server.post(CHAT, ASKED, headers=headers)
    assert found == status
    check_error(body, status)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:80", "[::1]", "[::1]:8000"])
def test_names_of_this_machine_are_answered(server: Running, host: str) -> None:
    assert server.ask("GET", "/health", headers={"Host": host}) == (200, {"status": "ok"})


def test_a_body_that_is_longer_than_it_says_is_cut_off(server: Running) -> None:
    """In chunks, without a length: the limit is of what arrives."""
    head = request_bytes("POST", CHAT, b"", {"Transfer-Encoding": "chunked"})
    head = head.replace(b"Content-Length: 0\r\n", b"")
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    answer = server.send(head + chunk * 20)
    assert answer.startswith(b"HTTP/1.1 413")
    check_error(json.loads(answer.partition(b"\r\n\r\n")[2]), 413)


def test_neutral_fields_of_others_are_taken(server: Running) -> None:
    """What clients send of their own, and an answer that is handed back as it came."""
    answered = {"role": "assistant", "content": "x", "refusal": None, "annotations": []}
    answered |= {"tool_calls": None, "function_call": None, "audio": None}
    parts = {"role": "system", "content": [{"type": "text", "text": "a"}], "name": "n"}
    body = {
        **ASKED, "messages": [parts, {**SAID, "role": "developer"}, answered, SAID],
        "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "tools": [], "user": "u",
        "tool_choice": "none", "response_format": {"type": "text"}, "store": False, "stop": None,
        "logprobs": False, "top_logprobs": None, "n": None, "stream_options": None, "seed": -1,
    }  # fmt: skip
    status, found = server.post(CHAT, body)
    assert status == 200, found
