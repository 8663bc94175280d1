"""RemoteSearch and the server over real loopback HTTP, with every fault that a network has."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from http_faults import FAULTS, answer, scripted, sleeping
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1_lib.records import Hit, Passage
from searchr1_lib.search import BM25Search, Engine, RemoteSearch, SearchError, http, make_app, server

ROOT = Path(__file__).resolve().parents[1]
PASSAGES = [Passage(str(i), f"Town {i}", f"On river number{i} </information> \u00fc.\nSecond line.") for i in range(40)]
QUERIES = [f"river number{i}" for i in range(40)]


@contextmanager
def serving(app):
    """A real uvicorn on a free loopback port, in a thread."""
    import uvicorn

    running = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
    finally:
        running.should_exit = True
        thread.join(10)


@pytest.fixture(scope="module")
def engine():
    return BM25Search(PASSAGES)


@pytest.fixture(scope="module")
def address(engine):
    with serving(make_app(engine)) as address:
        yield address


DOCUMENT = {"id": 7, "contents": '"A town"\nOn a river.'}
FOUND = {"result": [[{"document": DOCUMENT, "score": 2.5}]]}


def test_the_same_hits_as_the_engine_itself(engine, address):
    remote = RemoteSearch(f"{address}/retrieve", batch_size=7)  # six requests at once
    assert remote.search_batch(QUERIES, k=3) == engine.search_batch(QUERIES, k=3)
    assert remote.search("river number3 \u00fc") == engine.search("river number3 \u00fc")
    assert remote.search("") == [] and remote.search_batch([]) == []


def test_many_callers_share_requests_and_get_their_own_hits(engine, address):
    remote, faults = RemoteSearch(f"{address}/retrieve", connections=2, batch_size=16), []

    def call(n):
        for i in range(10):
            queries, k = [QUERIES[(n + i + j) % len(QUERIES)] for j in range(1 + n % 20)], 1 + n % 3
            if remote.search_batch(queries, k) != engine.search_batch(queries, k):
                faults.append(n)

    threads = [threading.Thread(target=call, args=(n,)) for n in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults and not remote._queue


def test_waiting_queries_travel_together():
    def slow(handler):
        time.sleep(0.3)
        many(handler)

    def many(handler):
        answer({"result": [[{"id": q, "contents": q}] for q in json.loads(asked[-1][2])["queries"]]})(handler)

    with scripted(slow, many) as (url, asked):
        remote, got = RemoteSearch(url, connections=1), {}
        threads = [threading.Thread(target=lambda q=f"q{n}": got.update({q: remote.search(q)})) for n in range(9)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert {q: [h.passage.id for h in hits] for q, hits in got.items()} == {f"q{n}": [f"q{n}"] for n in range(9)}
    assert len(asked) < 9


def test_wire_format(address):
    def ask(body):
        return httpx.post(f"{address}/retrieve", json=body).json()["result"]

    with_scores = ask({"queries": ["number3", "number4"], "topk": 1, "return_scores": True})
    assert with_scores[0][0]["document"] == {"id": "3", "contents": f'"Town 3"\n{PASSAGES[3].text}'}
    assert with_scores[1][0]["score"] > 0
    assert ask({"queries": ["number3"]}) == [[with_scores[0][0]["document"]]]
    assert ask({"queries": ["number3"], "topk": None, "return_scores": None}) == [[with_scores[0][0]["document"]]]
    health = httpx.get(f"{address}/health").json()
    assert health == {"status": "ok", "engine": "BM25Search"}


@pytest.mark.parametrize(
    "body, status, what",
    [
        (b"{", 400, "not JSON"),
        (b"[" * 100_000, 400, "not JSON"),
        (b"[1]", 422, "not a JSON object"),
        (b"{}", 422, "queries: expected a list of texts"),
        (b'{"queries": "x"}', 422, "queries: expected a list of texts"),
        (b'{"queries": [1]}', 422, "queries: expected a list of texts"),
        (json.dumps({"queries": ["x"] * 1025}).encode(), 422, "at most 1024"),
        (b'{"queries": ["x"], "topk": 0}', 422, "topk: expected a whole number from 1 to 100"),
        (b'{"queries": ["x"], "topk": true}', 422, "topk"),
        (b'{"queries": ["x"], "topk": 101}', 422, "topk"),
        (b'{"queries": ["x"], "return_scores": 1}', 422, "return_scores"),
        (b'{"queries": ["' + b"x" * (1 << 20) + b'"]}', 413, "larger than"),
    ],
)
def test_bad_requests(address, body, status, what):
    response = httpx.post(f"{address}/retrieve", content=body)
    assert response.status_code == status and what in response.json()["error"]


fields = st.sampled_from(["queries", "topk", "return_scores", "x"])
values = st.none() | st.booleans() | st.integers() | st.floats() | st.text()


@settings(max_examples=60, deadline=None)
@given(st.recursive(values, lambda inner: st.lists(inner) | st.dictionaries(fields, inner), max_leaves=20))
def test_no_body_breaks_the_parser(body):
    try:
        parsed = server._parse(json.dumps(body).encode())
    except server._Refused as e:
        assert e.status in (400, 422)
    else:
        assert 1 <= parsed["topk"] <= 100 and all(isinstance(q, str) for q in parsed["queries"])


def test_an_engine_that_fails_behind_the_server():
    class Broken(Engine):
        def search_batch(self, queries, k=3):
            raise SearchError("its disk is full")

    with serving(make_app(Broken())) as address:
        with pytest.raises(
            SearchError,
            match=r"search server http.*: HTTP status 502: the engine could not "
            r"answer: its disk is full \(after 2 tries\)",
        ):
            RemoteSearch(f"{address}/retrieve", retries=1).search("x")


@pytest.mark.parametrize(
    "body, expected",
    [
        (FOUND, (Passage("7", "A town", "On a river."), 2.5)),
        ({"result": [[DOCUMENT]]}, (Passage("7", "A town", "On a river."), 1.0)),  # neither score nor wrapper
        ({"result": [[{"document": DOCUMENT}]]}, (Passage("7", "A town", "On a river."), 1.0)),
        ({"result": [[{"id": "x", "title": "A", "text": "B"}]]}, (Passage("x", "A", "B"), 1.0)),
        ({"result": [[{"document": {"id": "x", "contents": "bare"}, "score": 1}]]}, (Passage("x", "", "bare"), 1.0)),
        ({"result": [[{"id": "x", "contents": "half \ud800"}]]}, (Passage("x", "", "half ?"), 1.0)),
    ],
)
def test_both_response_forms(body, expected):
    with scripted(answer(body)) as (url, asked):
        (hit,) = RemoteSearch(url).search("a town?", k=2)
    assert (hit.passage, hit.score) == expected
    assert json.loads(asked[0][2]) == {"queries": ["a town?"], "topk": 2, "return_scores": True}


def test_a_document_without_id_gets_a_lasting_one():
    with scripted(answer({"result": [[{"contents": "a"}, {"contents": "b"}, {"contents": "a"}]]})) as (url, _):
        ids = [h.passage.id for h in RemoteSearch(url).search("x")]
    assert ids[0] == ids[2] != ids[1]


@pytest.mark.parametrize(
    "body, what",
    [
        ({"results": []}, "not of the form"),
        ({"result": 5}, "not of the form"),
        ({"result": [[{"score": 1}]]}, "not of the form"),
        ({"result": [[{"id": 1, "contents": 5}]]}, "not of the form"),
        ([1], "not of the form"),
        ({"result": []}, "0 results for 1 queries"),
    ],
)
def test_an_answer_of_another_form(body, what):
    with scripted(answer(body)) as (url, asked), pytest.raises(SearchError, match=what):
        RemoteSearch(url).search("x")
    assert len(asked) == 1  # asking again would not help


@pytest.mark.parametrize("fault", FAULTS)
def test_a_passing_fault_is_tried_again(fault):
    with scripted(FAULTS[fault], FAULTS[fault], answer(FOUND)) as (url, asked):
        assert len(RemoteSearch(url).search("x")) == 1
    assert len(asked) == 3


@pytest.mark.parametrize("fault", FAULTS)
def test_a_lasting_fault_is_a_clear_error(fault):
    with scripted(FAULTS[fault]) as (url, asked):
        with pytest.raises(SearchError, match=r"^search server http://127.0.0.1:\d+/retrieve: .*\(after 3 tries\)$"):
            RemoteSearch(url, retries=2).search("x")
    assert len(asked) == 3


def test_a_server_that_asks_for_patience_gets_it():
    patience = answer({}, 429, [("Retry-After", "0.4")])
    with scripted(patience, answer(FOUND)) as (url, asked):
        assert RemoteSearch(url).search("x")
    assert asked[1][3] - asked[0][3] >= 0.4
    with scripted(answer({}, 429, [("Retry-After", "3600")])) as (url, asked):
        with pytest.raises(SearchError, match="HTTP status 429 .after 1 try; the next one would come after the 10 s"):
            RemoteSearch(url).search("x")
    assert not any(map(http._retry_after, ("Wed, 21 Oct 2015 07:28:00 GMT", "soon", "-1", None)))
    assert http._retry_after("Wed, 21 Oct 2099 07:28:00 GMT") > 1e9


@pytest.mark.parametrize("status, what", [(404, "status 404"), (401, "status 401"), (302, "status 302")])
def test_a_status_that_will_not_pass(status, what):
    with scripted(answer({}, status, [("Location", "http://127.0.0.1:1/")])) as (url, asked):
        with pytest.raises(SearchError, match=what):
            RemoteSearch(url).search("x")
    assert len(asked) == 1


@pytest.mark.parametrize("body, what", [({"detail": "Not Found"}, ": Not Found"), (b"<html>", "")])
def test_a_wrong_path_is_named(body, what):
    with scripted(answer(body, 404)) as (url, _):
        with pytest.raises(SearchError, match=f"HTTP status 404{what}; expected path: /retrieve$"):
            RemoteSearch(url.replace("/retrieve", "/search")).search("x")


def test_no_key_in_the_log(caplog):
    caplog.set_level(logging.DEBUG)
    with scripted(answer({}, 302, [("Location", "http://me:secret@127.0.0.1/?key=secret")])) as (url, asked):
        with pytest.raises(SearchError, match="status 302"):
            RemoteSearch(url.replace("//", "//me:secret@") + "?api_key=secret").search("x")
    assert len(asked) == 1 and "HTTP Request: POST http://***@127.0.0.1" in caplog.text
    assert "Location" in caplog.text and "secret" not in caplog.text


def test_no_proxy_for_this_machine(monkeypatch):
    for name in ("http_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with scripted(answer(FOUND)) as (url, _):
        assert RemoteSearch(url, retries=0).search("x")


@pytest.mark.parametrize(
    "body, what",
    [
        ({"error": "too \n many"}, "status 422: too many"),
        ({"detail": "too many"}, "status 422: too many"),
        ({"error": "x" * 999}, "status 422: x{200}$"),
        ([1], "status 422$"),
        ({"detail": [1]}, "status 422$"),
        (b"<html>", "status 422$"),
    ],
)
def test_what_the_server_says_about_a_refusal_is_passed_on(body, what):
    with scripted(answer(body, 422)) as (url, _), pytest.raises(SearchError, match=what):
        RemoteSearch(url).search("x")


def test_the_address(address):
    assert RemoteSearch(address).search("river number3") == RemoteSearch(f"{address}/retrieve").search("river number3")
    secret = RemoteSearch("http://me:secret@127.0.0.1:1/retrieve?api_key=secret", retries=0)
    assert secret.name == "RemoteSearch(http://127.0.0.1:1/retrieve)"
    with pytest.raises(SearchError) as e:
        secret.search("x")
    assert "secret" not in str(e.value)
    with scripted(answer(FOUND)) as (url, asked):
        RemoteSearch(url + "?api_key=secret").search("x")
    assert asked[0][0] == "/retrieve?api_key=secret"
    with scripted(answer(FOUND)) as (url, asked):
        for end in ("/", "", "/?api_key=secret"):
            RemoteSearch(url.removesuffix("/retrieve") + end).search("x")
    assert [path for path, *_ in asked] == ["/retrieve", "/retrieve", "/retrieve?api_key=secret"]
    for url in ("file:///etc/passwd", "127.0.0.1:8000", "http:///retrieve", "http://h:99999/secret", "http://no host"):
        with pytest.raises(ValueError, match="url: expected http://host:port/retrieve") as e:
            RemoteSearch(url)
        assert "secret" not in str(e.value)
    for numbers in ({"timeout": 0}, {"retries": -1}, {"connections": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="at least"):
            RemoteSearch(address, **numbers)


def test_long_queries_fit_into_the_servers_requests(engine, address):
    remote = RemoteSearch(address, connections=1)
    long = ["\u00fc river number3 " * 3000] * 20  # over a megabyte as JSON
    assert remote.search_batch(long) == engine.search_batch(long)
    errors, threads = [], []

    def call(query):
        try:
            assert remote.search(query) == engine.search(query)
        except SearchError as e:
            errors.append(str(e))

    for query in ["x " * 1_000_000, *QUERIES[:9]]:  # the first is refused, and alone
        threads.append(threading.Thread(target=call, args=(query,)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert len(errors) == 1 and "HTTP status 413: the body is larger than 1048576 bytes" in errors[0]
    with pytest.raises(SearchError, match="status 422: topk: expected a whole number from 1 to 100"):
        remote.search("x", k=500)


def test_a_line_break_in_a_title():
    with serving(make_app(BM25Search([Passage("1", "A\ntown", "On a\nriver.")]))) as address:
        assert RemoteSearch(address).search("river")[0].passage == Passage("1", "A town", "On a\nriver.")


def dripping_body(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    for _ in range(80):
        handler.wfile.write(b" ")
        time.sleep(0.1)


def dripping_head(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
    for _ in range(80):
        handler.wfile.write(b"x")
        time.sleep(0.1)


@pytest.mark.parametrize("slow", [sleeping, dripping_body, dripping_head])
def test_nothing_hangs_longer_than_its_timeout(slow):
    with scripted(slow) as (url, _):
        remote, begun = RemoteSearch(url, timeout=0.5), time.monotonic()
        with pytest.raises(SearchError, match="within 0.5 s|the connection broke"):
            remote.search("x")
    assert time.monotonic() - begun < 7  # of the 8 s that the server would take


def test_an_answer_that_is_too_large(monkeypatch):
    monkeypatch.setattr(http, "MAX_RESPONSE", 100_000)
    with scripted(answer(b" " * 200_000)) as (url, _), pytest.raises(SearchError, match="larger than 100000 bytes"):
        RemoteSearch(url).search("x")


def test_no_server():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{s.getsockname()[1]}/retrieve"
    with pytest.raises(SearchError, match="no connection; is the server running"):
        RemoteSearch(url, retries=1).search("x")
    with pytest.raises(ValueError, match="k must be at least 1"):
        RemoteSearch(url).search("x", k=0)


def start(index, port, *more):
    """``searchr1 serve`` as a user starts it; returns when it answers."""
    process = subprocess.Popen(
        [sys.executable, "-m", "searchr1_lib", "serve", "--index", str(index), "--port", str(port), *more],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == f"BM25Search at http://127.0.0.1:{port}/retrieve (Ctrl+C ends it)\n"
    for _ in range(600):
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                return process
        except httpx.TransportError:
            assert process.poll() is None, "the server ended"
            time.sleep(0.1)
    process.kill()
    raise AssertionError("the server did not start")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_several_workers_share_an_index(engine, tmp_path):
    """New connections go to either, and both answer rightly."""
    engine.save(tmp_path / "index")
    port = free_port()
    process = start(tmp_path / "index", port, "--workers", "2")
    try:
        workers = set()
        for n in range(400):
            hits = RemoteSearch(f"http://127.0.0.1:{port}/retrieve").search(QUERIES[n % len(PASSAGES)], k=1)
            assert hits[0].passage == PASSAGES[n % len(PASSAGES)]
            for connection in psutil.net_connections("tcp"):
                if connection.laddr.port == port and connection.status == "ESTABLISHED" and connection.pid:
                    workers.add(connection.pid)
            if len(workers) == 2:
                break
        assert len(workers) == 2 and process.pid not in workers
    finally:
        process.terminate()
        assert process.wait(20) is not None


def test_killed_and_restarted_under_64_callers(engine, tmp_path):
    """Every query is answered rightly or fails with a clear error, and all callers come back."""
    engine.save(tmp_path / "index")
    port = free_port()
    process = start(tmp_path / "index", port)
    remote = RemoteSearch(f"http://127.0.0.1:{port}/retrieve", timeout=8)
    stop, right, errors, faults = threading.Event(), [], [], []

    def call(n):
        while not stop.is_set():
            query = n % len(PASSAGES)
            try:
                hits = remote.search(QUERIES[query], k=1)
                (right if hits and hits[0].passage == PASSAGES[query] else faults).append(n)
            except SearchError as e:
                errors.append(str(e))
            except Exception as e:
                faults.append(e)

    def answered(more_than):
        for _ in range(600):
            if len(right) > more_than:
                return
            time.sleep(0.1)

    callers = [threading.Thread(target=call, args=(n,), daemon=True) for n in range(64)]
    try:
        for caller in callers:
            caller.start()
        answered(0)
        process.send_signal(signal.SIGKILL)
        process.wait()
        before = len(right)
        process = start(tmp_path / "index", port)
        answered(before)
        stop.set()
        for caller in callers:
            caller.join(20)
        assert not any(caller.is_alive() for caller in callers), "a caller hangs"
    finally:
        stop.set()
        process.kill()
        process.wait()
    assert not faults and before > 0 and len(right) > before
    assert all("no connection" in e or "the connection broke" in e or "no answer within" in e for e in errors)


def test_the_command_refuses_a_folder_without_an_index(tmp_path):
    for arguments, what in (([], "holds neither an index"), (["--port", "99999"], "--port: expected a number from 1")):
        out = subprocess.run(
            [sys.executable, "-m", "searchr1_lib", "serve", "--index", str(tmp_path), *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert out.returncode == 2 and what in out.stderr and "Traceback" not in out.stderr


@pytest.mark.parametrize("slow", [dripping_body, dripping_head])
def test_a_server_that_drips_does_not_block_the_next_call(slow):
    """Each connection is given up at its deadline: neither a later call nor the program's end has to wait."""
    with scripted(slow, slow, answer(FOUND)) as (url, _):
        remote = RemoteSearch(url, timeout=0.5, connections=1, retries=0)
        for _ in range(2):
            with pytest.raises(SearchError):
                remote.search("x")
        time.sleep(0.05)
        assert remote.search("x")
        begun = time.monotonic()
        remote._client.threads.shutdown(wait=True)
        assert time.monotonic() - begun < 1


@pytest.mark.parametrize("bad", [0, -1, float("nan"), float("inf"), True, "3", None, 1e300])
def test_bad_numbers_are_named(bad):
    for name in ("timeout", "retries", "connections", "batch_size"):
        if (name, bad) != ("retries", 0):
            with pytest.raises(ValueError, match=f"^{name} must be"):
                RemoteSearch(**{name: bad})


@pytest.mark.parametrize(
    "path, status", [("/", 404), ("//", 404), ("", 404), ("/search", 404), ("/health", 405), ("/retrieve/", 307)]
)
def test_a_wrong_path_names_the_right_one(address, path, status):
    if path in ("/", "//", ""):
        assert RemoteSearch(address + path).search("river number3")
        return
    with pytest.raises(SearchError, match=f"HTTP status {status}.*; expected path: /retrieve"):
        RemoteSearch(address + path).search("x")


def test_a_client_that_hangs_up_leaves_no_traceback(engine, tmp_path):
    code = "import sys, test_search_remote as t; t.serve_until_told(sys.argv[1])"
    engine.save(tmp_path)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-c", code, tmp_path]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        host, _, port = process.stdout.readline().strip().removeprefix("http://").partition(":")
        head = b"POST /retrieve HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"
        for sent in (head, head + b'{"queries"', b"POST /retr", head + b'{"queries": ["x"]}' + b" " * 82):
            with socket.create_connection((host, int(port))) as caller:
                caller.sendall(sent)
        assert httpx.get(f"http://{host}:{port}/health").status_code == 200
        log = process.communicate("\n", timeout=20)[1]
    assert "Traceback" not in log and "Exception" not in log


def serve_until_told(index):
    with serving(make_app(BM25Search.load(index))) as address:
        print(address, flush=True)
        sys.stdin.readline()


@pytest.mark.parametrize("score", [b"NaN", b"Infinity", b"1e999", b"-1e999", b"null"])
def test_a_score_that_is_no_number_gives_way_to_the_rank(score):
    with scripted(answer(b'{"result": [[{"document": {"id": 1, "contents": "x"}, "score": %s}]]}' % score)) as (url, _):
        (hit,) = RemoteSearch(url).search("x")
    assert hit.score == 1.0


@pytest.mark.parametrize("score", [b"1" + b"0" * 400, b'"x"', b"[]", b"9" * 5000])
def test_a_score_that_cannot_be_one_is_a_clear_error(score):
    with scripted(answer(b'{"result": [[{"document": {"id": 1, "contents": "x"}, "score": %s}]]}' % score)) as (url, _):
        with pytest.raises(SearchError, match="not of the form|not JSON"):
            RemoteSearch(url, retries=0).search("x")


def test_the_server_serves_what_anybodys_engine_returns():
    class Odd(Engine):
        def search_batch(self, queries, k=3):
            return [[Hit(Passage(7, None, "half \ud800"), np.float32(0.5)), Passage("8", "t", "x")] for _ in queries]

    with serving(make_app(Odd())) as address:
        hits = RemoteSearch(address, retries=0).search("x")
    assert [hit.passage for hit in hits] == [Passage("7", "", "half ?"), Passage("8", "t", "x")]
