"""Replay on other engines and policies, trajectories as Parquet and Dataset, and the replay buffer."""

import random
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1_lib.data import load_questions
from searchr1_lib.files import TrajectoryLog
from searchr1_lib.records import Hit, Passage, Question, SearchCall, Segment, Trajectory
from searchr1_lib.rewards import handwritten
from searchr1_lib.search import BM25Search
from searchr1_lib.study.replay import replay
from searchr1_lib.study.tables import arrow_schema, from_row, read_parquet, to_dataset, to_parquet
from searchr1_lib.training.buffer import ReplayBuffer
from searchr1_lib.training.policy import load_policy
from searchr1_lib.training.rollout import rollout

TINY_QWEN = Path(__file__).resolve().parents[1] / "data" / "tiny_qwen"
WORDS = "river town born wrote Velmora Tarn Ashun lanterns founder novel mason letters market".split()
PASSAGES = [
    Passage(f"p{i}", f"{WORDS[i]} {WORDS[i - 1]}", " ".join(random.Random(i).choices(WORDS, k=12))) for i in range(13)
]
QUESTIONS = [load_questions(TINY_QWEN.parent / "almanac" / "test.jsonl", limit=1)[0], Question("b", "Who?", ["x"])]


@pytest.fixture(scope="module")
def engine():
    return BM25Search(PASSAGES)


@pytest.fixture(scope="module")
def policy():
    return load_policy(TINY_QWEN, quantize=False, lora=False)


@pytest.fixture(scope="module")
def other():
    changed = load_policy(TINY_QWEN, quantize=False)
    torch.manual_seed(0)
    for p in changed.parameters():
        p.data.add_(torch.randn_like(p) * 0.05)
    return changed


def recorded(engine, *queries: str, id: str = "q") -> Trajectory:
    """What a rollout with these queries on ``engine`` records."""
    turns = [(f"<search> {q} </search>", [h.passage for h in engine.search(q, k=3)]) for q in queries]
    return handwritten(Question(id, "Who?", ["x"]), [*turns, "<answer> x </answer>"])


# ---- another engine --------------------------------------------------------------------------------------


def test_the_same_engine_parts_nowhere(engine):
    ts = [recorded(engine, "river town"), recorded(engine, "Tarn", "no such word", "novel mason"), recorded(engine)]
    report = replay(ts, engine=engine, batch_size=2)
    assert [len(r.searches) for r in report.rows] == [1, 3, 0]
    assert [r.search_parts for r in report.rows] == [None] * 3
    table = report.table()
    assert table["searches"] == 4 and table["same_observation"] == table["shared_documents"] == 1.0
    assert table["tokens"] == 0 and table["logprob"] is None


@given(st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=3), min_size=1, max_size=4), st.integers(0, 12))
def test_without_a_passage_it_parts_where_that_was_first_found(queries, gone):
    full, less = BM25Search(PASSAGES), [p for p in PASSAGES if p.id != f"p{gone}"]
    t = recorded(full, *map(" ".join, queries))

    class Less:  # the same ranking, one passage missing and the next one in its place
        def search(self, query, k=3):
            return [h for h in full.search(query, k=4) if h.passage in less][:k]

    held = [any(h.passage.id == f"p{gone}" for h in call.result) for call in t.searches]
    (row,) = replay([t], engine=Less(), topk=3).rows
    assert row.search_parts == (held.index(True) if any(held) else None)
    assert row.trajectory is t and [c.argument for c in row.searches] == [c.argument for c in t.searches]


def test_scores_and_ids_do_not_part_texts_and_order_do(engine):
    t = recorded(engine, "river town mason")

    class Changed:
        def __init__(self, change):
            self.change = change

        def search_batch(self, queries, k=3):
            return [self.change(hits) for hits in engine.search_batch(queries, k=k)]

    def parts(change):
        return replay([t], engine=Changed(change)).rows[0].search_parts

    assert parts(lambda hits: [Hit(replace(h.passage, id="other"), h.score + 9) for h in hits]) is None
    assert parts(lambda hits: hits[::-1]) == 0
    assert parts(lambda hits: hits[:2]) == 0
    assert parts(lambda hits: [*hits[:2], Hit(replace(hits[2].passage, text="new"), 0.0)]) == 0


def test_a_failing_engine_is_reported_not_raised(engine):
    class Broken:
        def search(self, query):
            raise ConnectionError("no route")

    report = replay([recorded(engine, "river", "Tarn", id="q7"), recorded(engine)], engine=Broken())
    assert report.table()["failed"] == 2 and report.table()["parted_at_search"] == 1
    assert "q7, search 1, rank 1: 'river'" in str(report) and "ConnectionError" in str(report)
    failed = replace(recorded(engine, "river"), calls=[SearchCall("river", [], 0.1, "an older error")])
    assert replay([failed], engine=Broken()).rows[0].search_parts is None


def test_the_report_is_short_and_harmless(engine):
    ts = [recorded(engine, "river\x1b[31m " + "town " * 50, id=f"q{i}") for i in range(9)]
    text = str(replay(ts, engine=BM25Search(PASSAGES[:3])))
    assert "rank" in str(replay([ts[0]] * 3, engine=BM25Search(PASSAGES[:3]))).splitlines()[2]
    assert str(replay([ts[0]] * 3, engine=BM25Search(PASSAGES[:3]))).endswith("(3 times)")
    assert "… and 4 more" in text and "\x1b" not in text and max(map(len, text.splitlines())) < 250
    assert str(replay([], engine=engine)) == "0 trajectories replayed"


def test_the_report_can_be_printed_and_is_linear(engine):
    def replayed(size):
        class Long:
            def search_batch(self, queries, k=3):
                return [[Passage(str(i), "", f"{i} \ud800" * size) for i in range(k)] for _ in queries]

        t = recorded(engine, "river")
        t.question.id, t.calls[0].argument = "\x1b[31m\ud800" * size, "x\ud800" * size
        started = time.process_time()
        report = replay([t], engine=Long())
        text, table = str(report), report.table()
        assert "\x1b" not in text and len(text.encode()) < 1000 and table["shared_documents"] == 0.0
        return time.process_time() - started

    assert min(replayed(200_000) for _ in range(3)) < 3 * min(replayed(100_000) for _ in range(3)) + 0.05


# ---- another policy --------------------------------------------------------------------------------------


def greedy(policy, engine, number=1):
    return rollout(policy, QUESTIONS, engine, num_generations=number, temperature=0, max_turns=2, max_turn_tokens=30)


def test_a_policy_repeats_its_own_greedy_record(policy, engine):
    report = replay(greedy(policy, engine), policy=policy, temperature=0)
    for row in report.rows:
        assert row.token_parts is None and row.instead == ""
        assert row.logprobs == pytest.approx(row.trajectory.logprobs, abs=1e-4)
    assert report.table()["kl"] == pytest.approx(0, abs=1e-4) and report.table()["same_choice"] == 1.0


def test_another_policy_parts_where_its_own_greedy_rollout_does(policy, other, engine):
    before, after = greedy(policy, engine), greedy(other, engine)
    report = replay(before, policy=other)
    for row, t in zip(report.rows, after):
        pairs = enumerate(zip(row.trajectory.completion_ids, t.completion_ids))
        first = next((i for i, (a, b) in pairs if a != b), None)
        assert row.token_parts == first
        assert row.instead == ("" if first is None else other.tokenizer.decode([t.completion_ids[first]]))
    assert report.table()["parted_at_token"] > 0 and "likelier is" in str(report)


@pytest.mark.parametrize("temperature, batch_size", [(1.0, 1), (0.7, 5)])
def test_log_probabilities_are_those_of_a_plain_forward(policy, other, engine, temperature, batch_size):
    ts = rollout(
        policy,
        QUESTIONS,
        engine,
        num_generations=3,
        temperature=temperature,
        max_turns=2,
        max_turn_tokens=20,
        generator=torch.Generator().manual_seed(1),
    )
    assert any(0 in t.mask for t in ts)
    for row in replay(ts, policy=other, temperature=temperature, batch_size=batch_size).rows:
        t = row.trajectory
        with torch.no_grad():
            logits = other.model(input_ids=torch.tensor([t.prompt_ids + t.completion_ids])).logits[0]
        logits = logits[len(t.prompt_ids) - 1 : -1] / temperature
        plain = torch.log_softmax(logits, -1).gather(1, torch.tensor(t.completion_ids)[:, None])[:, 0].tolist()
        assert row.logprobs == pytest.approx([p * m for p, m in zip(plain, t.mask)], abs=1e-4)
        assert row.choices == [int(c) if m else None for c, m in zip(logits.argmax(-1), t.mask)]


def test_the_kl_per_token_is_k3_and_the_viewer_colours_by_it(policy, other, engine):
    from searchr1_lib.study.viewer import render_html
    from searchr1_lib.training.grpo import policy_loss

    ts = rollout(
        policy,
        QUESTIONS,
        engine,
        num_generations=2,
        max_turns=1,
        max_turn_tokens=20,
        generator=torch.Generator().manual_seed(3),
        first_action="search",
    )
    for row in replay(ts, policy=other).rows:
        t = row.trajectory
        old, new, mask = (torch.tensor([x]) for x in (t.logprobs, row.logprobs, t.mask))
        metrics = policy_loss(old, old, torch.zeros(1), mask, beta=1.0, ref_logprobs=new, kl_estimator="k3")[1]
        assert sum(row.kl) / sum(t.mask) == pytest.approx(float(metrics["kl"]), rel=1e-4)
        assert len(row.kl) == len(t.mask) and min(row.kl) >= 0.0 < max(row.kl)
        assert not any(k for k, m in zip(row.kl, t.mask) if not m)
        t.token_values["kl"] = row.kl
        assert "Colour: kl" in render_html([t], color="kl")
    assert replay(ts, engine=engine).rows[0].kl == []


def test_a_record_of_another_tokenizer_is_refused(policy, engine):
    (t, _) = greedy(policy, engine)
    for foreign in (
        replace(t, prompt_ids=t.prompt_ids[1:]),
        replace(t, completion_ids=[10**6] * len(t.mask)),
        recorded(engine, "river"),
    ):
        with pytest.raises(ValueError, match="another tokenizer"):
            replay([foreign], policy=policy)


@pytest.mark.parametrize(
    "wrong, name",
    [
        ({}, "engine, a policy"),
        ({"batch_size": 0}, "batch_size"),
        ({"temperature": -1}, "temperature"),
        ({"topk": 0}, "topk"),
        ({"topk": 1.5}, "topk"),
        ({"batch_size": True}, "batch_size"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"search_timeout": 0}, "search_timeout"),
        ({"search_timeout": float("nan")}, "search_timeout"),
    ],
)
def test_impossible_parameters_of_replay_are_named(engine, wrong, name):
    with pytest.raises(ValueError, match=name):
        replay([], **({"engine": engine} | wrong if wrong else {}))


# ---- tables ----------------------------------------------------------------------------------------------

TEXT, NUMBER, COUNT = st.text(st.characters(exclude_categories=["Cs"])), st.floats(allow_nan=False), st.integers(0, 99)
TEXTS, PASSAGE = st.lists(TEXT), st.builds(Passage, TEXT, TEXT, TEXT)
ASKED = st.builds(Question, TEXT, TEXT, TEXTS, passages=TEXTS, hops=COUNT, known=st.none() | st.booleans(), source=TEXT)
CALL = st.builds(SearchCall, TEXT, st.lists(st.builds(Hit, PASSAGE, NUMBER)), NUMBER, st.none() | TEXT)
TRAJECTORIES = COUNT.map(lambda n: n % 5).flatmap(
    lambda n: st.builds(
        Trajectory,
        question=ASKED,
        prompt_ids=st.lists(st.integers(0, 2**31)),
        completion_ids=st.just([7] * n),
        mask=st.just([1] * n),
        logprobs=st.lists(NUMBER, min_size=n, max_size=n),
        segments=st.lists(st.builds(Segment, TEXT, TEXT, TEXT, COUNT, COUNT, COUNT)),
        calls=st.lists(CALL),
        answer=st.none() | TEXT,
        reward=st.none() | NUMBER,
        rewards=st.dictionaries(TEXT, NUMBER),
        turn_rewards=st.lists(NUMBER),
        advantages=st.lists(NUMBER),
        group=TEXT,
        prompt=TEXT,
        tokens=TEXTS,
        step=st.none() | COUNT,
        token_values=st.dictionaries(TEXT, st.lists(NUMBER, min_size=n, max_size=n)),
    )
)


@settings(max_examples=25)
@given(st.lists(TRAJECTORIES, max_size=3))
def test_a_trajectory_comes_back_equal_from_parquet_and_dataset(tmp_path_factory, trajectories):
    log = TrajectoryLog(tmp_path_factory.mktemp("log") / "log.jsonl")
    log.append(trajectories)
    to_parquet(log, log.path.with_suffix(".parquet"))
    assert read_parquet(log.path.with_suffix(".parquet")) == trajectories
    assert [from_row(row) for row in to_dataset(log)] == trajectories


def test_columns_are_typed_even_where_all_is_empty(tmp_path):
    import pyarrow.parquet as pq

    log = TrajectoryLog(tmp_path / "log.jsonl")
    log.append([])
    to_parquet(log, tmp_path / "log.parquet")
    schema = pq.read_schema(tmp_path / "log.parquet")
    assert schema.remove_metadata() == arrow_schema() and "null" not in str(schema.types)
    assert len(to_dataset(log)) == 0 and set(to_dataset(log).features) == set(Trajectory.__dataclass_fields__)


def test_parquet_is_written_whole_or_not_at_all(tmp_path, engine):
    log, target = TrajectoryLog(tmp_path / "log.jsonl"), tmp_path / "log.parquet"
    log.append([recorded(engine, "river")] * 300)
    to_parquet(log, target)
    before = target.read_bytes()
    lines = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(b"".join(lines[:-1]) + b"{}\n")  # the last row is none: after the first part was written
    with pytest.raises(ValueError, match="line 300"):
        to_parquet(log, target)
    assert target.read_bytes() == before and len(list(tmp_path.iterdir())) == 2


def test_other_files_than_ours_are_named(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pytest.raises(FileNotFoundError):
        read_parquet(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("not Parquet")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    pq.write_table(pa.table({"rewards": [[]], "token_values": [[]], "surprise": [1]}), tmp_path / "newer.parquet")
    for name, why in [("text", "row 1"), ("other", "row 1: not a trajectory"), ("newer", "surprise")]:
        with pytest.raises(ValueError, match=rf"{name}\.parquet, .*{why}"):
            read_parquet(tmp_path / f"{name}.parquet")


# ---- the buffer ------------------------------------------------------------------------------------------


def made(step, reward=0.0, advantage=0.0):
    return Trajectory(
        Question(f"{step}", "?", ["x"]), [], [0], [1], [0.0], step=step, reward=reward, advantages=[advantage]
    )


def test_capacity_and_age_drop_the_oldest():
    buffer = ReplayBuffer(5, max_age=2)
    buffer.add(made(i) for i in range(20))
    assert [t.step for t in buffer] == [17, 18, 19] and len(buffer) == 3
    buffer.add([made(19), made(19), made(19)])
    assert [t.step for t in buffer] == [18, 19, 19, 19, 19]
    buffer.add([])
    assert len(buffer) == 5


def test_a_buffer_fills_from_a_log(tmp_path):
    log = TrajectoryLog(tmp_path / "log.jsonl")
    log.append([made(i) for i in range(9)])
    buffer = ReplayBuffer(4)
    buffer.add(log)
    assert list(buffer) == log.read()[5:]


@pytest.mark.parametrize("by", ["uniform", "reward", "advantage"])
def test_the_same_seed_draws_the_same_and_never_one_twice(by):
    def draws(seed):
        buffer = ReplayBuffer(50, by=by, seed=seed)
        buffer.add([made(i, reward=i % 3, advantage=i % 5 - 2) for i in range(50)])
        return [[t.step for t in buffer.sample(n)] for n in (7, 50, 0)]

    first = draws(0)
    assert first == draws(0) != draws(1)
    assert len(set(first[0])) == 7 and sorted(first[1]) == list(range(50)) and first[2] == []


@pytest.mark.parametrize(
    "by, weights", [("uniform", [1, 1, 1, 1]), ("reward", [0, 0.5, 1, 1.5]), ("advantage", [1, 0.5, 0, 0.5])]
)
def test_draws_follow_the_weights(by, weights):
    buffer = ReplayBuffer(4, by=by)
    buffer.add([made(i, reward=i / 2 - 0.5, advantage=1 - i / 2) for i in range(4)])
    seen = Counter(buffer.sample(1)[0].step for _ in range(4000))
    for i, w in enumerate(weights):
        assert seen[i] / 4000 == pytest.approx(w / sum(weights), abs=0.03)
        assert w or not seen[i]


def test_equal_rewards_draw_uniformly():
    buffer = ReplayBuffer(4, by="reward")
    buffer.add([made(i, reward=1.0) for i in range(4)])
    seen = Counter(buffer.sample(1)[0].step for _ in range(4000))
    assert all(abs(n / 4000 - 0.25) < 0.03 for n in seen.values()) and len(seen) == 4


def test_groups_come_whole_and_only_those_that_weigh_something():
    buffer = ReplayBuffer(100, by="advantage")
    groups = {"a": (1.0, -1.0), "b": (0.0, 0.0), "c": (0.2, -0.3)}
    buffer.add(replace(made(0, advantage=a), group=name) for name, both in groups.items() for a in both)
    drawn = [[t.group for t in buffer.sample_groups(1, random.Random(i))] for i in range(2000)]
    assert all(names in (["a", "a"], ["c", "c"]) for names in drawn)
    assert drawn.count(["a", "a"]) / 2000 == pytest.approx(2 / 2.5, abs=0.03)
    assert sorted(t.group for t in buffer.sample_groups(9, random.Random(0))) == ["a", "a", "c", "c"]
    assert buffer.sample_groups(0, random.Random(0)) == [] == ReplayBuffer(3).sample_groups(2, random.Random(0))


def test_the_buffer_names_what_is_wrong():
    bad = {
        "capacity": (0, 1.5, None),
        "max_age": (-1, 0.5, float("nan")),
        "by": ("luck", None),
        "seed": (None, -1, 1.5),
    }
    for wrong, name in [({name: value}, name) for name, values in bad.items() for value in values]:
        with pytest.raises(ValueError, match=name):
            ReplayBuffer(**({"capacity": 3} | wrong))
    buffer = ReplayBuffer(3, by="reward", max_age=1)
    for lacking in ("reward", "step"):
        with pytest.raises(ValueError, match=f"no {lacking}"):
            buffer.add([made(0), replace(made(1), **{lacking: None})])
    assert len(buffer) == 0
    with pytest.raises(ValueError, match="cannot draw 1 of the 0"):
        buffer.sample(1)
    for size in (-1, 0.5, float("nan"), True):
        with pytest.raises(ValueError, match="^size "):
            buffer.sample(size)
