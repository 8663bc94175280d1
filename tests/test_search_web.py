"""WebSearch against a local server that speaks the wire format of each service, faults and secrets included."""

import json
import logging
import time
from urllib.parse import parse_qs, urlsplit

import pytest
from http_faults import FAULTS, answer, scripted, sleeping

from searchr1_lib.records import Hit, Passage
from searchr1_lib.search import CachedSearch, SearchError, WebSearch
from searchr1_lib.search.web import PROVIDERS

KEYS = {name: f"secret-{name.lower()}" for p in PROVIDERS.values() for name in p.keys}


def result(n, **fields):
    return {"position": n, **{name: text.format(n) for name, text in fields.items()}}


#: An answer of two results in the form that each service documents, with parts that are not results.
ANSWERS = {
    "serper": {
        "searchParameters": {"q": "x", "type": "search"},
        "credits": 1,
        "organic": [result(n, title="T{}", link="https://e.org/{}", snippet="S{}") for n in (1, 2)],
        "peopleAlsoAsk": [{"question": "?", "snippet": "no", "title": "no", "link": "no"}],
    },
    "brave": {
        "type": "search",
        "query": {"original": "x"},
        "web": {
            "type": "search",
            "results": [
                result(n, title="T{}", url="https://e.org/{}", description="<strong>S{}</strong>") for n in (1, 2)
            ],
        },
    },
    "tavily": {
        "query": "x",
        "answer": None,
        "response_time": 1.2,
        "results": [result(n, title="T{}", url="https://e.org/{}", content="S{}") | {"score": 0.9} for n in (1, 2)],
    },
    "serpapi": {
        "search_metadata": {"status": "Success"},
        "search_parameters": {"q": "x"},
        "organic_results": [result(n, title="T{}", link="https://e.org/{}", snippet="S{}") for n in (1, 2)],
    },
    "google": {
        "kind": "customsearch#search",
        "searchInformation": {"totalResults": "2"},
        "items": [
            result(n, title="T{}", link="https://e.org/{}", snippet="S{}", htmlSnippet="<b>no</b>") for n in (1, 2)
        ],
    },
}
#: How each service says that it found nothing.
NOTHING = {
    "serper": {"searchParameters": {"q": "x"}, "organic": []},
    "brave": {"type": "search", "query": {"original": "x"}},
    "tavily": {"query": "x", "results": []},
    "serpapi": {"search_metadata": {"status": "Success"}, "error": "Google hasn't returned any results."},
    "google": {"kind": "customsearch#search", "searchInformation": {"totalResults": "0"}},
}
HITS = [Hit(Passage(f"https://e.org/{n}", f"T{n}", f"S{n}"), 1 / n) for n in (1, 2)]


@pytest.fixture(autouse=True)
def keys(monkeypatch):
    for name, key in KEYS.items():
        monkeypatch.setenv(name, key)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_each_service_is_asked_and_read_in_its_own_form(provider):
    with scripted(answer(ANSWERS[provider])) as (url, asked):
        assert WebSearch(provider, endpoint=url).search("penicillin & \u00fc?", k=2) == HITS
    path, headers, body, _ = asked[0]
    fields = {name: values[0] for name, values in parse_qs(urlsplit(path).query).items()}
    sent = json.loads(body) if body else fields
    keys = [KEYS[name] for name in PROVIDERS[provider].keys]
    assert sent["query" if provider == "tavily" else "q"] == "penicillin & \u00fc?"
    expected = {
        "serper": lambda: sent["num"] == 2 and headers["X-API-KEY"] == keys[0],
        "brave": lambda: sent["count"] == "2" and headers["X-Subscription-Token"] == keys[0],
        "tavily": lambda: sent["max_results"] == 2 and headers["Authorization"] == f"Bearer {keys[0]}",
        "serpapi": lambda: sent["engine"] == "google" and sent["num"] == "2" and sent["api_key"] == keys[0],
        "google": lambda: sent["num"] == "2" and [sent["key"], sent["cx"]] == keys,
    }
    assert expected[provider]()


@pytest.mark.parametrize("provider", PROVIDERS)
def test_nothing_found(provider):
    with scripted(answer(NOTHING[provider])) as (url, asked):
        assert WebSearch(provider, endpoint=url).search_batch(["x", "", " "]) == [[], [], []]
    assert len(asked) == 1  # a blank query is not paid for


@pytest.mark.parametrize("provider", PROVIDERS)
def test_limits_of_the_services_are_kept(provider):
    with scripted(answer(NOTHING[provider])) as (url, asked):
        WebSearch(provider, endpoint=url).search("word " * 2000, k=500)
    path, _, body, _ = asked[0]
    sent = json.loads(body) if body else {name: v[0] for name, v in parse_qs(urlsplit(path).query).items()}
    count = next(int(sent[name]) for name in ("num", "count", "max_results") if name in sent)
    assert count == PROVIDERS[provider].most
    assert len(sent.get("q", sent.get("query"))) <= PROVIDERS[provider].longest


def test_a_batch_keeps_its_order():
    def echo(handler):
        query = parse_qs(urlsplit(handler.path).query)["q"][0]
        time.sleep(0.05 if query == "q0" else 0)
        answer({"items": [{"link": query, "title": "t"}]})(handler)  # a result without a snippet is one too

    with scripted(echo) as (url, _):
        batch = WebSearch("google", endpoint=url).search_batch([f"q{n}" for n in range(9)], k=1)
    assert [hits[0].passage for hits in batch] == [Passage(f"q{n}", "t", "") for n in range(9)]


def test_marks_are_removed_and_text_is_plain():
    body = {"web": {"results": [{"url": "u", "title": "A &amp; <b>B</b>", "description": "5 &lt; 6 <i>x</i> \ud800"}]}}
    with scripted(answer(body)) as (url, _):
        (hit,) = WebSearch("brave", endpoint=url).search("x")
    assert hit.passage == Passage("u", "A & B", "5 < 6 <i>x</i> ?")


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("fault", FAULTS)
def test_faults(provider, fault):
    with scripted(FAULTS[fault], answer(ANSWERS[provider])) as (url, asked):
        assert WebSearch(provider, endpoint=url).search("x", k=2) == HITS
    assert len(asked) == 2
    with scripted(FAULTS[fault]) as (url, _):
        with pytest.raises(SearchError, match=f"^web search {provider}: .*after 2 tries"):
            WebSearch(provider, endpoint=url, retries=1).search("x")


@pytest.mark.parametrize("provider", PROVIDERS)
def test_rate_limit(provider):
    with scripted(answer({}, 429, [("Retry-After", "0.3")]), answer(ANSWERS[provider])) as (url, asked):
        assert WebSearch(provider, endpoint=url).search("x", k=2) == HITS
    assert asked[1][3] - asked[0][3] >= 0.3


def test_time_out():
    with scripted(sleeping) as (url, _), pytest.raises(SearchError, match="web search serper: no answer within 0.3 s"):
        WebSearch("serper", endpoint=url, timeout=0.3).search("x")


@pytest.mark.parametrize(
    "provider, body",
    [
        ("serper", []),
        ("serper", {"organic": "x"}),
        ("serper", {"organic": [{"title": "no link"}]}),
        ("brave", {"web": {"results": [5]}}),
        ("tavily", {"detail": "?"}),
        ("google", {"items": [{"link": 5}]}),
        ("serpapi", {"search_metadata": {"status": "Error"}, "error": "It broke."}),
        ("serpapi", {"error": "It broke."}),
    ],
)
def test_an_answer_of_another_form(provider, body):
    with scripted(answer(body)) as (url, _), pytest.raises(SearchError, match="not of the form"):
        WebSearch(provider, endpoint=url).search("x")


@pytest.mark.parametrize("provider", PROVIDERS)
def test_no_key_ever_shows(provider, caplog, capfd, tmp_path):
    caplog.set_level(logging.DEBUG)
    shown = []
    for give in (
        answer(ANSWERS[provider]),
        answer({}, 401),
        answer({}, 429, [("Retry-After", "99")]),
        FAULTS["cut off"],
        FAULTS["no HTTP"],
        answer({}, 302, [("Location", "/x")]),
        answer({"error": "e"}),
    ):
        with scripted(give) as (url, _):
            engine = WebSearch(provider, endpoint=url, retries=1)
            try:
                CachedSearch(engine, tmp_path / f"cache{len(shown)}").search("x")
            except SearchError as e:
                shown += [str(e), repr(e), str(e.__cause__)]
    engine = WebSearch(provider, endpoint="http://127.0.0.1:1/", retries=0)
    with pytest.raises(SearchError) as e:
        engine.search("x")
    shown += [str(e.value), repr(engine), engine.name, caplog.text, *capfd.readouterr()]
    stored = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert "httpx" in caplog.text and "httpcore" in caplog.text  # the log did hold requests
    for name in PROVIDERS[provider].keys:
        if name != "GOOGLE_CSE_ID":  # names a search engine, opens nothing
            assert not [text for text in shown if KEYS[name] in text] and KEYS[name].encode() not in stored


def test_missing_key_and_unknown_service(monkeypatch):
    monkeypatch.delenv("GOOGLE_CSE_ID")
    monkeypatch.setenv("SERPER_API_KEY", " ")
    with pytest.raises(ValueError, match="set the environment variable GOOGLE_CSE_ID$"):
        WebSearch("google")
    with pytest.raises(ValueError, match="set the environment variable SERPER_API_KEY"):
        WebSearch("serper")
    with pytest.raises(ValueError, match="must be one of serper, brave, tavily, serpapi, google, not 'bing'"):
        WebSearch("bing")


def test_a_key_goes_to_other_machines_over_https_only():
    with pytest.raises(ValueError, match=r"unencrypted to example\.org: use https") as e:
        WebSearch("google", endpoint="http://example.org/search")
    assert "secret" not in str(e.value)


@pytest.mark.parametrize("key", ["secret\nkey", "\u201csecret\u201d", "secret key", "secr\u0435t"])
def test_a_key_that_cannot_be_one_is_not_shown(monkeypatch, key):
    """HTTP libraries put such a header, key and all, into their error."""
    monkeypatch.setenv("SERPER_API_KEY", key)
    with pytest.raises(ValueError, match="SERPER_API_KEY holds blanks, line breaks or letters") as e:
        WebSearch("serper")
    assert "secr" not in str(e.value) and e.value.__cause__ is None


def test_half_a_surrogate_pair_in_a_query():
    with scripted(answer(ANSWERS["google"])) as (url, asked):
        assert WebSearch("google", endpoint=url).search("x \ud800", k=2) == HITS
    assert parse_qs(urlsplit(asked[0][0]).query)["q"] == ["x ?"]


def test_a_recorded_web_run_is_repeated_offline(tmp_path):
    with scripted(answer(ANSWERS["tavily"])) as (url, asked):
        live = CachedSearch(WebSearch("tavily", endpoint=url), tmp_path / "web.sqlite")
        first = live.search_batch(["a", "b"], k=2)
    replay = CachedSearch(None, tmp_path / "web.sqlite", mode="replay")
    assert replay.search_batch(["b", "a"], k=2) == first[::-1] and len(asked) == 2


@pytest.mark.parametrize("bad", [0, -1, float("nan"), float("inf"), True, "3", None])
def test_bad_numbers_are_named(bad):
    for name in ("timeout", "retries", "connections"):
        if (name, bad) != ("retries", 0):
            with pytest.raises(ValueError, match=f"^{name} must be"):
                WebSearch("serper", **{name: bad})


def test_another_service_or_search_engine_is_another_recording(tmp_path, monkeypatch):
    with scripted(answer(ANSWERS["google"])) as (url, _):
        CachedSearch(WebSearch("google", endpoint=url), tmp_path / "c").search("x")
        monkeypatch.setenv("GOOGLE_CSE_ID", "another")
        for provider in ("google", "serper"):
            with pytest.raises(ValueError, match="recorded from WebSearch.google"):
                CachedSearch(WebSearch(provider, endpoint=url), tmp_path / "c")
