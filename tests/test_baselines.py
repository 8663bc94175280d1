"""The baselines on the tiny Qwen with few questions: what each may do, what it keeps, what the table counts."""

import json
import re
import shutil
from dataclasses import replace

import pytest

from searchr1_lib.data import load_passages, load_questions
from searchr1_lib.records import Question, SearchCall, Trajectory
from searchr1_lib.rewards import Discounted, handwritten
from searchr1_lib.search import BM25Search
from searchr1_lib.study import baselines
from searchr1_lib.study.baselines import Setup, answer_with, cheapest_right, demonstrations, fine_tune, group_of
from searchr1_lib.study.compare import UNKNOWN_PAYS, skill_of
from searchr1_lib.study.regret import Yardstick
from searchr1_lib.suite import cli
from searchr1_lib.training.policy import load_policy
from searchr1_lib.worlds.almanac import world_of
from searchr1_lib.worlds.optimum import Skill

SHORT = {"max_turn_tokens": 60, "topk": 2}
SMALL = Setup(questions=4, train_questions=4, steps=1, num_generations=4, epochs=1, topk=2, max_turn_tokens=60)


@pytest.fixture(scope="module")
def policy():
    return load_policy()


@pytest.fixture(scope="module")
def engine():
    return BM25Search(load_passages("data/almanac/passages.jsonl"))


@pytest.fixture(scope="module")
def questions():
    """Two that are surely remembered, and two each of one and two hops of which nothing is."""
    test = load_questions("data/almanac/test.jsonl")
    whole = [q for q in test if len(q.passages) == q.hops]
    return [q for kind in ("1-hop/6", "1-hop/0", "2-hop/00") for q in [q for q in whole if q.source.endswith(kind)][:2]]


def consistent(t):
    assert len(t.completion_ids) == len(t.mask) == len(t.logprobs) == len(t.tokens)
    assert t.turns == t.segments[-1].turn + 1
    for s in t.segments:  # a tag that rollout put into the model's mouth has mask 0 inside the model's segment
        assert 0 <= s.start < s.end <= len(t.mask)
        assert s.by_model or not any(t.mask[s.start : s.end])


def test_direct_never_searches_and_always_search_always_does(policy, engine, questions):
    direct = answer_with("direct", policy, questions, engine, **SHORT)
    assert not any(r["searches"] for r in direct.rows) and all(r["answer"] for r in direct.rows)
    always = answer_with("always-search", policy, questions, engine, **SHORT)
    assert all(r["searches"] for r in always.rows)


def test_rag_searches_once_with_the_question_and_pays_for_it(policy, engine, questions):
    report = answer_with("rag", policy, questions, engine, reward=Discounted(0.3, 0.1), **SHORT)
    for q, t in zip(questions, report.trajectories):
        assert t.question is q and [c.argument for c in t.searches] == [q.text] and len(t.searches[0].result) == 2
        assert t.segments[0].kind == "information" and q.text in t.segments[0].text
        consistent(t)
        assert t.reward == pytest.approx(0.1 if t.answer == "unknown" else baselines.row_of(t)["em"] * (1 - 0.3))
        assert policy.decode(t.completion_ids) == t.text  # what is recorded is what was read and written


def test_ircot_searches_with_thoughts_until_it_answers(policy, engine):
    asked = load_questions("data/almanac/test.jsonl")[:16]  # at temperature 1 each decision of the model is a coin
    report = answer_with("ircot", policy, asked, engine, max_turns=3, temperature=1.0, **SHORT)
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


@pytest.fixture(scope="module")
def yardstick():
    return Yardstick(world_of("data/almanac", "a test"), skill_of("data/tiny_qwen"), 0.3, UNKNOWN_PAYS)


def walked(t, text, engine, topk):
    """A demonstration as the rollout that it shows: its acts, with what the engine returns."""
    acts = re.findall(r"<(search|answer)> (.*?) </", text)
    calls = [SearchCall(words, engine.search(words, k=topk)) for act, words in acts if act == "search"]
    return Trajectory(t.question, [], [], [], [], calls=calls, answer=acts[-1][1], segments=[])


@pytest.mark.parametrize("price", [0.05, 0.3, 0.7])
def test_demonstrations_do_what_the_optimum_does(policy, engine, yardstick, price):
    train, yardstick = load_questions("data/almanac/train.jsonl")[:60], replace(yardstick, price=price)
    made = demonstrations(policy, train, yardstick, engine, topk=3)
    assert sorted(t.question.id for t in made) == sorted(q.id for q in train)
    for t in made:
        written = policy.decode([i for i, m in zip(t.completion_ids, t.mask) if m])
        assert "<information>" not in written and written.count("<answer>") == 1
        assert sum(d.regret for d in yardstick.decisions(walked(t, written, engine, 3))) < 1e-9, written


def test_dearer_searches_and_poorer_readers_search_less(policy, engine, yardstick):
    train, reads = load_questions("data/almanac/train.jsonl")[:100], Skill((0.9, 0.5), (0.4, 0.1), 0.95)

    def searches(**how):
        made = demonstrations(policy, train, replace(yardstick, **{"skill": reads} | how), engine)
        return sum(policy.decode(t.completion_ids).count("</search>") for t in made) / len(made)

    usual = searches()
    assert searches(price=0.05) > usual > searches(price=0.7) > 0
    assert usual > searches(skill=replace(reads, read=0.3)) > 0


def test_nobody_can_demonstrate_what_is_not_of_the_almanac(policy, engine, yardstick, tmp_path, capsys):
    with pytest.raises(ValueError, match="'q1' is not of this almanac"):
        demonstrations(policy, [Question("q1", "?", ["x"])], yardstick, engine)
    data = tmp_path / "data"
    shutil.copytree("data/almanac", data)
    (data / "almanac.json").unlink()
    flags = ["--methods", "sft", "--data", str(data), "--out", str(tmp_path / "out")]
    assert cli.main(["baselines", *flags]) == 2
    assert "the method sft needs an almanac" in capsys.readouterr().err


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
    load_policy().save_adapter(tmp_path / "adapter")
    setup = SMALL.model_copy(update={"adapter": str(tmp_path / "adapter")})
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in vars(setup).items()]
    flags += ["--methods", *SOME]
    tmp_path /= "out"
    assert cli.main(["baselines", "--out", str(tmp_path), *flags]) == 0
    page = (tmp_path / "baselines.md").read_text()
    assert "| grpo | all | 4 |" in page and "grpo against rejection: exact match" in page
    assert "| untrained | known |" in page and "| rejection | 16 |" in page
    results = {m: json.loads((tmp_path / f"{m}.json").read_text()) for m in SOME}
    rows = {(r["method"], r["group"]): r for r in baselines.table(results)}
    assert rows["no-search", "all"]["searches"] == 0 < rows["rag", "all"]["searches"] == 1
    assert all(r["seconds"] > 0 and r["tokens"] > 0 and 0 <= r["em"] <= r["f1"] <= 1 for r in rows.values())
    assert results["no-search"]["training"]["rollouts"] == 64 and results["sft"]["training"]["examples"] == 4
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
    "--search-cost=1.5 --max-turn-tokens=0 --seed=-1 --adapter=nowhere".split(),
)
def test_numbers_that_cannot_be_are_refused_before_any_work(tmp_path, flag, capsys):
    assert cli.main(["baselines", "--out", str(tmp_path / "out"), flag]) == 2
    name = flag[2:].split("=")[0].replace("-", "_")
    assert capsys.readouterr().err.startswith(f"error: {name} must be") and not (tmp_path / "out").exists()


def test_a_folder_of_others_is_refused_before_any_work(tmp_path, capsys):
    for name, text, said in (
        ("direct.json", "{}", "direct.json was made with another"),
        ("notes.md", "mine", "notes.md, "),
    ):
        out = tmp_path / name
        out.mkdir()
        (out / name).write_text(text)
        assert cli.main(["baselines", "--out", str(out), "--methods", "direct"]) == 2
        assert said in capsys.readouterr().err and [(p.name, p.read_text()) for p in out.iterdir()] == [(name, text)]
    with pytest.raises(ValueError, match="one folder or one in the other"):
        baselines.compare(["direct"], SMALL, "data/almanac/results")


def test_a_result_of_other_questions_is_not_taken_for_that_of_these(tmp_path):
    data = tmp_path / "data"
    shutil.copytree("data/almanac", data)
    setup = SMALL.model_copy(update={"data": str(data), "questions": 1})
    first = baselines.compare(["direct"], setup, tmp_path / "out")
    assert baselines.compare(["direct"], setup, tmp_path / "out") == first
    lines = (data / "test.jsonl").read_text().splitlines(keepends=True)
    (data / "test.jsonl").write_text("".join(lines[1:]))
    with pytest.raises(ValueError, match="direct.json was made with another files in data: choose another folder"):
        baselines.compare(["direct"], setup, tmp_path / "out")


def test_groups():
    assert group_of(Question("q", "?", [], known=True, hops=2)) == "known"
    assert (
        group_of(Question("q", "?", [], known=False, hops=2, source="almanac/comparison/00")) == "look-up, comparison"
    )
    assert group_of(Question("q", "?", [], known=False, hops=3, source="almanac/3-hop/500")) == "look-up, 3 hops"
    assert group_of(Question("q", "?", [])) == "1 hop"
