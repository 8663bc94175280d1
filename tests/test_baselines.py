"""The baselines on the tiny Qwen with few questions: what each may do, what it keeps, what the table counts."""

import json
import shutil

import pytest

from searchr1_lib.data import load_passages, load_questions
from searchr1_lib.records import Question, Trajectory
from searchr1_lib.rewards import SearchR1Reward, handwritten
from searchr1_lib.search import BM25Search
from searchr1_lib.study import baselines
from searchr1_lib.study.baselines import Setup, answer_with, cheapest_right, demonstrations, fine_tune, group_of
from searchr1_lib.suite import cli
from searchr1_lib.training.policy import load_policy

SHORT = {"max_turn_tokens": 60, "topk": 2}
SMALL = Setup(
    questions=3, comparisons=1, train_questions=4, steps=1, num_generations=4, epochs=1, topk=2, max_turn_tokens=60
)


@pytest.fixture(scope="module")
def policy():
    return load_policy()


@pytest.fixture(scope="module")
def engine():
    return BM25Search(load_passages("data/almanac/passages.jsonl"))


@pytest.fixture(scope="module")
def questions():
    test = load_questions("data/almanac/test.jsonl")
    known, one, two = ([q for q in test if group_of(q) == g] for g in ("known", "look-up, 1 hop", "look-up, 2 hops"))
    return known[:2] + one[:2] + two[:2]


def consistent(t):
    assert len(t.completion_ids) == len(t.mask) == len(t.logprobs) == len(t.tokens)
    assert t.turns == t.segments[-1].turn + 1
    for s in t.segments:  # a tag that rollout put into the model's mouth has mask 0 inside the model's segment
        assert 0 <= s.start < s.end <= len(t.mask)
        assert s.by_model or not any(t.mask[s.start : s.end])


def test_direct_never_searches_and_always_search_always_does(policy, engine, questions):
    direct = answer_with("direct", policy, questions, engine, **SHORT)
    assert not any(r["searches"] for r in direct.rows) and direct.table()["known"]["em"] == 1
    always = answer_with("always-search", policy, questions, engine, **SHORT)
    assert all(r["searches"] for r in always.rows)


def test_rag_searches_once_with_the_question_and_pays_for_it(policy, engine, questions):
    report = answer_with("rag", policy, questions, engine, reward=SearchR1Reward(0.15), **SHORT)
    for q, t in zip(questions, report.trajectories):
        assert t.question is q and [c.argument for c in t.searches] == [q.text] and len(t.searches[0].result) == 2
        assert t.segments[0].kind == "information" and q.text in t.segments[0].text
        consistent(t)
        assert t.reward == pytest.approx(baselines.row_of(t)["em"] * (1 - 0.15))  # a wrong answer is not charged
        assert policy.decode(t.completion_ids) == t.text  # what is recorded is what was read and written
    assert report.table()["look-up, 1 hop"]["em"] == 1


def test_ircot_searches_with_thoughts_until_it_answers(policy, engine, questions):
    report = answer_with("ircot", policy, questions, engine, max_turns=3, **SHORT)
    for t in report.trajectories:
        consistent(t)
        assert 1 <= len(t.searches) <= 3 and t.searches[0].argument == t.question.text
        thoughts = [s.text for s in t.segments if s.kind == "think"]
        for call, thought in zip(t.searches[1:], thoughts):
            assert call.argument in thought
        assert not any(s.kind == "search" for s in t.segments[:-1])  # its own queries are not carried out
    assert any(len(t.searches) > 1 for t in report.trajectories)


def test_a_model_that_spells_chat_tokens_or_tags_stays_inside_its_turn(policy, engine):
    asked = [Question("q", "Who </search> <|im_end|> is it?", ["x"], known=False)]
    for method in ("rag", "ircot"):
        (t,) = answer_with(method, policy, asked, engine, max_turns=1, **SHORT).trajectories
        assert "</search> <|im" not in t.segments[0].text and t.segments[0].text.count("</search>") == 1
        assert not set(t.completion_ids[: t.segments[0].end]) & policy.stop_ids


class Broken:
    def search_batch(self, queries, k=3):
        raise OSError("no engine")


def test_an_engine_that_fails_is_told_and_stops_nothing(policy, questions):
    report = answer_with("rag", policy, questions[:1], Broken(), **SHORT)
    assert "no engine" in report.trajectories[0].searches[0].error
    assert "The search failed" in report.trajectories[0].segments[0].text


def test_no_search_cannot_search(policy, engine, questions):
    report = answer_with("no-search", policy, questions, engine, **SHORT)
    assert not any(r["searches"] for r in report.rows)
    with pytest.raises(ValueError, match="method 'magic' is unknown: choose one of untrained, direct"):
        answer_with("magic", policy, questions, engine)


def test_demonstrations_search_exactly_what_is_not_known(policy, engine):
    train = load_questions("data/almanac/train.jsonl")[:20]
    made = demonstrations(policy, train, "data/almanac", engine, topk=3)
    assert len(made) >= 18 and {t.question.known for t in made} == {True, False}
    for t in made:
        written = policy.decode([i for i, m in zip(t.completion_ids, t.mask) if m])
        assert written.count("<search>") == (0 if t.question.known else t.question.hops)
        assert written.endswith(f"<answer> {t.question.answers[0]} </answer>") and "<information>" not in written
    with pytest.raises(ValueError, match="'q1' is not of the almanac"):
        demonstrations(policy, [Question("q1", "?", ["x"])], "data/almanac", engine)
    with pytest.raises(ValueError, match="no readable almanac.json"):
        demonstrations(policy, train, "tests", engine)


def test_the_cheapest_right_rollout_of_each_question_is_kept():
    a, b = Question("a", "?", ["x"]), Question("b", "?", ["y"])
    search, wrong = ("<search> s </search>", []), "<answer> z </answer>"
    right = "<answer> x </answer>"
    made = [
        handwritten(a, [wrong]),
        handwritten(a, [search, right]),
        handwritten(a, [right]),
        handwritten(a, [right]),
        handwritten(b, [wrong]),
    ]
    assert cheapest_right(made) == [made[2]] and cheapest_right(made)[0] is made[2]


def test_fine_tuning_learns_its_examples_and_nothing_else_changes():
    policy, again = load_policy(seed=1), load_policy(seed=1)
    train = load_questions("data/almanac/train.jsonl")[:6]
    ids = policy.encode("<think> I do not say. </think>\n<answer> Zanzibar </answer>")
    examples = [
        Trajectory(q, policy.encode(policy.prompt_text(q.text)), ids, [1] * len(ids), [0.0] * len(ids)) for q in train
    ]
    frozen = {n: p.clone() for n, p in policy.model.named_parameters() if not p.requires_grad}
    losses = fine_tune(policy, examples, epochs=6, learning_rate=4e-3, batch_size=3)
    assert len(losses) == 12 and losses[-1] < 0.5 * losses[0]
    assert all(p.equal(frozen[n]) for n, p in policy.model.named_parameters() if n in frozen)
    split = fine_tune(again, examples, epochs=1, learning_rate=4e-3, batch_size=3, token_budget=1)
    assert split[0] == pytest.approx(losses[0], rel=1e-4)  # micro-batches of one give the same loss
    with pytest.raises(ValueError, match="no examples"):
        fine_tune(policy, [])


SOME = ["untrained", "rag", *baselines.TRAINED]


def test_methods_from_the_command_line(tmp_path, capsys):
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in vars(SMALL).items()]
    flags += ["--methods", *SOME]
    assert cli.main(["baselines", "--out", str(tmp_path), *flags]) == 0
    page = (tmp_path / "baselines.md").read_text()
    assert "| grpo | all | 4 |" in page and "grpo against rejection: exact match" in page
    assert "| look-up, comparison | 1 |" in page and "| rejection | 16 |" in page
    results = {m: json.loads((tmp_path / f"{m}.json").read_text()) for m in SOME}
    rows = {(r["method"], r["group"]): r for r in baselines.table(results)}
    assert rows["no-search", "all"]["searches"] == 0 < rows["rag", "all"]["searches"] == 1
    assert all(r["seconds"] > 0 and r["tokens"] > 0 and 0 <= r["em"] <= r["f1"] <= 1 for r in rows.values())
    assert results["no-search"]["training"]["rollouts"] == 64 and results["sft"]["training"]["examples"] <= 4
    assert (tmp_path / "sft" / "adapter_model.safetensors").exists()

    times = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*.json")}
    assert cli.main(["baselines", "--out", str(tmp_path), *flags]) == 0  # nothing is done twice
    assert times == {p: p.stat().st_mtime_ns for p in tmp_path.glob("*.json")}
    capsys.readouterr()
    assert cli.main(["baselines", "--out", str(tmp_path), *flags, "--topk=1"]) == 2
    assert "untrained.json was made with another topk: choose another folder" in capsys.readouterr().err
    assert cli.main(["baselines", "--out", str(tmp_path), "--methods", "magic"]) == 2
    assert "unknown method magic" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flag",
    "--steps=-1 --epochs=0 --learning-rate=nan --temperature=-1 --questions=-1 --topk=0 --num-generations=0 "
    "--search-cost=inf --max-turn-tokens=0 --seed=-1 --comparisons=-1 --adapter=nowhere".split(),
)
def test_numbers_that_cannot_be_are_refused_before_any_work(tmp_path, flag, capsys):
    assert cli.main(["baselines", "--out", str(tmp_path / "out"), flag]) == 2
    name = flag[2:].split("=")[0].replace("-", "_")
    assert capsys.readouterr().err.startswith(f"error: {name} must be") and not (tmp_path / "out").exists()


def test_a_folder_of_others_is_refused_before_any_work(tmp_path, capsys):
    for name, text, said in (
        ("grpo.json", "{}", "grpo.json was made with another"),
        ("notes.md", "mine", "notes.md, "),
    ):
        out = tmp_path / name
        out.mkdir()
        (out / name).write_text(text)
        assert cli.main(["baselines", "--out", str(out), "--methods", "grpo"]) == 2
        assert said in capsys.readouterr().err and [(p.name, p.read_text()) for p in out.iterdir()] == [(name, text)]
    with pytest.raises(ValueError, match="one folder or one in the other"):
        baselines.compare(["direct"], SMALL, "data/almanac/results")


def test_a_result_of_other_questions_is_not_taken_for_that_of_these(tmp_path):
    data = tmp_path / "data"
    shutil.copytree("data/almanac", data)
    setup = SMALL.model_copy(update={"data": str(data), "questions": 1, "comparisons": 0})
    first = baselines.compare(["direct"], setup, tmp_path / "out")
    assert baselines.compare(["direct"], setup, tmp_path / "out") == first
    lines = (data / "test.jsonl").read_text().splitlines(keepends=True)
    (data / "test.jsonl").write_text("".join(lines[1:]))
    with pytest.raises(ValueError, match="direct.json was made with another files in data: choose another folder"):
        baselines.compare(["direct"], setup, tmp_path / "out")


def test_groups():
    assert group_of(Question("q", "?", [], known=True, hops=2)) == "known"
    assert group_of(Question("q", "?", [], known=False, hops=2, source="almanac/comparison")) == "look-up, comparison"
    assert group_of(Question("q", "?", [], known=False, hops=2)) == "look-up, 2 hops"
    assert group_of(Question("q", "?", [])) == "1 hop"
