"""A decoder behind a server: prompt ids in, ids and log-probabilities out, as vLLM and SGLang speak it.

    policy = load_policy("Qwen/Qwen2.5-7B-Instruct")            # what learns
    policy.sampler = served = Served("http://127.0.0.1:8000", model="Qwen/Qwen2.5-7B-Instruct")
    Trainer(policy, ..., callbacks=[served.push]).train()       # each step's adapter goes to the server

For rollouts alone no weights are needed here: ``ServedPolicy``. The ids are the sampled ones, nothing is encoded
again. The recorded log-probabilities are the server's: how far they are from the model that learns says ``drift``, and
the metric "ratio" of each step.

How the servers are started, so that these are the log-probabilities of the distribution that was sampled from:

    vllm serve MODEL --logprobs-mode processed_logprobs --enable-lora --max-lora-rank 16
        (with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True; the default mode leaves the temperature out)
    python -m sglang.launch_server --model-path MODEL --enable-lora --max-lora-rank 16 --lora-target-modules all
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import httpx
import torch

from ..records import Trajectory
from ..search.http import JsonClient, parse_url
from ..training.decoder import Written
from ..training.learner import Batch
from ..training.logits import micro_batches, token_logprobs_and_entropy
from ..training.policy import Policy, _stop_ids, check_model_folder, prompt_of, token_bytes


class ServedError(RuntimeError):
    """The server gave no usable answer; the step was not trained on."""


class ServedPolicy(Policy):
    """A policy whose weights are elsewhere: it reads and writes tokens, and has nothing to train.

    Args:
        tokenizer, prompt, thinking: see ``Policy``.
        sampler: what samples in its place.
    """

    def __init__(self, tokenizer, prompt: str = "", *, thinking: bool = False, sampler=None):
        from ..environment import protocol

        self.tokenizer, self.prompt, self.thinking = tokenizer, prompt or protocol.PROMPT, thinking
        self.stop_ids, self.sampler = _stop_ids(tokenizer, None), sampler
        self.token_bytes = token_bytes(tokenizer, len(tokenizer))

    @classmethod
    def load(cls, model: str | os.PathLike, **how) -> ServedPolicy:
        """Only the tokenizer of a folder or of a model on the hub, and the prompt that the model was taught with."""
        from transformers import AutoTokenizer

        check_model_folder(str(model))
        tokenizer = AutoTokenizer.from_pretrained(str(model), trust_remote_code=False)
        return cls(tokenizer, prompt_of(str(model)), **how)


def until_stop(policy: Policy, ids: list[int], stops: Sequence[bytes]) -> list[int]:
    """The ids up to the token in which the first stop string ends, for servers that know no stop strings.

    What a server sampled beyond it is dropped; what stays was sampled as if it had stopped there.
    """
    text, end = policy.bytes_of(ids), 0
    ends = [place + len(stop) for stop in stops if (place := text.find(stop)) >= 0]
    for number, i in enumerate(ids if ends else [], 1):
        end += len(policy.token_bytes[i])
        if end >= min(ends):
            return ids[:number]
    return ids


class Served:
    """A server that samples: ``policy.sampler = Served(url, model=...)``.

    Args:
        url: its address, without a path.
        model: the name by which the server knows the model; not asked for by SGLang.
        wire: "vllm" or "sglang".
        timeout: seconds for one turn of all rollouts.
        connections: rows under way at once; the server batches them.

    Raises:
        ValueError: an unknown wire, or an address that is none.
    """

    def __init__(self, url: str, *, model: str = "", wire: str = "vllm", timeout: float = 600, connections: int = 64):
        if wire not in _WIRES:
            raise ValueError(f"wire must be {' or '.join(_WIRES)}, got {wire!r}")
        self.url, self.model, self.wire, self.timeout = url.rstrip("/"), model, _WIRES[wire](), timeout
        how: dict[str, Any] = {"timeout": timeout, "retries": 2, "connections": connections, "error": ServedError}
        address = parse_url(self.url + self.wire.path, "http://127.0.0.1:8000")
        self.client = JsonClient(f"the server at {self.url}", address, **how)
        self.adapter = ""  # the name of the one that samples, "" for the bare model

    def __call__(self, policy: Policy, temperature: float, generator: torch.Generator | None) -> ServedDecoder:
        return ServedDecoder(self, policy, temperature, generator)

    def push(self, trainer, metrics: dict[str, Any] | None = None) -> None:
        """Give the server the trainer's adapter; a callback of ``Trainer``. The folder must be one that it can read.

        Raises:
            ServedError: the server refused it.
        """
        name = f"step-{trainer.step}-{time.time_ns()}"
        with tempfile.TemporaryDirectory() as folder:
            trainer.policy.save_adapter(folder)
            self._post(self.wire.load, {"lora_name": name, "lora_path": folder})
        if before := self.adapter:
            self._post(self.wire.unload, {"lora_name": before})
        self.adapter = name

    def _post(self, path: str, body: dict[str, Any]) -> None:
        """What is answered is JSON of SGLang and a plain word of vLLM."""
        try:
            answer = httpx.post(self.url + path, json=body, timeout=self.timeout)
        except httpx.HTTPError as e:
            raise ServedError(f"the server at {self.url} does not take an adapter: {e}") from None
        if not answer.is_success:
            raise ServedError(f"the server at {self.url} refused {path}: {answer.status_code} {answer.text[:300]}")


class ServedDecoder:
    """Writes behind rows of token ids by asking a server; a row's turns share its cache there.

    ``Written.entropy`` is the surprise of each drawn token, -log p: its mean is an unbiased estimate of the entropy,
    which a server does not tell.
    """

    def __init__(self, served: Served, policy: Policy, temperature: float, generator: torch.Generator | None):
        self.served, self.policy, self.temperature, self.generator = served, policy, temperature, generator

    def __enter__(self) -> ServedDecoder:
        return self

    def __exit__(self, *error) -> None:
        pass

    def fork(self, row: list[int], parent: list[int]) -> None:
        """The server finds in its cache by itself how ``row`` begins."""

    def write(self, rows: Sequence[list[int]], stops: Sequence[bytes], room: Sequence[int]) -> list[Written]:
        """See ``Decoder.write``; raises ServedError where the server fails or gives other than it was asked for."""
        where = self.generator.device if self.generator else None
        seeds = torch.randint(2**31, (len(rows),), generator=self.generator, device=where).tolist()
        how: dict[str, Any] = {
            "temperature": self.temperature,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        }
        how |= {"stop": [s.decode() for s in stops], "stop_token_ids": sorted(self.policy.stop_ids)}
        wire = self.served.wire
        name = self.served.adapter or self.served.model
        bodies = [wire.request(name, row, max(1, n), how, seed) for row, n, seed in zip(rows, room, seeds)]
        return self.served.client.ask_all([{"json": body} for body in bodies], self._read)

    def _read(self, answer: Any) -> Written:
        ids, logprobs = self.served.wire.read(answer)
        if not ids or len(ids) != len(logprobs) or not all(math.isfinite(x) for x in logprobs):
            raise ValueError(f"{len(ids)} ids and {len(logprobs)} log-probabilities")
        return Written(ids, logprobs, [-x for x in logprobs], ids[-1] in self.policy.stop_ids)


class _Vllm:
    """``POST /v1/completions``."""

    path, load, unload = "/v1/completions", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"

    def request(self, model: str, ids: list[int], room: int, how: dict[str, Any], seed: int) -> dict[str, Any]:
        asked = {"model": model, "prompt": ids, "max_tokens": room, "seed": seed, "logprobs": 0}
        # without the last one the text of a stop string is cut off, and some versions with it its tokens
        return asked | how | {"return_token_ids": True, "include_stop_str_in_output": True}

    def read(self, answer: Any) -> tuple[list[int], list[float]]:
        choice = answer["choices"][0]
        return choice["token_ids"], choice["logprobs"]["token_logprobs"]


class _Sglang:
    """``POST /generate``."""

    path, load, unload = "/generate", "/load_lora_adapter", "/unload_lora_adapter"

    def request(self, model: str, ids: list[int], room: int, how: dict[str, Any], seed: int) -> dict[str, Any]:
        sampling = how | {"max_new_tokens": room, "no_stop_trim": True, "sampling_seed": seed}
        adapter = {"lora_path": model} if model else {}
        return {"input_ids": ids, "sampling_params": sampling, "return_logprob": True, **adapter}

    def read(self, answer: Any) -> tuple[list[int], list[float]]:
        drawn = answer["meta_info"]["output_token_logprobs"]
        return [i for _, i, *_ in drawn], [x for x, *_ in drawn]


_WIRES: dict[str, type[_Vllm] | type[_Sglang]] = {"vllm": _Vllm, "sglang": _Sglang}


@torch.no_grad()
def drift(policy: Policy, trajectories: Sequence[Trajectory], temperature: float = 1.0) -> dict[str, float]:
    """How far the policy that learns is from what sampled, over the sampled tokens.

    Returns:
        "tokens"; "ratio", the mean importance ratio w = pi / mu; "worst", the largest |log w|; "kl", the k3 estimate
        of KL(mu || pi), mean of w - 1 - log w, in nats a token (Schulman, "Approximating KL divergence", 2020); and
        "ess", the effective share of the tokens, (sum w)^2 / (n sum w^2). On-policy: ratio 1, worst 0, kl 0, ess 1,
        but for rounding.
    """
    logs: list[float] = []
    for part in micro_batches(trajectories, 4096):
        batch = Batch.of(part, policy)
        hidden = policy.hidden(batch.ids, batch.readers, use_cache=False)[:, :-1]
        how = {"bias": policy.lm_head.bias, "mask": batch.sampled, "temperature": temperature}
        now, _ = token_logprobs_and_entropy(hidden, policy.lm_head.weight, batch.ids[:, 1:], **how)
        logs += (now - batch.column([t.logprobs for t in part]))[batch.sampled.bool()].tolist()
    ratios = [math.exp(x) for x in logs]
    worst, kl = max(map(abs, logs)), fmean(w - 1 - x for w, x in zip(ratios, logs))
    ess = sum(ratios) ** 2 / (len(ratios) * sum(w * w for w in ratios))
    return {"tokens": len(logs), "ratio": fmean(ratios), "worst": worst, "kl": kl, "ess": ess}
