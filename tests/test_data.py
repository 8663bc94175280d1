"""Questions and corpora: every form, every schema error with its file, line and field."""

import gzip
import json
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1_lib.data import DataError, load_passages, load_questions, save_passages, save_questions
from searchr1_lib.records import Passage, Question

SAMPLES = Path(__file__).resolve().parents[2] / "shared" / "data"
QUESTION = {"id": "q1", "text": "Who?", "answers": ["Ada"]}


def write(path, *rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


def test_questions_come_back_as_saved(tmp_path):
    questions = [
        Question("a", "Who?", ["Ada", "A. L."], passages=["p1", "p2"], hops=2, known=False, source="almanac/bridge"),
        Question("b", "Où?", ["Köln"], known=True),
    ]
    save_questions(tmp_path / "deep" / "q.jsonl", questions)
    assert load_questions(tmp_path / "deep" / "q.jsonl") == questions
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["q.jsonl"]


words = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.builds(Passage, words, st.text(st.characters(codec="utf-8")), words), min_size=1,
                unique_by=lambda p: p.id))
def test_any_passage_comes_back_as_saved(tmp_path_factory, passages):
    path = tmp_path_factory.mktemp("p") / "p.jsonl"
    save_passages(path, passages)
    assert load_passages(path) == passages


def test_saving_is_whole_or_not_at_all(tmp_path):
    path = tmp_path / "p.jsonl"
    save_passages(path, [Passage("1", "", "old")])

    def broken():
        yield Passage("1", "", "new")
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError):
        save_passages(path, broken())
    assert load_passages(path) == [Passage("1", "", "old")] and len(list(tmp_path.iterdir())) == 1


def test_plain_form(tmp_path):
    path = write(tmp_path / "q.jsonl", {"id": 7, "question": "Who?", "answers": ["Ada"], "gold_ids": [1, "2"]})
    assert load_questions(path) == [Question("7", "Who?", ["Ada"], passages=["1", "2"], hops=2)]


def test_search_r1_corpus(tmp_path):
    path = tmp_path / "corpus.jsonl.gz"
    rows = [{"id": "0", "contents": '"Ada "the" Lovelace"\nA line.\nAnother.'}, {"id": "1", "contents": "no title"}]
    with gzip.open(path, "wt", encoding="utf-8") as f:
        f.writelines(json.dumps(r) + "\n" for r in rows)
    expected = [Passage("0", 'Ada "the" Lovelace', "A line.\nAnother."), Passage("1", "", "no title")]
    assert load_passages(path) == expected


def test_search_r1_questions_in_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    def row(source, index):
        return {
            "data_source": source,
            "prompt": [{"role": "user", "content": "Answer. Example: <answer> Paris </answer>. Question: Who?\n"}],
            "ability": "fact-reasoning",
            "reward_model": {"style": "rule", "ground_truth": {"target": ["Ada", "A. L."]}},
            "extra_info": {"split": "train", "index": index},
        }

    table = pyarrow.Table.from_pylist([row("nq", 0), row("hotpotqa", 0)])
    pyarrow.parquet.write_table(table, tmp_path / "q.parquet")
    first, second = load_questions(tmp_path / "q.parquet")
    assert first == Question("nq/train/0", "Who?", ["Ada", "A. L."], source="nq")
    assert second.id == "hotpotqa/train/0"  # ids of two data sets never meet
    assert len(load_questions(tmp_path / "q.parquet", limit=1)) == 1


@pytest.mark.parametrize("row, field", [
    ({"text": "Who?", "answers": ["Ada"]}, "'id' is missing"),
    ({"id": "q1", "answers": ["Ada"]}, "'text' is missing"),
    ({"id": "q1", "text": "Who?"}, "'answers' is missing"),
    (QUESTION | {"text": " "}, "'text' is empty"),
    (QUESTION | {"text": 3}, "'text': expected text, found int"),
    (QUESTION | {"answers": []}, "'answers': expected a list with at least one"),
    (QUESTION | {"answers": ["Ada", ""]}, "'answers' is empty"),
    (QUESTION | {"answers": [1]}, "'answers': expected text, found int"),
    (QUESTION | {"hops": 0}, "'hops': expected a whole number from 1"),
    (QUESTION | {"hops": True}, "'hops'"),
    (QUESTION | {"known": "yes"}, "'known': expected true, false or null"),
    (QUESTION | {"passages": "p1"}, "'passages': expected a list"),
    (QUESTION | {"id": 1.5}, "'id': expected text or a whole number"),
    (QUESTION | {"text": "\ud800"}, "'text': holds half a surrogate pair"),
    (QUESTION | {"id": "q0"}, "'id': 'q0' stood already in line 1"),
    ({"id": "x", "prompt": "Who?", "answers": ["Ada"]}, "'prompt': expected a list of messages"),
    ('{"id": "q1", "text', "not JSON"),
    ("[1]", "expected a JSON object, found list"),
    ("[" * 100_000, "not JSON"),
])
def test_a_broken_row_is_named_and_skipped_only_on_request(tmp_path, row, field):
    path = write(tmp_path / "q.jsonl", QUESTION | {"id": "q0"}, "", row, QUESTION | {"id": "q2"})
    with pytest.raises(DataError) as e:
        load_questions(path)
    assert f"{path}, line 3: " in str(e.value) and field in str(e.value)
    with pytest.warns(UserWarning, match="1 broken row.*line 3"):
        assert [q.id for q in load_questions(path, on_error="skip")] == ["q0", "q2"]


@pytest.mark.parametrize("row, field", [
    ({"id": "p"}, "'text' is missing"),
    ({"id": "p", "title": 3, "text": "x"}, "'title': expected text"),
    ({"id": "p", "contents": ["x"]}, "'contents': expected text, found list"),
])
def test_broken_passages(tmp_path, row, field):
    with pytest.raises(DataError, match=field):
        load_passages(write(tmp_path / "p.jsonl", row))


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(b'{"id": "1", "text": "\xff"}\n')
    with pytest.raises(DataError, match="line 1: not JSON"):
        load_passages(tmp_path / "p.jsonl")


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file.*hub:owner/name"):
        load_questions(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="holds no rows"):
        load_questions(write(tmp_path / "empty.jsonl"))
    with pytest.raises(DataError, match="expected a .jsonl"):
        load_questions(write(tmp_path / "q.csv", "a,b"))
    with pytest.raises(DataError, match="not a readable Parquet"):
        load_questions(write(tmp_path / "q.parquet", "PAR1 no"))
    (tmp_path / "q.jsonl.gz").write_bytes(gzip.compress(b'{"id": 1}\n' * 999)[:-12])
    with pytest.raises(DataError, match="the compressed file is broken|line 1"):
        load_questions(tmp_path / "q.jsonl.gz", on_error="skip")
    with pytest.raises(ValueError, match="on_error"):
        load_questions(tmp_path / "q.jsonl.gz", on_error="ignore")


def test_the_hub_is_streamed_with_a_limit(tmp_path, monkeypatch):
    """The hub's client reads a local data folder exactly as it reads the hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write(tmp_path / "train.jsonl", *({"id": str(i), "question": "Who?", "golden_answers": ["Ada"]} for i in range(9)))
    got = load_questions(f"hub:{tmp_path}", limit=4)
    assert [asdict(q)["id"] for q in got] == list("0123")
    with pytest.raises(ValueError, match="give limit="):
        load_questions(f"hub:{tmp_path}")
    with pytest.raises(DataError, match="cannot stream split 'test' from the hub"):
        load_questions(f"hub:{tmp_path}", split="test", limit=4)


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="the samples in ../shared are not here")
def test_shared_samples():
    for name, passages in (("hotpotqa_train100", 994), ("musique_train100", 1890)):
        assert len(load_passages(SAMPLES / name / "corpus.jsonl")) == passages
        questions = load_questions(SAMPLES / name / "questions.jsonl")
        assert len(questions) == 100 and all(q.passages for q in questions)


def test_the_almanac():
    folder = Path(__file__).resolve().parents[1] / "data" / "almanac"
    ids = {p.id for p in load_passages(folder / "passages.jsonl")}
    for split in ("train", "validation", "test"):
        assert all(set(q.passages) <= ids for q in load_questions(folder / f"{split}.jsonl"))
