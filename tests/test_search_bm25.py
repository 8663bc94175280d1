"""BM25Search and LocalSearch: against the formula, the bare library and the published figures; bad folders."""

import json
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1_lib.data import load_passages, load_questions, save_passages
from searchr1_lib.records import Passage, Question
from searchr1_lib.search import BM25Search, CachedSearch, IndexFolderError, LocalSearch, SQLiteSearch, measure
from searchr1_lib.search.base import best

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ROOT.parent / "shared" / "data"
PASSAGES = load_passages(ROOT / "data" / "almanac" / "passages.jsonl")
QUERIES = [q.text for q in load_questions(ROOT / "data" / "almanac" / "test.jsonl", limit=64)]
SMALL = [
    Passage("a", "Velmora", "A town on the Nava."),
    Passage("b", "Nava", "A river."),
    Passage("c", "Nava", "A river."),
]


@pytest.fixture(scope="module")
def engine():
    return BM25Search(PASSAGES)


def words(text):
    from bm25s.stopwords import STOPWORDS_EN

    return [w for w in re.findall(r"\w\w+", text.lower()) if w not in STOPWORDS_EN]


def bm25_by_hand(passages, query, k1, b):
    """Robertson's formula with Lucene's idf, straight from the definition."""
    docs = [Counter(words(f"{p.title}\n{p.text}")) for p in passages]
    mean = sum(sum(d.values()) for d in docs) / len(docs)
    scores = []
    for d in docs:
        score = 0.0
        for w in words(query):
            n = sum(w in other for other in docs)
            idf = math.log(1 + (len(docs) - n + 0.5) / (n + 0.5))
            score += idf * d[w] / (d[w] + k1 * (1 - b + b * sum(d.values()) / mean))
        scores.append(score)
    return scores


@pytest.mark.parametrize("k1, b", [(1.5, 0.75), (0.9, 0.4)])
def test_scores_follow_the_formula(k1, b):
    passages = PASSAGES[:60]
    engine = BM25Search(passages, k1=k1, b=b)
    for query in [f"{p.title} {p.title} river born" for p in passages[:10]]:
        expected = bm25_by_hand(passages, query, k1, b)
        hits = engine.search(query, k=len(passages))
        assert {h.passage.id for h in hits} == {p.id for p, s in zip(passages, expected) if s > 0}
        by_id = {p.id: s for p, s in zip(passages, expected)}
        np.testing.assert_allclose([h.score for h in hits], [by_id[h.passage.id] for h in hits], rtol=1e-5)


def test_same_scores_as_the_bare_library(engine):
    import bm25s

    tokens = bm25s.tokenize([f"{p.title}\n{p.text}" for p in PASSAGES], stopwords="en", show_progress=False)
    bare = bm25s.BM25(k1=1.5, b=0.75)
    bare.index(tokens, show_progress=False)
    queries = bm25s.tokenize(QUERIES, stopwords="en", return_ids=False, show_progress=False)
    _, scores = bare.retrieve(queries, k=5, show_progress=False)
    for hits, expected in zip(engine.search_batch(QUERIES, k=5), scores):
        np.testing.assert_allclose([h.score for h in hits], expected[: len(hits)], rtol=1e-6)
        assert all(s == 0 for s in expected[len(hits) :])


def test_one_query_is_a_batch_of_one(engine):
    assert engine.search_batch(QUERIES[:8], k=3) == [engine.search(q, k=3) for q in QUERIES[:8]]


def test_equal_scores_stand_in_the_order_of_the_corpus():
    assert [h.passage.id for h in BM25Search(SMALL).search("river", k=1)] == ["b"]
    assert [h.passage.id for h in BM25Search(SMALL[::-1]).search("river", k=1)] == ["c"]
    assert [h.passage.id for h in BM25Search(SMALL).search("Nava")][:2] == ["b", "c"]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0]), max_size=12), st.integers(1, 14))
def test_best_is_a_stable_sort(scores, k):
    expected = sorted((i for i, s in enumerate(scores) if s > 0), key=lambda i: (-scores[i], i))[:k]
    assert best(np.array(scores), k).tolist() == expected


def test_a_query_without_a_word_of_the_corpus_finds_nothing(engine):
    for query in ("", "   ", "the of and", "zzzzz qqqqq", "?!", "</search>", "a b c"):
        assert engine.search(query) == []
    assert BM25Search(SMALL, stopwords=None).search("on the")[0].passage.id == "a"


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=60), st.integers(1, 10))
def test_any_query_is_answered(query, k):
    assert len(BM25Search(SMALL).search(query, k)) <= min(k, 3)


def test_title_is_indexed():
    assert [h.passage.id for h in BM25Search(SMALL).search("velmora")] == ["a"]


def test_bad_arguments(engine):
    with pytest.raises(ValueError, match="k must be at least 1"):
        engine.search("x", k=0)
    with pytest.raises(TypeError, match="list of queries"):
        engine.search_batch("x")
    with pytest.raises(TypeError, match="expected text, found NoneType"):
        engine.search(None)
    with pytest.raises(TypeError, match="k must be a whole number, not '3'"):
        engine.search("x", k="3")
    with pytest.raises(ValueError, match="no passages"):
        BM25Search([])
    with pytest.raises(ValueError, match="no passage holds a word"):
        BM25Search([Passage("1", "the", "of")])


def test_saved_and_opened_it_answers_the_same(engine, tmp_path):
    engine.save(tmp_path / "index")
    for opened in (BM25Search.load(tmp_path / "index"), LocalSearch(tmp_path / "index")):
        assert opened.search_batch(QUERIES, k=5) == engine.search_batch(QUERIES, k=5)
    manifest = json.loads((tmp_path / "index" / "manifest.json").read_text())
    assert manifest["engine"] == "bm25" and manifest["count"] == len(PASSAGES)
    BM25Search(SMALL, stopwords=None).save(tmp_path / "index")  # replaces
    assert LocalSearch(tmp_path / "index").search("on the", k=1)[0].passage.id == "a"
    assert [p.name for p in tmp_path.iterdir()] == ["index"]


def test_the_index_is_memory_mapped(tmp_path):
    BM25Search(SMALL).save(tmp_path / "index")
    opened = BM25Search.load(tmp_path / "index")
    assert isinstance(opened._index.scores["data"], np.memmap)
    assert list(opened.passages) == SMALL


def test_nothing_is_half_written(tmp_path, monkeypatch):
    BM25Search(SMALL).save(tmp_path / "index")
    before = sorted((p.name, p.read_bytes()) for p in (tmp_path / "index").iterdir())
    with pytest.raises(TypeError):
        BM25Search(SMALL + [Passage("d", "x", b"bytes")]).save(tmp_path / "index")
    engine = BM25Search(SMALL[:1])
    engine.passages = [Passage("d", "x", {1})]  # cannot be written
    with pytest.raises(TypeError):
        engine.save(tmp_path / "index")
    assert sorted((p.name, p.read_bytes()) for p in (tmp_path / "index").iterdir()) == before
    assert [p.name for p in tmp_path.iterdir()] == ["index"]


def test_a_folder_with_other_things_is_not_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(IndexFolderError, match="exists and is not an index"):
        BM25Search(SMALL).save(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_another_corpus_is_refused(tmp_path):
    BM25Search(SMALL).save(tmp_path / "index")
    save_passages(tmp_path / "index" / "passages.jsonl", [*SMALL[:2], Passage("c", "Nava", "A RIVER.")])
    with pytest.raises(IndexFolderError, match="not the corpus that the index was built from"):
        LocalSearch(tmp_path / "index")


def test_arrays_of_another_corpus_are_refused(tmp_path):
    BM25Search(SMALL).save(tmp_path / "a")
    BM25Search(SMALL[:2]).save(tmp_path / "b")
    for file in (tmp_path / "b").glob("*.index.*"):
        file.replace(tmp_path / "a" / file.name)
    with pytest.raises(IndexFolderError, match="broken index .over 2 passages, but 3 stand beside it"):
        LocalSearch(tmp_path / "a")


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda d: (d / "manifest.json").write_text('{"engine"'), "broken manifest"),
        (lambda d: (d / "manifest.json").write_text('{"run": "cpu"}'), "not one of an index"),
        (lambda d: (d / "manifest.json").write_text('{"engine": "bm25", "format": 99}'), "format 99"),
        (lambda d: (d / "manifest.json").write_text('{"engine": "magic", "format": 1}'), "unknown engine 'magic'"),
        (lambda d: (d / "passages.jsonl").unlink(), "passages cannot be read"),
        (lambda d: (d / "offsets.npy").write_bytes(b"x"), "passages cannot be read"),
        (lambda d: (d / "data.csc.index.npy").write_bytes(b"\x93NUMPY"), "broken index"),
        (lambda d: (d / "vocab.index.json").unlink(), "broken index"),
    ],
)
def test_a_broken_index_is_named(tmp_path, damage, message):
    BM25Search(SMALL).save(tmp_path / "index")
    damage(tmp_path / "index")
    with pytest.raises(IndexFolderError, match=message):
        LocalSearch(tmp_path / "index")


def test_local_search_indexes_passages(tmp_path, capsys):
    save_passages(tmp_path / "almanac" / "passages.jsonl", SMALL)
    assert LocalSearch(tmp_path).search("velmora")[0].passage == SMALL[0]
    assert "no index in" in capsys.readouterr().out
    assert LocalSearch(tmp_path / "almanac").search("velmora")[0].passage == SMALL[0]
    save_passages(tmp_path / "corpus.jsonl", SMALL[1:])  # one in the folder itself comes first
    assert LocalSearch(tmp_path).search("velmora") == [] and LocalSearch(tmp_path).search("nava")


def test_local_search_finds_nothing(tmp_path):
    with pytest.raises(IndexFolderError, match="no such folder"):
        LocalSearch(tmp_path / "none")
    with pytest.raises(IndexFolderError, match="holds neither an index.*searchr1 almanac"):
        LocalSearch(tmp_path)
    for name in "ab":
        save_passages(tmp_path / name / "passages.jsonl", SMALL)
    with pytest.raises(IndexFolderError, match="several corpora"):
        LocalSearch(tmp_path)


def test_the_missions_own_example():
    hits = LocalSearch(index_dir=str(ROOT / "data")).search(PASSAGES[0].title)
    assert hits[0].passage == PASSAGES[0]


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="the samples in ../shared are not here")
@pytest.mark.parametrize("name, at2, at5", [("hotpotqa_train100", 60.0, 76.0), ("musique_train100", 42.3, 50.9)])
def test_recall_on_real_questions(name, at2, at5):
    questions = load_questions(SAMPLES / name / "questions.jsonl")
    row = measure(BM25Search(load_passages(SAMPLES / name / "corpus.jsonl")), questions, ks=(2, 5))
    assert abs(100 * row["recall@2"] - at2) < 1.5 and abs(100 * row["recall@5"] - at5) < 1.5


def test_recall_and_mrr_by_hand():
    questions = [
        Question("1", "velmora", ["x"], passages=["a"]),  # found first
        Question("2", "nava", ["x"], passages=["c", "none"]),  # c stands second, the other nowhere
        Question("3", "zzz", ["x"], passages=["a"]),  # nothing found
        Question("4", "nava", ["x"]),  # nothing to find: left out
    ]
    row = measure(BM25Search(SMALL), questions, ks=(1, 2), name="small")
    assert row["engine"] == "small" and row["ms_per_query"] > 0
    assert row["recall@1"] == pytest.approx(1 / 3) and row["recall@2"] == pytest.approx((1 + 0.5) / 3)
    assert row["mrr"] == pytest.approx((1 + 1 / 2) / 3)
    with pytest.raises(ValueError, match="no question names a gold passage"):
        measure(BM25Search(SMALL), questions[3:])


def test_the_package_is_light():
    import subprocess
    import sys

    code = (
        "import sys, searchr1_lib.search as s, searchr1_lib.data; s.LocalSearch; s.SQLiteSearch;"
        "print(sorted({'torch', 'faiss', 'transformers', 'sentence_transformers', 'bm25s'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_an_accent_in_another_unicode_form_is_the_same_name(tmp_path):
    composed, apart = "Beyonc\u00e9", "Beyonce\u0301"
    passages = [Passage("1", apart, "A singer."), Passage("2", composed, "A song."), Passage("3", "Beyond", "A film.")]
    sqlite = SQLiteSearch(tmp_path / "sqlite")
    sqlite.add(passages)
    for engine in (BM25Search(passages), sqlite):
        for query in (composed, apart):
            assert {hit.passage.id for hit in engine.search(query)} == {"1", "2"}
        CachedSearch(engine, tmp_path / f"{engine.name}.sqlite").search(composed)
        assert len(CachedSearch(None, tmp_path / f"{engine.name}.sqlite", mode="replay").search(apart)) == 2
