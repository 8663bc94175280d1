"""Models that a reward may ask: OpenAI-compatible endpoints, hosted or local, and local transformers models.

A chat model is anything with ``name`` and ``complete(messages) -> Reply``; an encoder is anything with
``encode(texts, normalize=True) -> (N, d) array``. API keys come from the environment, are sent over https or
to this machine only, follow no redirect, and stand in no message of ours.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..search.base import check_numbers, clean
from ..search.http import JsonClient, parse_url, read_key


class EndpointError(RuntimeError):
    """An endpoint gave no usable reply; the message names its address and what happened."""


@dataclass(frozen=True)
class Reply:
    """What a chat model said, and the tokens it was billed for (prompt and reply)."""

    text: str
    tokens: int


class _Endpoint:
    """Posts JSON to ``path`` below a base address, with the key of an environment variable."""

    path, connections = "", 1  # a subclass says where, and how many requests may be under way at once

    def __init__(
        self, url: str, model: str, *, key_env: str = "OPENAI_API_KEY", timeout: float = 60.0, retries: int = 6
    ):
        self.url, self.model, self.name = url.rstrip("/"), model, model
        self.identity = f"{model} at {self.url}"  # see ``search.base.identity_of``
        address, key = parse_url(self.url + self.path, "http://host:port/v1"), read_key(key_env)
        if address.userinfo:
            raise ValueError("endpoint url must not hold a password; put the key into an environment variable")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits: dict[str, Any] = {"timeout": timeout, "retries": retries, "connections": self.connections}
        limits |= {"keyed": bool(key), "error": EndpointError, "lost": "; such addresses often end in /v1"}
        self._client = JsonClient(f"{address} (model {model!r})", address, **limits)

    def _post_all(self, bodies: Sequence[dict[str, Any]], read: Callable[[Any], Any]) -> list[Any]:
        requests = [{"json": {"model": self.model, **body}, "headers": self._headers} for body in bodies]
        return self._client.ask_all(requests, read)


class ChatEndpoint(_Endpoint):
    """An OpenAI-compatible chat endpoint.

    Args:
        url: base address, for example "http://127.0.0.1:8000/v1".
        model: name of the model there.
        key_env: environment variable that holds the key; none is sent where it is not set.
        timeout: seconds that a call may take, with all its tries and waits.
        retries: tries after the first, after a failure that may pass; a Retry-After header is honoured.
        body: what the request holds beside model and messages.

    Raises:
        ValueError: the address is not http or https or holds a password, the key cannot be one or would travel
            unencrypted, or a number makes no sense.
    """

    path, connections = "/chat/completions", 100

    def __init__(self, url: str, model: str, *, body: dict[str, Any] | None = None, **connection):
        super().__init__(url, model, **connection)
        self.body = {"temperature": 0, "max_tokens": 256} if body is None else body
        self.identity += f" {self.body}"

    def complete(self, messages: list[dict[str, str]]) -> Reply:
        """The reply to ``messages`` (role, content).

        Raises:
            EndpointError: no reply, or one without text.
        """

        def read(answer: dict) -> Reply:
            text, tokens = answer["choices"][0]["message"]["content"], (answer.get("usage") or {}).get("total_tokens")
            if not isinstance(text, str):
                raise TypeError("it holds no text")
            # an endpoint that does not count is taken to use a token per four characters
            return Reply(
                text, tokens if type(tokens) is int and tokens >= 0 else (len(json.dumps(messages)) + len(text)) // 4
            )

        return self._post_all([{"messages": messages, **self.body}], read)[0]


class EmbeddingsEndpoint(_Endpoint):
    """An OpenAI-compatible embeddings endpoint, as an encoder. Arguments as for ``ChatEndpoint``."""

    path, connections = "/embeddings", 4

    def encode(self, texts: Sequence[str], normalize: bool = True, batch_size: int = 128):
        """Vectors of ``texts`` as a float32 array (N, d), of unit length if ``normalize``.

        Raises:
            EndpointError: no reply, or one that does not hold a vector for every text.
        """
        check_numbers(1, batch_size=batch_size)
        if not len(texts):
            return np.zeros((0, 0), dtype=np.float32)
        parts = [[clean(text) for text in texts[i : i + batch_size]] for i in range(0, len(texts), batch_size)]
        by_index = lambda answer: {item["index"]: item["embedding"] for item in answer["data"]}
        answers = self._post_all([{"input": part} for part in parts], by_index)
        try:
            rows = [answer[i] for part, answer in zip(parts, answers) for i in range(len(part))]
            vectors = np.asarray(rows, dtype=np.float32).reshape(len(rows), -1)
        except KeyError:
            raise EndpointError(f"{self.url}: the reply does not hold a vector for every text") from None
        except (TypeError, ValueError, OverflowError):
            raise EndpointError(f"{self.url}: the vectors differ in length, or are none") from None
        if normalize:
            vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return vectors


class LocalChat:
    """A transformers model with a chat template (a Qwen, for example), answering greedily, one call at a time."""

    def __init__(self, model, tokenizer, *, name: str = "", max_new_tokens: int = 128):
        check_numbers(1, max_new_tokens=max_new_tokens)
        self.model, self.tokenizer, self.max_new_tokens = model, tokenizer, max_new_tokens
        self.name = name or getattr(model, "name_or_path", "") or type(model).__name__
        self._lock = threading.Lock()

    @classmethod
    def load(cls, name: str, *, device_map: str = "auto", **options) -> LocalChat:
        """Load a folder or a hub model in its own number format."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", device_map=device_map, use_safetensors=True)
        return cls(model, AutoTokenizer.from_pretrained(name), name=name, **options)

    @cached_property
    def identity(self) -> str:
        """Beside the name the sums of its weights: another model may have the same one."""
        sums = repr([weight.detach().float().sum().item() for weight in self.model.parameters()])
        return f"{self.name} {self.max_new_tokens} {hashlib.sha256(sums.encode()).hexdigest()}"

    def complete(self, messages: list[dict[str, str]]) -> Reply:
        """The reply to ``messages`` (role, content)."""
        import torch

        pad = self.tokenizer.eos_token_id
        greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "pad_token_id": pad}
        with self._lock, torch.inference_mode():
            prompt = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            ).to(self.model.device)
            out = self.model.generate(**prompt, **greedy, max_new_tokens=self.max_new_tokens)
        reply = out[0, prompt["input_ids"].shape[1] :]
        return Reply(self.tokenizer.decode(reply, skip_special_tokens=True), out.shape[1])
