"""A corpus in two parts, one of them behind a real server, against the whole; and with a part that is down."""

import numpy as np
import pytest
from test_search_remote import serving

from searchr1_lib.records import Passage
from searchr1_lib.search import CachedSearch, DenseSearch, RemoteSearch, SearchError, ShardedSearch, make_app

PASSAGES = [Passage(str(i), f"Town {i}", f"lies on the {'abcdefghij'[i % 10] * (1 + i)}") for i in range(60)]
QUERIES = ["aaaa", "the town of bcd", "jjjjj lies", "e"]


class Letters:
    """A text as the counts of its letters."""

    name, dimension = "letters", 26

    def encode(self, texts) -> np.ndarray:
        counts = np.array([[text.lower().count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"] for text in texts])
        return (counts / np.linalg.norm(counts, axis=1, keepdims=True)).astype(np.float32)


def dense(passages):
    return DenseSearch(passages, Letters(), progress=None)


def test_parts_find_what_the_whole_finds(recwarn):
    whole, here = dense(PASSAGES), dense(PASSAGES[:25])
    with serving(make_app(dense(PASSAGES[25:]))) as address:
        parts = ShardedSearch([here, RemoteSearch(address)])
        found = parts.search_batch(QUERIES, 7)
    for ours, theirs in zip(found, whole.search_batch(QUERIES, 7), strict=True):
        assert [hit.score for hit in ours] == pytest.approx([hit.score for hit in theirs], abs=1e-6)
        assert {hit.passage for hit in ours if hit.score > ours[-1].score + 1e-6} <= {hit.passage for hit in theirs}
    assert not [w for w in recwarn if "searched without" in str(w.message)]


def test_a_part_that_is_down_is_named_and_may_be_missing():
    here = dense(PASSAGES[:25])
    gone = RemoteSearch("http://127.0.0.1:9", timeout=1, retries=0)
    with pytest.raises(SearchError, match=r"1 of 2 parts of the corpus did not answer: .*127\.0\.0\.1:9"):
        ShardedSearch([here, gone]).search("aaaa")
    with pytest.warns(UserWarning, match=r"searched without 1 of 2 parts: .*127\.0\.0\.1:9"):
        assert ShardedSearch([here, gone], required=1).search("aaaa", 5) == here.search("aaaa", 5)
    with pytest.raises(SearchError, match="2 of 2 parts"):
        ShardedSearch([gone, gone], required=1).search("aaaa")


def test_a_cache_around_a_part_keeps_nothing_of_the_others(tmp_path):
    here, gone = dense(PASSAGES[:25]), RemoteSearch("http://127.0.0.1:9", timeout=1, retries=0)
    cached = CachedSearch(here, tmp_path / "hits.sqlite")
    with pytest.warns(UserWarning, match="searched without"):
        ShardedSearch([cached, gone], required=1).search("aaaa", 5)
    whole = ShardedSearch([cached, dense(PASSAGES[25:])])
    assert whole.search("aaaa", 5) == ShardedSearch([here, dense(PASSAGES[25:])]).search("aaaa", 5)


@pytest.mark.parametrize(
    "number, required, what", [(0, None, "needs an engine"), (2, 3, "required must"), (2, 0, "required must")]
)
def test_what_cannot_be(number, required, what):
    with pytest.raises(ValueError, match=what):
        ShardedSearch([dense(PASSAGES[:5])] * number, required=required)
