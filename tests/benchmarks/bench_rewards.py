"""Rewards: how long 10,000 trajectories take, and what semantic similarity costs above bare sentence-transformers.

python tests/benchmarks/bench_rewards.py
"""

from __future__ import annotations

import json
import random
import statistics
import time

from searchr1_lib.records import Passage, Question
from searchr1_lib.rewards import F1, Composite, ExactMatch, SearchR1Reward, SemanticSimilarity, handwritten, score
from searchr1_lib.search.encoders import EncoderError, load_encoder

WORDS = "river town born wrote Velmora Tarn Ashun lanterns 1821 founder novel the of mason letters market".split()


def trajectories(number: int, seed: int = 0) -> list:
    """Rollouts of one search and an answer, about 150 words each, as the recipes of the almanac make them."""
    rng = random.Random(seed)
    passages = [
        Passage(f"p{i}", " ".join(rng.choices(WORDS, k=3)), " ".join(rng.choices(WORDS, k=35))) for i in range(99)
    ]
    out = []
    for i in range(number):
        gold = [" ".join(rng.choices(WORDS, k=rng.randint(1, 3))) for _ in range(2)]
        answer = gold[0] if i % 2 else " ".join(rng.choices(WORDS, k=3))
        think = f"<think> I recall {' '.join(rng.choices(WORDS, k=12))}. </think>\n"
        turns = [
            (f"{think}<search> {gold[1]} </search>", rng.sample(passages, 3)),
            f"{think}<answer> {answer} </answer>",
        ]
        t = handwritten(Question(f"q{i}", "Which one?", gold), turns)
        for field in ("completion_ids", "mask", "logprobs", "tokens"):  # a token is about four characters, not one
            setattr(t, field, getattr(t, field)[::4])
        out.append(t)
    return out


def timed(f) -> tuple[float, float]:
    """Seconds by the wall clock, and of the processor (which a busy machine disturbs less)."""
    wall, cpu = time.perf_counter(), time.process_time()
    f()
    return time.perf_counter() - wall, time.process_time() - cpu


def seconds(f, runs: int = 5) -> tuple[float, float]:
    """The medians of ``timed`` over some runs."""
    wall, cpu = zip(*(timed(f) for _ in range(runs)))
    return statistics.median(wall), statistics.median(cpu)


def bench_answers() -> dict:
    ts = trajectories(10_000)
    both = Composite([(1.0, ExactMatch()), (1.0, F1())])
    wall, cpu = seconds(lambda: score(both, ts))
    default, _ = seconds(lambda: score(SearchR1Reward(), ts))
    return {"em_and_f1_of_10000_s": wall, "em_and_f1_of_10000_cpu_s": cpu, "default_reward_of_10000_s": default}


def bench_semantic() -> dict:
    """1,000 pairs of texts, all different; ours and the bare library in turn, on one loaded model."""
    rng = random.Random(1)
    pairs = [
        (f"{i} {' '.join(rng.choices(WORDS, k=6))}", f"gold {i} {' '.join(rng.choices(WORDS, k=6))}")
        for i in range(1000)
    ]
    encoder = load_encoder("all-MiniLM-L6-v2")

    def bare():
        a = encoder.model.encode([a for a, _ in pairs], batch_size=64, normalize_embeddings=True)
        b = encoder.model.encode([b for _, b in pairs], batch_size=64, normalize_embeddings=True)
        return (a * b).sum(1)

    bare()  # the first run of a model is slower
    theirs, ours = [], []
    for _ in range(3):
        theirs.append(timed(bare))
        ours.append(timed(lambda: SemanticSimilarity(encoder).similarities(pairs)))
    ratios = [[a / b for a, b in zip(*pair)] for pair in zip(ours, theirs)]
    reward = SemanticSimilarity(encoder)
    reward.similarities(pairs)
    return {
        "semantic_1000_pairs_s": statistics.median(wall for wall, _ in ours),
        "bare_sentence_transformers_s": statistics.median(wall for wall, _ in theirs),
        "semantic_over_bare": statistics.median(wall for wall, _ in ratios),
        "semantic_over_bare_cpu": statistics.median(cpu for _, cpu in ratios),
        "semantic_again_s": seconds(lambda: reward.similarities(pairs))[0],
    }


def main() -> dict:
    figures = bench_answers()
    try:
        figures |= bench_semantic()
    except EncoderError as e:
        print(f"semantic similarity not measured: {e}")
    print(json.dumps({k: round(v, 4) for k, v in figures.items()}, indent=1))
    return figures


if __name__ == "__main__":
    main()
