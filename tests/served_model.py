"""A server of vLLM's and SGLang's wire format that samples with a real model of ours, for the tests of engines.

It is slow (one row at a time) and small (what ``engines.served`` and the engines ask for), but exact: ids are sampled
by our decoder, adapters are loaded from their folder, and stop strings and end tokens stand in what is returned.
"""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

from searchr1_lib.training.decoder import Decoder
from searchr1_lib.training.policy import load_policy


class Model:
    """The model behind the server. ``knows_stops`` False: it goes on past stop strings, as one without a tokenizer."""

    def __init__(self, folder: str, quantize: bool = True, knows_stops: bool = True):
        self.folder, self.how, self.knows_stops = folder, {"quantize": quantize}, knows_stops
        self.policy = load_policy(folder, lora=False, **self.how)
        self.adapters, self.lock = {}, threading.Lock()
        self.asked: list[dict] = []
        self.said: dict[tuple[str, ...], list[int]] = {}  # the ids of each conversation, by its messages

    def sample(self, name, ids, *, room, temperature, stop, seed=0):
        self.asked.append({"name": name, "temperature": temperature, "stop": stop, "room": room})
        policy = self.adapters.get(name, self.policy)
        generator = torch.Generator().manual_seed(seed)
        stops = [s.encode() for s in stop] if self.knows_stops else []
        with self.lock, Decoder(policy, temperature, generator) as decoder:
            (written,) = decoder.write([list(ids)], stops, [room])
        full = not written.ended and len(written.ids) == room
        return written, "length" if full else "stop"

    def completions(self, body):
        sampling = {name: body[name] for name in ("temperature", "stop", "seed")}
        written, reason = self.sample(body["model"], body["prompt"], room=body["max_tokens"], **sampling)
        assert body["return_token_ids"] and body["include_stop_str_in_output"] and body["logprobs"] == 0
        told = {"text": self.policy.decode(written.ids), "token_ids": written.ids, "finish_reason": reason}
        return {"choices": [told | {"logprobs": {"token_logprobs": written.logprobs}}]}

    def generate(self, body):
        s = body["sampling_params"]
        sampling = {"temperature": s["temperature"], "stop": s["stop"], "seed": s["sampling_seed"]}
        written, reason = self.sample(body.get("lora_path"), body["input_ids"], room=s["max_new_tokens"], **sampling)
        assert s["no_stop_trim"] and body["return_logprob"]
        drawn = [[x, i, None] for x, i in zip(written.logprobs, written.ids)]
        meta = {"output_token_logprobs": drawn, "finish_reason": {"type": reason}}
        return {"text": self.policy.decode(written.ids), "output_ids": written.ids, "meta_info": meta}

    def chat(self, body):
        """Greedy; later user messages go on in the same sequence, so that it is the one of our rollouts."""
        said = tuple(m["content"] for m in body["messages"])
        if len(said) == 1:
            ids = self.policy.encode(self.policy.chat(said[0]))
        else:
            ids = self.said[said[:-1]] + self.policy.encode(said[-1], split_special_tokens=True)
        written, reason = self.sample("", ids, room=body["max_tokens"], temperature=0.0, stop=body["stop"])
        text = self.policy.decode(written.ids)
        self.said[(*said, text)] = ids + written.ids
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": reason}
        used = {"prompt_tokens": len(ids), "completion_tokens": len(written.ids)}
        usage = used | {"total_tokens": sum(used.values())}
        head = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"]}
        return {**head, "choices": [choice], "usage": usage}

    def load(self, body):
        self.adapters[body["lora_name"]] = load_policy(self.folder, adapter=body["lora_path"], **self.how)
        return "Success"

    def unload(self, body):
        del self.adapters[body["lora_name"]]
        return "Success"

    def app(self) -> Starlette:
        paths = {"/v1/completions": self.completions, "/generate": self.generate, "/v1/chat/completions": self.chat}
        paths |= {f"{prefix}/load_lora_adapter": self.load for prefix in ("", "/v1")}
        paths |= {f"{prefix}/unload_lora_adapter": self.unload for prefix in ("", "/v1")}

        def endpoint(answer):
            async def respond(request: Request):
                said = await run_in_threadpool(answer, await request.json())
                return PlainTextResponse(said) if isinstance(said, str) else JSONResponse(said)

            return respond

        return Starlette(routes=[Route(path, endpoint(answer), methods=["POST"]) for path, answer in paths.items()])


@contextmanager
def serving(app):
    """Its address, for as long as it runs in a thread."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
