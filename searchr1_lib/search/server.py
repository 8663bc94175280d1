"""Serves an engine over HTTP in the wire format of Search-R1's retrieval servers.

    searchr1 serve --index data/almanac --workers 4

``POST /retrieve`` takes ``{"queries": [str], "topk": int, "return_scores": bool}`` and gives ``{"result":
[[{"document": {"id", "contents"}, "score": float}]]}``, or without scores the bare documents; ``GET /health``
says which engine answers. It listens on the loopback interface unless another host is wanted for: it has no
password, so whoever reaches it can search. Needs the extra ``server``.
"""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..environment.base import _as_hits
from ..environment.limits import Count
from ..records import Hit
from .base import Engine, SearchError
from .local import LocalSearch

MAX_BYTES = 1 << 20  # of a request's body
MAX_QUERIES = 1024  # in a request
MAX_TOPK = 100


class _Refused(Exception):
    """A request that is not answered: the HTTP status and what is wrong with it."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def make_app(engine: Engine) -> Starlette:
    """The ASGI application that serves ``engine``; it refuses bodies over ``MAX_BYTES`` with status 413."""

    async def retrieve(request: Request) -> Response:
        try:
            wanted = _parse(await _body(request))
            batch = await run_in_threadpool(engine.search_batch, wanted["queries"], wanted["topk"])
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        except _Refused as e:
            return JSONResponse({"error": str(e)}, e.status)
        except SearchError as e:
            return JSONResponse({"error": f"the engine could not answer: {e}"}, 502)
        result = [[_document(hit, wanted["return_scores"]) for hit in _as_hits(found, MAX_TOPK)] for found in batch]
        return Response(json.dumps({"result": result}), media_type="application/json")

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok", "engine": engine.name})

    return Starlette(routes=[Route("/retrieve", retrieve, methods=["POST"]), Route("/health", health)])


def app_of_environment() -> Starlette:
    """What each of several workers serves. Arrays and passages of an index are mapped, so they share the memory."""
    return make_app(LocalSearch(os.environ["SEARCHR1_INDEX"]))


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BYTES:
            raise _Refused(413, f"the body is larger than {MAX_BYTES} bytes; send fewer queries at once")
    return bytes(body)


def _parse(body: bytes) -> dict[str, Any]:
    try:
        wanted = json.loads(body)
    except (ValueError, RecursionError):
        raise _Refused(400, "the body is not JSON") from None
    if not isinstance(wanted, dict):
        raise _Refused(422, "the body is not a JSON object")
    wanted = {"topk": 3, "return_scores": False} | {name: v for name, v in wanted.items() if v is not None}
    queries, topk = wanted.get("queries"), wanted["topk"]
    if not isinstance(queries, list) or not all(isinstance(q, str) for q in queries):
        raise _Refused(422, "queries: expected a list of texts")
    if len(queries) > MAX_QUERIES:
        raise _Refused(422, f"queries: at most {MAX_QUERIES} in a request, not {len(queries)}")
    if isinstance(topk, bool) or not isinstance(topk, int) or not 1 <= topk <= MAX_TOPK:
        raise _Refused(422, f"topk: expected a whole number from 1 to {MAX_TOPK}")
    if not isinstance(wanted["return_scores"], bool):
        raise _Refused(422, "return_scores: expected true or false")
    return wanted


def _document(hit: Hit, with_score: bool) -> dict[str, Any]:
    title = " ".join(hit.passage.title.splitlines())  # the first line break parts title and text
    document = {"id": hit.passage.id, "contents": f'"{title}"\n{hit.passage.text}'}
    return {"document": document, "score": hit.score} if with_score else document


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--index", required=True, help="a folder that LocalSearch can open")
    parser.add_argument("--host", default="127.0.0.1", help="another host lets others search (no password)")
    parser.add_argument("--port", type=int, default=8000, help="default: 8000")
    parser.add_argument("--workers", type=Count, default=1, help="processes that answer (default: 1)")


def run(args: argparse.Namespace) -> None:
    """Open the index and serve it until interrupted."""
    import uvicorn

    if not 0 < args.port < 65536:
        raise ValueError(f"--port: expected a number from 1 to 65535, not {args.port}")
    engine = LocalSearch(args.index)
    print(f"{engine.name} at http://{args.host}:{args.port}/retrieve (Ctrl+C ends it)", flush=True)
    os.environ["SEARCHR1_INDEX"] = args.index
    app: Any = make_app(engine) if args.workers == 1 else f"{__name__}:{app_of_environment.__name__}"
    how = {"host": args.host, "port": args.port, "log_level": "warning", "access_log": False}
    uvicorn.run(app, factory=args.workers > 1, workers=args.workers, **how)
