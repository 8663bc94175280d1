"""SQLiteSearch on a real database that changes while it serves, and CachedSearch, recorded and replayed."""

import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1_lib.data import load_passages, load_questions
from searchr1_lib.records import Hit, Passage
from searchr1_lib.search import (
    BM25Search,
    CachedSearch,
    DenseSearch,
    Engine,
    IndexFolderError,
    LocalSearch,
    SearchError,
    SQLiteSearch,
)
from searchr1_lib.search.sqlite import Database

ALMANAC = Path(__file__).resolve().parents[1] / "data" / "almanac"
SMALL = [
    Passage("a", "Velmora", "A town on the Nava."),
    Passage("b", "Nava", "A river."),
    Passage("c", "Nava", "A river."),
]


@pytest.fixture
def engine(tmp_path):
    engine = SQLiteSearch(tmp_path / "index")
    engine.add(SMALL)
    return engine


def ids(hits):
    return [h.passage.id for h in hits]


def test_search_and_order(engine):
    assert ids(engine.search("velmora")) == ["a"] and engine.search("velmora")[0].passage == SMALL[0]
    assert ids(engine.search("river")) == ["b", "c"]  # equal scores in the order of adding
    assert ids(engine.search("nava", k=1)) == ["b"] and engine.search("nava")[0].score > 0
    assert engine.search("the of") == engine.search("") == engine.search("zzz") == []
    assert engine.search_batch(["velmora", "", "river"]) == [engine.search("velmora"), [], engine.search("river")]


def test_add_replace_delete(engine):
    engine.add([Passage("b", "Nava", "A mountain."), Passage("d", "Sen", "A river.")])
    assert set(ids(engine.search("river"))) == {"c", "d"}
    assert ids(engine.search("mountain")) == ["b"] and len(engine) == 4
    assert engine.delete(["b", "none"]) == 1 and engine.search("mountain") == [] and len(engine) == 3


def test_a_change_is_whole_or_not_at_all(engine):
    def broken():
        yield Passage("d", "Sen", "A lake.")
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError):
        engine.add(broken())
    assert engine.search("lake") == [] and len(engine) == 3


def test_what_was_added_is_there_after_reopening(engine, tmp_path):
    for opened in (SQLiteSearch(tmp_path / "index"), LocalSearch(tmp_path / "index")):
        assert opened.search("river") == engine.search("river")
        engine.add([Passage("e", "Orm", "A volcano.")])
        assert ids(opened.search("volcano")) == ["e"]  # seen by an engine that was open before


SYNTAX = ['"', 'a" OR "b', "nava NEAR river", "title:nava", "nava*", "_ __", "NOT", "(", "x\0y"]


def test_any_query_is_answered(engine):
    @settings(max_examples=100, deadline=None)
    @given(st.text(max_size=60) | st.sampled_from(SYNTAX))
    def check(query):
        assert len(engine.search(query)) <= 3

    check()


def test_it_serves_while_it_changes(engine):
    """Four readers while a writer replaces both rivers at once: a reader sees both old or both new."""
    stop, faults, seen = threading.Event(), [], set()

    def read():
        while not stop.is_set():
            texts = {h.passage.text for h in engine.search("nava river") if h.passage.id in "bc"}
            seen.add(frozenset(texts))
            if len(texts) != 1:
                faults.append(texts)

    readers = [threading.Thread(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    for i in range(60):
        engine.add([Passage(id, "Nava", f"A river. Version {i}.") for id in "bc"])
    stop.set()
    for reader in readers:
        reader.join()
    assert not faults and len(seen) > 1


WRITER = """
import sys
from searchr1_lib.records import Passage
from searchr1_lib.search import SQLiteSearch

folder, name = sys.argv[1:]
engine = SQLiteSearch(folder)
for i in range(10):
    engine.add([Passage(f"{name}{i}-{j}", "Sen", "A lake.") for j in range(4)])
    assert engine.search("lake")
    assert engine.delete([f"{name}{i}-0"]) == 1
"""


def test_processes_make_and_fill_one_index_at_once(tmp_path):
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "index"), name]) for name in "abcd"]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0, 0]
    opened = LocalSearch(tmp_path / "index")
    assert len(opened.engine) == 4 * 10 * 3 and len(opened.search("lake", k=999)) == 120


def test_a_long_or_odd_query(engine):
    assert engine.search(" ".join(f"w{i}" for i in range(20_000)) + " velmora") == engine.search("velmora")
    assert ids(engine.search("velmora \ud800")) == ["a"] and ids(engine.search("river", k=10**9)) == ["b", "c"]
    with pytest.raises(TypeError, match="expected text, found NoneType"):
        engine.search_batch(["river", None])
    with pytest.raises(TypeError, match="k must be a whole number, not 2.5"):
        engine.search("river", k=2.5)


def test_agrees_with_bm25_on_the_almanac(tmp_path):
    """Both rank by BM25 over the same text; only k1, the idf and the tokenizer differ a little."""
    passages = load_passages(ALMANAC / "passages.jsonl")
    questions = [q for q in load_questions(ALMANAC / "test.jsonl", limit=250) if q.passages]
    sqlite = SQLiteSearch(tmp_path / "index")
    sqlite.add(passages)

    def recall(engine):
        found = engine.search_batch([q.text for q in questions], k=3)
        return sum(q.passages[0] in ids(hits) for q, hits in zip(questions, found)) / len(questions)

    assert abs(recall(sqlite) - recall(BM25Search(passages))) < 0.05


def test_bad_folders(tmp_path):
    BM25Search(SMALL).save(tmp_path / "bm25")
    with pytest.raises(IndexFolderError, match="holds an index of engine 'bm25'"):
        SQLiteSearch(tmp_path / "bm25")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    with pytest.raises(IndexFolderError, match="exists and is not an index"):
        SQLiteSearch(tmp_path / "other")
    SQLiteSearch(tmp_path / "index")
    (tmp_path / "index" / "passages.sqlite").write_bytes(b"this is no database, however long it may be" * 9)
    for end in ("-wal", "-shm"):
        (tmp_path / "index" / f"passages.sqlite{end}").unlink(missing_ok=True)
    with pytest.raises(IndexFolderError, match="cannot be used as a database"):
        LocalSearch(tmp_path / "index")
    with pytest.raises(ValueError, match="k must be at least 1"):
        SQLiteSearch(tmp_path / "new").search("x", k=0)
    (tmp_path / "index" / "passages.sqlite").unlink()
    with pytest.raises(IndexFolderError, match="passages.sqlite is missing"):
        LocalSearch(tmp_path / "index")  # an empty one in its place would find nothing and say nothing


def test_a_database_that_breaks_while_it_serves(engine):
    connection = sqlite3.connect(engine._database.path)
    connection.execute("DROP TABLE passages")
    with pytest.raises(SearchError, match="passages.sqlite: the database could not answer"):
        engine.search("river")


class Fickle(Engine):
    """A live engine: says something else each time, and fails for "bad"."""

    def __init__(self):
        self.asked = []

    def search_batch(self, queries, k=3):
        self.asked.append((list(queries), k))
        if "bad" in queries:
            raise SearchError("the web is down")
        return [[Hit(Passage(q, "t<b>", f"{q} ü {len(self.asked)}"), 1 / (i + 3)) for i in range(k)] for q in queries]


def test_recorded_answers_are_repeated_exactly(tmp_path):
    live = Fickle()
    recorded = CachedSearch(live, tmp_path / "cache.sqlite")
    first = recorded.search_batch(["x", "y", "x"], k=2)
    assert live.asked == [(["x", "y"], 2)] and first[0] == first[2]  # asked once each
    assert recorded.search("y", k=2) == first[1] and len(live.asked) == 1
    assert recorded.search("x", k=1) != first[0] and len(live.asked) == 2  # another k is another question
    replay = CachedSearch(None, tmp_path / "cache.sqlite", mode="replay")
    assert replay.search_batch(["y", "x"], k=2) == [first[1], first[0]]
    assert [p.name for p in tmp_path.iterdir()] == ["cache.sqlite"]  # one file to copy
    with pytest.raises(SearchError, match="nothing was recorded for the query 'z' with k=2"):
        replay.search("z", k=2)
    assert recorded.search("half \ud800", k=2) == replay.search("half \ud800", k=2)


def test_replay_never_asks(tmp_path):
    live = Fickle()
    CachedSearch(live, tmp_path / "c").search("x")
    replay = CachedSearch(live, tmp_path / "c", mode="replay")
    with pytest.raises(SearchError):
        replay.search("new")
    assert len(live.asked) == 1


def seen(engine, batches):
    """What a program sees that asks these batches in turn: hits, or the words of the error."""
    answers = []
    for batch in batches:
        try:
            answers.append(engine.search_batch(batch))
        except SearchError as e:
            answers.append(str(e))
    return answers


def test_failures_are_repeated_as_they_came(tmp_path):
    """A query that fails twice and is then answered does the same in a replay, in batches and alone."""

    class Recovering(Fickle):
        def search_batch(self, queries, k=3):
            if "bad" in queries and len(self.asked) > 4:
                queries = [q.replace("bad", "good") for q in queries]
            return super().search_batch(queries, k)

    program = [["x", "bad"], ["x"], ["bad"], ["bad", "y"], ["y"], ["x"], ["bad"], ["bad", "x"], ["bad"]]
    first = seen(CachedSearch(Recovering(), tmp_path / "c"), program)
    assert first.count("the web is down") == 3 and isinstance(first[-1], list)
    for _ in range(2):
        assert seen(CachedSearch(None, tmp_path / "c", mode="replay"), program) == first
    again = CachedSearch(Recovering(), tmp_path / "c")
    assert again.search("bad") == first[-1][0] and not again.engine.asked  # answered once, never asked again


def test_threads_that_ask_at_the_same_time_get_the_recorded_answer(tmp_path):
    """The engine answers each of them differently; one answer stands, and all of them and the replay see it."""

    class Slow(Fickle):
        def search_batch(self, queries, k=3):
            number = len(self.asked)
            self.asked.append(queries)
            time.sleep(0.1)
            if number == 3:
                raise SearchError("too late to matter")
            return [[Hit(Passage(q, "", str(number)), 1.0)] for q in queries]

    engine, got = Slow(), []
    recorded = CachedSearch(engine, tmp_path / "c")
    threads = [threading.Thread(target=lambda: got.append(recorded.search("x"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(engine.asked) > 1 and len(got) == 4
    assert all(hits == CachedSearch(None, tmp_path / "c", mode="replay").search("x") for hits in got)


def test_many_threads_share_a_cache(tmp_path):
    recorded = CachedSearch(BM25Search(SMALL), tmp_path / "c")
    faults = []

    def work(n):
        try:
            for i in range(20):
                assert ids(recorded.search(f"velmora {(n * i) % 13}")) == ["a"]
        except Exception as e:
            faults.append(e)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not faults
    rows = sqlite3.connect(tmp_path / "c").execute("SELECT count(*) FROM answers").fetchone()[0]
    assert rows == 13


def test_bad_caches(tmp_path):
    with pytest.raises(ValueError, match="'record' or 'replay'"):
        CachedSearch(Fickle(), tmp_path / "c", mode="write")
    with pytest.raises(ValueError, match="needs an engine"):
        CachedSearch(None, tmp_path / "c")
    with pytest.raises(ValueError, match="nothing was recorded here"):
        CachedSearch(None, tmp_path / "c", mode="replay")
    CachedSearch(Fickle(), tmp_path / "c")
    with pytest.raises(ValueError, match="recorded from Fickle, not from BM25Search"):
        CachedSearch(BM25Search(SMALL), tmp_path / "c")
    (tmp_path / "d").write_text("this is no database, however long it may be" * 9)
    with pytest.raises(ValueError, match="cannot be used as a database"):
        CachedSearch(Fickle(), tmp_path / "d")
    sqlite3.connect(tmp_path / "e").execute("CREATE TABLE other (x)")
    with pytest.raises(ValueError, match="cannot be used as a recording .no such table: answers"):
        CachedSearch(None, tmp_path / "e", mode="replay")


def test_a_recording_never_answers_for_another_corpus(tmp_path):
    other = [Passage("z", "Velmora", "A lake.")]
    CachedSearch(BM25Search(SMALL), tmp_path / "c").search("velmora")
    assert ids(CachedSearch(BM25Search(SMALL), tmp_path / "c").search("velmora")) == ["a"]
    changed = SQLiteSearch(tmp_path / "index")
    for engine in (BM25Search(other), BM25Search(SMALL, k1=9.0), changed):
        for mode in ("record", "replay"):
            with pytest.raises(ValueError, match="recorded from BM25Search .*, not from .*; give another file"):
                CachedSearch(engine, tmp_path / "c", mode=mode)
    changed.add(SMALL)
    CachedSearch(changed, tmp_path / "d").search("velmora")
    changed.add(other)
    with pytest.raises(ValueError, match="recorded from SQLiteSearch"):
        CachedSearch(changed, tmp_path / "d")
    replay = CachedSearch(None, tmp_path / "c", mode="replay")
    assert replay.identity == CachedSearch(BM25Search(SMALL), tmp_path / "c").identity
    assert BM25Search(SMALL).identity in replay.identity.replace("\\", "")


class Odd(Engine):
    """What an engine of somebody else's may return."""

    def __init__(self, passage, score):
        self.hit = Hit(passage, score)

    def search_batch(self, queries, k=3):
        return [[self.hit] for _ in queries]


@pytest.mark.parametrize("score", [np.float32(0.5), Decimal("0.5"), Fraction(1, 2), 1, True, np.int64(3)], ids=repr)
@pytest.mark.parametrize("text", ["half \ud800", None, np.str_("x")], ids=ascii)
def test_what_anybodys_engine_returns_can_be_recorded(tmp_path, score, text):
    odd = Odd(Passage("1", text, "x"), score)
    (hit,) = CachedSearch(odd, tmp_path / "c").search("x")
    assert CachedSearch(None, tmp_path / "c", mode="replay").search("x") == [hit]
    assert type(hit.score) is float and hit.score == float(score) and type(hit.passage.title) is str


READ_ONLY = """
import sqlite3, sys
from pathlib import Path
from searchr1_lib.records import Passage
from searchr1_lib.search import BM25Search, CachedSearch, DenseSearch, LocalSearch, SearchError, encode_passages
from searchr1_lib.search.sqlite import SQLiteSearch
folder = Path(sys.argv[1])
try:
    (folder / "x").write_text("")
except OSError:
    pass
else:
    sys.exit("it can be written")
for _ in range(2):
    engine = LocalSearch(folder / "sqlite")
    assert [h.passage.id for h in engine.search("river")] == ["b", "c"], engine.search("river")
try:
    engine.engine.add([Passage("d", "Sen", "A river.")])
except SearchError as e:
    assert "passages.sqlite" in str(e) and "readonly" in str(e), e
else:
    sys.exit("it was written")
assert LocalSearch(folder / "bm25").search("velmora")
for mode in ("replay", "record"):
    cached = CachedSearch(BM25Search(LocalSearch(folder / "bm25").engine.passages), folder / "recording", mode=mode)
    assert cached.search("velmora")
from test_search_dense import Letters
passages = list(LocalSearch(folder / "bm25").engine.passages)
encode_passages(passages, Letters(), vectors_dir=folder / "vectors")
assert DenseSearch.load(folder / "dense", Letters()).search("A river.")
"""


def test_whole_indexes_on_a_read_only_mount_are_opened(tmp_path):
    """On a real mount: the superuser, who runs the tests in a container, may write what is only marked."""
    from test_search_dense import Letters

    there = ["unshare", "-rm", "sh", "-c", 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && "$@"', tmp_path]
    if not shutil.which("unshare") or subprocess.run([*there, "true"], capture_output=True).returncode:
        pytest.skip("no mount can be made here")
    engine = SQLiteSearch(tmp_path / "sqlite")
    engine.add(SMALL)
    del engine  # the last connection takes the write-ahead log away
    BM25Search(SMALL).save(tmp_path / "bm25")
    CachedSearch(BM25Search(SMALL), tmp_path / "recording").search("velmora")
    DenseSearch(SMALL, Letters(), vectors_dir=tmp_path / "vectors").save(tmp_path / "dense")
    environment = os.environ | {"PYTHONPATH": f"{ALMANAC.parents[1]}:{Path(__file__).parent}"}
    done = subprocess.run(
        [*there, sys.executable, "-c", READ_ONLY, tmp_path], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_no_message_says_that_something_whole_should_be_deleted(tmp_path):
    SQLiteSearch(tmp_path / "index").add(SMALL)
    (tmp_path / "other").write_text("this is no database, however long it may be" * 9)
    for path in (tmp_path, tmp_path / "other"):
        with pytest.raises(IndexFolderError, match="cannot be used as a database") as e:
            Database(path, "CREATE TABLE x (y);", "DELETE")
        assert "delete" not in str(e.value)


def test_a_long_query_takes_time_in_proportion(engine):
    def seconds(number):
        begun = time.process_time()
        engine.search(" ".join(f"w{i}" for i in range(number)))
        return time.process_time() - begun

    assert seconds(20_000) < 3 * seconds(10_000) + 0.2
