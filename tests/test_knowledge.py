"""What a model knows, measured: against the almanac, where it is known, and by hand."""

from statistics import fmean

import pytest

from searchr1_lib.data import load_questions, save_passages, save_questions
from searchr1_lib.records import Question
from searchr1_lib.search.bm25 import BM25Search
from searchr1_lib.study.knowledge import Knowledge, measure_knowledge
from searchr1_lib.suite.cli import main
from searchr1_lib.training.policy import load_policy


def test_the_best_policy_is_told_each_chance():
    chances = {"a": 0.9, "b": 0.5, "c": 0.0, "d": 0.5}
    known = Knowledge(chances, dict.fromkeys(chances), dict.fromkeys("abc", 0.75) | {"d": 0.0})
    questions = [Question(id, "?", ["x"]) for id in "abcd"]
    assert [q.known for q in known.judged(questions, 0.2)] == [True, False, False, True]  # a search earns 0.6, or 0
    assert known.earns(0.2) == {k: pytest.approx(v) for k, v in {"best": 0.65, "always": 0.45, "never": 0.475}.items()}


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory):
    """Questions of one hop that the tiny Qwen is certain of, or of which it recalls nothing."""
    out = tmp_path_factory.mktemp("data")
    save_passages(out / "passages.jsonl", world.passages)
    for split in ("train", "validation", "test"):
        of = [q for q in world.questions[split] if q.passages]
        save_questions(
            out / f"{split}.jsonl",
            [q for level in (0, 6) for q in [q for q in of if q.source == f"almanac/1-hop/{level}"][:8]],
        )
    return out


def test_of_what_it_is_certain_it_knows_most_and_of_blanks_nothing(folder, world):
    questions, engine = load_questions(folder / "train.jsonl"), BM25Search(world.passages)
    known = measure_knowledge(load_policy("data/tiny_qwen"), questions, engine, samples=2, max_turn_tokens=110)
    share = lambda level: fmean(known.at_once[q.id] for q in questions if q.source.endswith(level))
    assert share("/6") > share("/0") + 0.3 and share("/0") < 0.2
    assert len(after := {*known.searched.values()}) == 1 and 0.2 < max(after) <= 1  # they are of one kind
    assert all(0 <= sure <= 1 for sure in known.sure.values() if sure is not None)


def test_the_folder_that_it_writes_says_what_is_known(folder, tmp_path, capsys):
    out = tmp_path / "known"
    command = ["knowledge", "--model", "data/tiny_qwen", "--data", str(folder), "--out", str(out), "--samples", "2"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "almanac: 48 questions" in said and "best 0." in said
    before, after = (load_questions(place / "test.jsonl") for place in (folder, out))
    assert [q.id for q in after] == [q.id for q in before]
    assert fmean(q.known for q in after if q.source.endswith("/6")) > 0.3
    assert not any(q.known for q in after if q.source.endswith("/0"))
    assert main([*command[:4], str(out), "--out", str(out)]) == 2  # not in place of what it reads
