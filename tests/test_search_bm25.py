"""BM25Search and LocalSearch: against the formula, the bare library and the published figures; bad folders."""

import json
import math
import re
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1_lib.data import load_passages, load_questions, save_passages
from searchr1_lib.records import Passage, Question
from searchr1_lib.search import (
    BM25Search,
    CachedSearch,
    Engine,
    HybridSearch,
    IndexFolderError,
    LocalSearch,
    RemoteSearch,
    RerankedSearch,
    SQLiteSearch,
    measure,
)
from searchr1_lib.search import words as text
from searchr1_lib.search.base import best, identity_of

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


#: A question, the passage that answers it, and one that does not, in scripts that put no blanks between words or
#: have letters of several characters.
SCRIPTS = {
    "Chinese": ("法国的首都在哪里？", "巴黎是法国的首都。", "水由氢和氧组成。"),
    "one character": ("水是什么？", "水由氢和氧组成。", "巴黎很大。"),
    "Japanese": ("日本の首都はどこですか", "東京は日本の首都です。", "りんごは赤い。"),
    "Thai": ("เมืองหลวงของประเทศไทยคืออะไร", "กรุงเทพเป็นเมืองหลวงของไทย", "แมวกินปลา"),
    "Hindi": ("भारत की राजधानी क्या है?", "नई दिल्ली भारत की राजधानी है।", "बिल्ली मछली खाती है।"),
    "Korean": ("한국의 수도는?", "서울은 한국의 수도이다.", "고양이가 잔다."),
    "wide letters": ("ＢＥＹＯＮＣＥ", "Beyonce is a singer.", "Beyond is a film."),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_questions_in_other_scripts_find_their_passage(tmp_path, script):
    question, answer, other = SCRIPTS[script]
    passages = [Passage("other", "", other), Passage("answer", "", answer)]
    sqlite = SQLiteSearch(tmp_path)
    sqlite.add(passages)
    for engine in (BM25Search(passages), sqlite):
        assert [hit.passage.id for hit in engine.search(question, k=1)] == ["answer"], engine.name
        assert engine.search(question, k=1)[0].passage.text == answer


def test_marks_belong_to_their_letters():
    assert text.words("हिन्दी में The Nava, 東京 ก็ดี a") == "हिन्दी में the nava 東京 東 京 ก็ดี"


def seconds(call, argument):
    begun = time.process_time()
    call(argument)
    return time.process_time() - begun


@pytest.mark.parametrize("part", ["\u0301\u0323", "漢字", "กำ", "x\u0301", "\ufdfa", "a ", "```", " "])
def test_text_from_outside_takes_time_in_proportion(part):
    for call in (text.clean, text.words, BM25Search(SMALL).search):
        one = min(seconds(call, "a" + part * (40_000 // len(part))) for _ in range(2))
        two = min(seconds(call, "a" + part * (80_000 // len(part))) for _ in range(2))
        assert two < 3 * one + 0.2


def test_more_marks_than_a_letter_has_are_left_out():
    assert len(text.clean("a" + "\u0301\u0323" * 100_000)) < 40
    assert text.clean("e" + "\u0301" * 3) == "\u00e9\u0301\u0301"


@pytest.mark.parametrize("bad", [0, -1, math.nan, math.inf, True, "3", None, 10**400, 2**40])
def test_bad_numbers_are_named(bad):
    for name, make in {
        "k": lambda bad: BM25Search(SMALL).search("x", k=bad),
        "batch_size": lambda bad: measure(BM25Search(SMALL), QUESTIONS, batch_size=bad if bad != 2**40 else 0),
    }.items():
        with pytest.raises((ValueError, TypeError), match=f"^{name} must be"):
            make(bad)
    for name, value in {"k1": -1, "b": 1.5}.items():
        for number in (value, math.nan, True, "1"):
            with pytest.raises(ValueError, match=f"^{name} must be"):
                BM25Search(SMALL, **{name: number})


QUESTIONS = [Question("1", "velmora", ["x"], passages=["a"])]


@pytest.mark.parametrize("part", [None, 5, b"x"])
def test_a_passage_without_text_is_named(tmp_path, part):
    for index in (BM25Search, SQLiteSearch(tmp_path).add):
        for passage in (Passage("p7", part, "x"), Passage("p7", "x", part)):
            with pytest.raises(TypeError, match="passage 'p7': title and text must be text"):
                index([SMALL[0], passage])


def test_an_identity_is_what_decides_the_answers(tmp_path):
    engine = BM25Search(SMALL)
    engine.save(tmp_path)
    assert BM25Search.load(tmp_path).identity == engine.identity == BM25Search(SMALL).identity == identity_of(engine)
    others = [BM25Search(SMALL[::-1]), BM25Search(SMALL, k1=1.2), BM25Search(SMALL, b=0.4)]
    others += [BM25Search(SMALL, stopwords=None), BM25Search([*SMALL[:2], Passage("c", "Nava", "A lake.")])]
    sqlite = SQLiteSearch(tmp_path / "sqlite")
    for change in ([], SMALL, [Passage("c", "Nava", "A lake.")]):
        sqlite.add(change)
        others.append(identity_of(sqlite))
    others += [RemoteSearch(f"http://127.0.0.1:1/{end}") for end in ("", "a", "a?index=1", "a?index=2")]
    fast = BM25Search(SMALL[:1])
    others += [HybridSearch([engine, fast]), HybridSearch([fast, engine]), HybridSearch([engine, fast], constant=9)]
    others += [RerankedSearch(engine, max), RerankedSearch(engine, min), RerankedSearch(fast, min, depth=3)]
    others += [LocalSearch(tmp_path), Engine(), object(), print]
    texts = [other if isinstance(other, str) else identity_of(other) for other in [engine, *others]]
    assert len(set(texts)) == len(texts)
    assert identity_of(object()) == "builtins.object" and "secret" not in RemoteSearch("http://h/?key=secret").identity


@pytest.mark.parametrize(
    "file", ["manifest.json", "offsets.npy", "passages.jsonl", "data.csc.index.npy", "params.index.json"]
)
def test_a_corrupt_file_of_an_index_is_no_riddle(tmp_path, file):
    BM25Search(SMALL).save(tmp_path)
    whole = (tmp_path / file).read_bytes()
    for broken in (b"", b"{}", b"[]", b"\x00" * len(whole), whole[: len(whole) // 2], whole[:-9] + b"\xff" * 9):
        (tmp_path / file).write_bytes(broken)
        try:
            LocalSearch(tmp_path).search("river")
        except IndexFolderError as e:
            assert str(tmp_path) in str(e)


def test_a_file_that_may_not_be_read_is_not_called_broken(tmp_path, monkeypatch):
    BM25Search(SMALL).save(tmp_path)
    monkeypatch.setattr(
        "numpy.load", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "denied", "offsets.npy"))
    )
    with pytest.raises(PermissionError):
        LocalSearch(tmp_path)
