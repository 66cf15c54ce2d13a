"""A small server with the parts of vLLM's HTTP interface that rollouts ask for.

It computes with transformers and PEFT, apart from lora_engine's layers. Paths, fields, statuses and
messages are those of vLLM's OpenAI-compatible server; a field that it would not know is refused.
"""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM

FIELDS = {
    "model", "prompt", "n", "max_tokens", "seed", "stop", "stop_token_ids", "ignore_eos",
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "logprobs", "return_token_ids",
}  # fmt: skip


class Refused(Exception):
    """status: of the answer, with vLLM's form of an error around the message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class StandIn:
    """The base in the folder `base`, served under the name `base`.

    logprobs_mode: "raw" or "processed", as --logprobs-mode. takes_adapters: whether
    VLLM_ALLOW_RUNTIME_LORA_UPDATING is set. tokenizer: finds texts that end a completion. adapters:
    what was loaded of each, by name, those that were unloaded too. spoil: changes an answer before
    it is sent. before: is called with each request for a completion.
    """

    def __init__(self, base: Path, tokenizer: Any) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        self.tokenizer = tokenizer
        self.logprobs_mode, self.takes_adapters, self.max_model_len = "raw", True, 512
        self.adapters: dict[str, dict[str, torch.Tensor]] = {}
        self.served: dict[str, Path] = {}
        self.most_at_once = 0
        self.asked: list[dict[str, Any]] = []
        self.spoil = lambda path, answer: answer
        self.before = lambda body: None
        self._lock = threading.Lock()
        self._asking = 0

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        if path == "/v1/models":
            bases = [{"id": "base", "root": "base", "parent": None,
                      "max_model_len": self.max_model_len}]  # fmt: skip
            return {"data": bases + [{"id": name, "parent": "base"} for name in self.served]}
        if path == "/v1/load_lora_adapter" and self.takes_adapters:
            return self._load(body["lora_name"], Path(body["lora_path"]))
        if path == "/v1/unload_lora_adapter" and self.takes_adapters:
            if body["lora_name"] not in self.served:
                raise Refused(404, f"The lora adapter '{body['lora_name']}' cannot be found.")
            del self.served[body["lora_name"]]
            return "Success"
        if path == "/v1/completions":
            self.before(body)
            with self._lock:
                self._asking += 1
                self.most_at_once = max(self.most_at_once, self._asking)
            try:
                return self._complete(body)
            finally:
                self._asking -= 1
        raise Refused(404, "")

    def _load(self, name: str, folder: Path) -> str:
        if name in self.served:
            raise Refused(400, f"The lora adapter '{name}' has already been loaded.")
        if not (folder / "adapter_model.safetensors").is_file():
            raise Refused(404, f"Loading lora {name} failed: No adapter found for {folder}")
        with self._lock:
            if not isinstance(self.model, peft.PeftModel):
                self.model = peft.PeftModel.from_pretrained(self.model, folder, adapter_name=name)
            else:
                self.model.load_adapter(folder, name)
            state = peft.get_peft_model_state_dict(self.model, adapter_name=name)
            self.adapters[name] = {key: tensor.clone() for key, tensor in state.items()}
        self.served[name] = folder
        return f"Success: LoRA adapter '{name}' added successfully."

    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(body)
        if unknown := set(body) - FIELDS:
            raise Refused(400, f"unknown fields {unknown}")
        if body["model"] not in self.served and body["model"] != "base":
            raise Refused(404, f"The model `{body['model']}` does not exist.")
        assert isinstance(body["seed"], int) and -(2**63) <= body["seed"] + body["n"] < 2**63
        assert body["top_k"] >= -1 and 0 < body["top_p"] <= 1 and body["ignore_eos"] is True
        if len(body["prompt"]) + body["max_tokens"] > self.max_model_len:
            raise Refused(400, f"This model's maximum context length is {self.max_model_len}.")
        with self._lock, torch.no_grad():
            if body["model"] in self.served:
                self.model.set_adapter(body["model"])
            choices = [self._write(body, number) for number in range(body["n"])]
        return {"object": "text_completion", "model": body["model"], "choices": choices}

    def _write(self, body: dict[str, Any], number: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(body["seed"] + number)
        ids, logprobs, finish, text = [], [], "length", ""
        while len(ids) < body["max_tokens"] and finish == "length":
            row = torch.tensor([[*body["prompt"], *ids]])
            logits = self.model(input_ids=row).logits[0, -1].double()
            scaled = kept(logits / (body["temperature"] or 1.0), body)
            drawn = torch.multinomial(scaled.softmax(-1), 1, generator=generator)
            token = int(drawn if body["temperature"] else logits.argmax())
            told = logits if self.logprobs_mode == "raw" else scaled
            ids.append(token)
            logprobs.append(float(told.log_softmax(-1)[token]))
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            if token in body["stop_token_ids"] or any(stop in text for stop in body["stop"]):
                finish = "stop"
        return {
            "index": number,
            "text": text,
            "logprobs": {"tokens": [str(token) for token in ids], "token_logprobs": logprobs},
            "finish_reason": finish,
            "stop_reason": None,
            "token_ids": ids,
            "prompt_token_ids": body["prompt"],
        }


def kept(logits: torch.Tensor, body: dict[str, Any]) -> torch.Tensor:
    """Without the tokens that top_k, top_p and min_p leave out."""
    ranked = logits.softmax(-1).sort(descending=True)
    out = ranked.values.cumsum(-1) - ranked.values >= body["top_p"]
    out |= ranked.values < body["min_p"] * ranked.values[0]
    if body["top_k"] > 0:
        out[body["top_k"] :] = True
    return logits.index_fill(0, ranked.indices[out], float("-inf"))


@contextmanager
def serving(stand_in: StandIn) -> Iterator[str]:
    """Its address, as long as it runs."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer({})

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            self._answer(json.loads(self.rfile.read(length)))

        def _answer(self, body: dict[str, Any]) -> None:
            status = 200
            try:
                answer = stand_in.answer(self.path, body)
                text = answer if isinstance(answer, str) else json.dumps(answer)
            except Refused as refused:
                status = refused.status
                told = {"error": {"message": str(refused), "code": status}}
                text = json.dumps(told if str(refused) else {"detail": "Not Found"})
            text = stand_in.spoil(self.path, text)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
