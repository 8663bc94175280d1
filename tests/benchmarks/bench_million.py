"""Large corpora: dense indexes from a thousand to a million vectors, several workers over one index, wiki-18's layout.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_million.py [--sizes 1000 10000] [--parts dense workers wiki]

Lexical engines and what becomes of a policy are in experiments/corpus.py. The vectors are drawn as in bench_search.py,
and 64 passages are encoded to say how long all would take. Every index is built in a process of its own, and is
memory-mapped where it is searched, on one thread. *wiki* writes passages of a hundred words in the layout of
wiki-18 (a line of JSON each, the first line of "contents" the title), reads them and builds BM25 over them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor, wait
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from bench_search import draw, free_port, start_server

from searchr1_lib.data import load_passages
from searchr1_lib.search import BM25Search, RemoteSearch
from searchr1_lib.search.dense import _parameters, _set_parameters, build_index
from searchr1_lib.search.encoders import MINILM, load_encoder
from searchr1_lib.worlds.almanac import build_world, further_passages

KINDS = {"Flat": "Flat", "HNSW": "HNSW32", "IVF-PQ": "IVF,PQ"}
QUERIES = 256


def peak_gib() -> float:
    """Of this process."""
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmHWM:") + 1]) / 2**20


def apart(function, *arguments):
    """In a process of its own, so that its peak memory is its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def timed(search, queries) -> dict[str, float]:
    """Milliseconds of a call of ``search`` with one query."""
    times = []
    for query in queries:
        begun = time.perf_counter()
        search(query)
        times.append(1000 * (time.perf_counter() - begun))
    return {"median_ms": float(np.median(times)), "p95_ms": float(np.quantile(times, 0.95))}


def build_dense(kind: str, vectors: Path, file: Path) -> dict[str, float]:
    import faiss

    faiss.omp_set_num_threads(1)
    begun = time.perf_counter()
    index = build_index(np.load(vectors, mmap_mode="r"), KINDS[kind])
    seconds = time.perf_counter() - begun
    faiss.write_index(index, str(file))
    return {"build_s": seconds, "mb": file.stat().st_size / 1e6, "peak_gib": peak_gib()}


def search_dense(kind: str, file: Path, queries: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
    import faiss

    faiss.omp_set_num_threads(1)
    index = faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC)
    _set_parameters(index, _parameters(KINDS[kind]))
    found = index.search(queries, 3)[1]
    told = timed(lambda query: index.search(query[None], 3), queries)
    begun = time.perf_counter()
    for start in range(0, len(queries), 64):
        index.search(queries[start : start + 64], 3)
    batch = 1000 * (time.perf_counter() - begun) * 64 / len(queries)
    return found, told | {"batch_ms": batch, "searching_gib": peak_gib()}


def bench_dense(sizes: list[int], home: Path) -> None:
    passages = build_world(0).passages[:64]
    encoder = load_encoder(MINILM)
    encoder.encode([p.text for p in passages])
    begun = time.perf_counter()
    encoder.encode([f"{p.title}\n{p.text}" for p in passages])
    each = (time.perf_counter() - begun) / len(passages)
    print(json.dumps({"encoded_ms_a_passage": 1000 * each, "hours_for_a_million": each * 1e6 / 3600}), flush=True)
    for size in sizes:
        rng = np.random.default_rng(0)
        vectors = np.concatenate([draw(rng, min(50_000, size - start)) for start in range(0, size, 50_000)])
        near = 0.8 * vectors[rng.choice(size, QUERIES, replace=False)] + 0.6 * draw(rng, QUERIES)
        queries = (near / np.linalg.norm(near, axis=1, keepdims=True)).astype(np.float32)
        np.save(home / "vectors.npy", vectors)
        del vectors
        exact = None
        for kind in KINDS:
            row = {"size": size, "kind": kind} | apart(build_dense, kind, home / "vectors.npy", home / "index")
            found, told = apart(search_dense, kind, home / "index", queries)
            exact = found if exact is None else exact
            row["recall_at_3"] = float(np.mean([len({*a} & {*b}) / 3 for a, b in zip(exact, found)]))
            print(json.dumps(row | told), flush=True)


def rate(folder: Path, workers: int, queries: list[str], callers: int = 64, each: int = 25) -> float:
    """Queries a second, one a call, of 64 callers; four processes call, so that they are not what is measured."""
    port, processes = free_port(), get_context("spawn")
    server = start_server(port, folder, workers)
    try:
        url = f"http://127.0.0.1:{port}/retrieve"
        RemoteSearch(url, timeout=60, retries=12).search(queries[0])  # waits until it runs
        with ProcessPoolExecutor(4, mp_context=processes, initializer=processes.Barrier(4).wait) as pool:
            wait([pool.submit(int) for _ in range(4)])  # all four have started: that is not what is measured
            begun = time.perf_counter()
            done = [pool.submit(call, url, queries, callers // 4, each) for _ in range(4)]
            wrong = sum(one.result() for one in done)
            taken = time.perf_counter() - begun
    finally:
        server.terminate()
        server.wait()
    assert not wrong, f"{wrong} calls failed"
    return callers * each / taken


def call(url: str, queries: list[str], callers: int, each: int) -> int:
    """How many calls of so many threads brought nothing."""
    remote, empty = RemoteSearch(url, timeout=120), []

    def ask(n: int) -> None:
        empty.extend(i for i in range(each) if not remote.search(queries[(n * each + i) % len(queries)]))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(empty)


def bench_workers(size: int, home: Path) -> None:
    world = build_world(0)
    BM25Search([*world.passages, *islice(further_passages(world), size - len(world.passages))]).save(home / "bm25")
    queries = [q.text for q in world.questions["train"]]
    for workers in (1, 2):
        print(json.dumps({"size": size, "workers": workers, "queries_a_second": rate(home / "bm25", workers, queries)}))


def write_wiki(size: int, file: Path) -> None:
    """Passages of about a hundred words, as those of wiki-18: one of the almanac's kind, eight of ten thousand more."""
    passages, rng = further_passages(build_world(0)), random.Random(0)
    others = [p.text for p in islice(passages, 10_000)]
    with file.open("w", encoding="utf-8") as out:
        for number, p in enumerate(islice(passages, size)):
            text = " ".join([p.text, *rng.choices(others, k=8)])
            out.write(json.dumps({"id": str(number), "contents": f'"{p.title}"\n{text}'}) + "\n")


def build_wiki(file: Path, folder: Path) -> dict[str, float]:
    begun = time.perf_counter()
    passages = load_passages(file)
    read = time.perf_counter()
    BM25Search(passages).save(folder)
    built = time.perf_counter() - read
    size = sum(part.stat().st_size for part in folder.rglob("*") if part.is_file())
    return {"read_s": read - begun, "build_s": built, "mb": size / 1e6, "peak_gib": peak_gib()}


def search_wiki(folder: Path) -> dict[str, float]:
    world = build_world(0)
    queries = [q.text for q in world.questions["train"][:200]]
    engine = BM25Search.load(folder)
    return timed(lambda query: engine.search(query, 3), queries) | {"searching_gib": peak_gib()}


def bench_wiki(size: int, home: Path) -> None:
    file = home / "wiki.jsonl"
    write_wiki(size, file)
    row = {"size": size, "jsonl_mb": file.stat().st_size / 1e6} | apart(build_wiki, file, home / "wiki")
    print(json.dumps(row | apart(search_wiki, home / "wiki")), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000])
    parser.add_argument(
        "--parts", nargs="+", choices=("dense", "workers", "wiki"), default=["dense", "workers", "wiki"]
    )
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as home:
        if "dense" in args.parts:
            bench_dense(args.sizes, Path(home))
        if "workers" in args.parts:
            bench_workers(max(args.sizes), Path(home))
        if "wiki" in args.parts:
            bench_wiki(max(args.sizes), Path(home))


if __name__ == "__main__":
    main()
