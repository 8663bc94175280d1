"""Models that a reward may ask: OpenAI-compatible endpoints, hosted or local, and local transformers models.

A chat model is anything with ``name`` and ``complete(messages) -> Reply``; an encoder is anything with
``encode(texts, normalize=True) -> (N, d) array``. API keys come from the environment, are sent over https or
to this machine only, follow no redirect, and stand in no message of ours.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

_RETRY_STATUS = {408, 409, 425, 429, 500, 502, 503, 504}
_LONGEST_WAIT = 30.0


class EndpointError(RuntimeError):
    """An endpoint gave no usable reply; the message names its address and what happened."""


@dataclass(frozen=True)
class Reply:
    """What a chat model said, and the tokens it was billed for (prompt and reply)."""

    text: str
    tokens: int


class _Endpoint:
    """Posts JSON below a base address, with a timeout, retries and the key of an environment variable."""

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key_env: str = "OPENAI_API_KEY",
        timeout: float = 60.0,
        retries: int = 3,
        wait: float = 0.5,
    ):
        import httpx

        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"endpoint url must start with http:// or https://, not {url!r}")
        if parts.username or parts.password:
            raise ValueError("endpoint url must not hold a password; put the key into an environment variable")
        here = parts.hostname in ("127.0.0.1", "localhost", "::1")
        if os.environ.get(key_env) and parts.scheme == "http" and not here:
            raise ValueError(f"the key in {key_env} would travel unencrypted to {parts.hostname}: use https")
        self.url, self.model, self.name = url.rstrip("/"), model, model
        self.key_env, self.retries, self.wait = key_env, retries, wait
        # no redirects: one would carry the key to another host; no proxy for this machine
        self._client = httpx.Client(timeout=timeout, follow_redirects=False, trust_env=not here)

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        """The reply as JSON; tried ``1 + retries`` times where trying again can help."""
        import httpx

        key = os.environ.get(self.key_env)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        for attempt in range(self.retries + 1):
            pause = self.wait * 2**attempt
            try:
                reply = self._client.post(self.url + path, json=body, headers=headers)
                if reply.is_success:
                    return reply.json()
                problem = f"HTTP {reply.status_code}"
                if reply.status_code not in _RETRY_STATUS:
                    break
                asked = reply.headers.get("Retry-After", "")
                pause = max(pause, float(asked)) if asked.isdigit() else pause
            except (httpx.TransportError, ValueError) as e:  # no connection, a timeout, or a reply that is not JSON
                problem = f"{type(e).__name__}: {e}"
            if attempt < self.retries:
                time.sleep(min(pause, _LONGEST_WAIT))
        raise EndpointError(f"{self.url}{path} (model {self.model!r}): {problem}")


class ChatEndpoint(_Endpoint):
    """An OpenAI-compatible chat endpoint.

    Args:
        url: base address, for example "http://127.0.0.1:8000/v1".
        model: name of the model there.
        key_env: environment variable that holds the key; none is sent where it is not set.
        timeout: seconds a request may take; retries: further tries after a failure that may pass (the wait
            doubles, from ``wait`` seconds on, and a Retry-After header is honoured).
        body: what the request holds beside model and messages.
    """

    def __init__(self, url: str, model: str, *, body: dict[str, Any] | None = None, **connection):
        super().__init__(url, model, **connection)
        self.body = {"temperature": 0, "max_tokens": 256} if body is None else body

    def complete(self, messages: list[dict[str, str]]) -> Reply:
        """The reply to ``messages`` (role, content).

        Raises:
            EndpointError: no reply, or one without text.
        """
        got = self._post("/chat/completions", {"model": self.model, "messages": messages, **self.body})
        try:
            text = got["choices"][0]["message"]["content"]
            used = (got.get("usage") or {}).get("total_tokens")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise EndpointError(f"{self.url}: the reply is not that of a chat endpoint") from None
        if not isinstance(text, str):
            raise EndpointError(f"{self.url}: the reply holds no text")
        # an endpoint that does not count is taken to use a token per four characters
        return Reply(text, used if isinstance(used, int) else (len(json.dumps(messages)) + len(text)) // 4)


class EmbeddingsEndpoint(_Endpoint):
    """An OpenAI-compatible embeddings endpoint, as an encoder. Arguments as for ``ChatEndpoint``."""

    def encode(self, texts: Sequence[str], normalize: bool = True, batch_size: int = 128):
        """Vectors of ``texts`` as a float32 array (N, d), of unit length if ``normalize``.

        Raises:
            EndpointError: no reply, or one that does not hold a vector for every text.
        """
        import numpy as np

        if not len(texts):
            return np.zeros((0, 0), dtype=np.float32)
        rows: list = []
        for i in range(0, len(texts), batch_size):
            part = list(texts[i : i + batch_size])
            got = self._post("/embeddings", {"model": self.model, "input": part})
            try:
                found = {item["index"]: item["embedding"] for item in got["data"]}
                rows += [found[j] for j in range(len(part))]
            except (KeyError, TypeError):
                raise EndpointError(f"{self.url}: the reply does not hold a vector for every text") from None
        try:
            vectors = np.asarray(rows, dtype=np.float32).reshape(len(rows), -1)
        except ValueError:
            raise EndpointError(f"{self.url}: the vectors differ in length") from None
        if normalize:
            vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return vectors


class LocalChat:
    """A transformers model with a chat template (a Qwen, for example), answering greedily, one call at a time."""

    def __init__(self, model, tokenizer, *, name: str = "", max_new_tokens: int = 128):
        self.model, self.tokenizer, self.max_new_tokens = model, tokenizer, max_new_tokens
        self.name = name or getattr(model, "name_or_path", "") or type(model).__name__
        self._lock = threading.Lock()

    @classmethod
    def load(cls, name: str, *, device_map: str = "auto", **options) -> LocalChat:
        """Load a folder or a hub model in its own number format."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", device_map=device_map, use_safetensors=True)
        return cls(model, AutoTokenizer.from_pretrained(name), name=name, **options)

    def complete(self, messages: list[dict[str, str]]) -> Reply:
        """The reply to ``messages`` (role, content)."""
        import torch

        with self._lock, torch.inference_mode():
            prompt = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            ).to(self.model.device)
            out = self.model.generate(
                **prompt,
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=self.tokenizer.eos_token_id,
            )
        reply = out[0, prompt["input_ids"].shape[1] :]
        return Reply(self.tokenizer.decode(reply, skip_special_tokens=True), out.shape[1])
