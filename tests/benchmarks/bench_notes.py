"""A memory of many notes whose vectors are given: writing, opening and recalling, on one core.

    OMP_NUM_THREADS=1 taskset -c 0 python tests/benchmarks/bench_notes.py [--notes 100000]

Asked: 1,000 notes written a second, a recall under 5 ms at the median.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time

import numpy as np

from searchr1_lib.records import Note, Passage
from searchr1_lib.search.memory import MemoryStore

DIMENSION = 384


class Given:
    """Names the encoder whose vectors are given; it is never asked."""

    name, dimension = "given", DIMENSION


def main(argv: list[str] | None = None) -> dict:
    """Prints and returns the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--notes", type=int, default=100_000)
    args = parser.parse_args(argv)
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(1000, DIMENSION))  # sentences come in clusters
    vectors = (centres[rng.integers(1000, size=args.notes)] + 0.7 * rng.normal(size=(args.notes, DIMENSION))).astype(
        "f4"
    )
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    notes = [Note(Passage(f"p{i}", f"title {i}", f"This is what note {i} says."), time=i) for i in range(args.notes)]
    with tempfile.TemporaryDirectory() as folder:
        store = MemoryStore(folder, Given())
        started = time.perf_counter()
        for i in range(0, args.notes, 1000):
            store.add(notes[i : i + 1000], vectors[i : i + 1000])
        written = time.perf_counter() - started
        store.add(notes[:100], vectors[:100])  # which makes a hundred older ones be left out
        started = time.perf_counter()
        store.nearest(vectors[:1], 3)
        opened = time.perf_counter() - started
        seconds, hits = [], 0
        for i in rng.integers(args.notes, size=500):
            started = time.perf_counter()
            ((found,),) = store.nearest(vectors[i : i + 1], 1)
            seconds.append(time.perf_counter() - started)
            hits += found[0].passage.id == f"p{i}"
    figures = {
        "notes": args.notes,
        "written a second": args.notes / written,
        "s to build the graph": opened,
        "ms a recall, median": 1000 * statistics.median(seconds),
        "ms a recall, p95": 1000 * sorted(seconds)[len(seconds) * 95 // 100],
        "finds itself": hits / len(seconds),
    }
    print(json.dumps(figures, indent=1))
    return figures


if __name__ == "__main__":
    main()
