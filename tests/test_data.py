"""Questions and corpora: every form, every schema error with its file, line and field."""

import gzip
import json
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1_lib import data
from searchr1_lib.data import DataError, save_passages, save_questions
from searchr1_lib.records import Passage, Question
from searchr1_lib.worlds import public
from searchr1_lib.worlds.public import load_passages, load_questions, load_with_passages, select_passages

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
@given(
    st.lists(
        st.builds(Passage, words, st.text(st.characters(codec="utf-8")), words), min_size=1, unique_by=lambda p: p.id
    )
)
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
    assert data.load_questions(path) == load_questions(path)  # the core's own reader: files in these forms only


def test_a_single_answer_needs_no_list_and_may_have_aliases(tmp_path):
    rows = (
        {"id": "1", "text": "Who?", "answers": "Ada"},
        {"id": "2", "text": "?", "answer": "A", "answer_aliases": ["B"]},
    )
    path = write(tmp_path / "q.jsonl", *rows)
    assert [q.answers for q in load_questions(path)] == [["Ada"], ["A", "B"]]
    assert data.load_questions(path) == load_questions(path)


STORED = ['["Ada", "A. L."]', "['Ada', 'A. L.']", "['Ada' 'A. L.']", "[\"Ada\"\n 'A. L.']", ' ["Ada","A. L."] ']


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("name", ["answers", "golden_answers", "answer"])
def test_a_list_of_answers_that_was_stored_as_text_is_that_list(tmp_path, name, stored):
    path = write(tmp_path / "q.jsonl", {"id": "1", "question": "Who?", name: stored})
    assert load_questions(path)[0].answers == data.load_questions(path)[0].answers == ["Ada", "A. L."]


@pytest.mark.parametrize("answer", ["[1, 2]", "[x]", '["a", 1]', "['a'", '"a"', "['\\x']", "[citation needed]"])
def test_an_answer_that_only_begins_like_a_list_is_one_answer(tmp_path, answer):
    assert load_questions(write(tmp_path / "q.jsonl", QUESTION | {"answers": answer}))[0].answers == [answer]


def test_aliases_may_be_one_text_and_stand_beside_a_list(tmp_path):
    rows = ({"id": "1", "text": "?", "answer": "A", "answer_aliases": "Beta"},)
    rows += ({"id": "2", "text": "?", "golden_answers": ["A"], "answer_aliases": '["B", "C"]'},)
    got = load_questions(write(tmp_path / "q.jsonl", *rows))
    assert [q.answers for q in got] == [["A", "Beta"], ["A", "B", "C"]]


def test_an_empty_alias_is_left_out(tmp_path):
    row = {"id": "q1", "question": "Who?", "golden_answers": ["Ada", "", " ", "A. L."]}
    assert load_questions(write(tmp_path / "q.jsonl", row))[0].answers == ["Ada", "A. L."]


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


@pytest.mark.parametrize(
    "row, field",
    [
        ({"text": "Who?", "answers": ["Ada"]}, "'id' is missing"),
        ({"id": "q1", "answers": ["Ada"]}, "'text' is missing"),
        ({"id": "q1", "text": "Who?"}, "'answers' is missing"),
        (QUESTION | {"text": " "}, "'text' is empty"),
        (QUESTION | {"text": 3}, "'text': expected text, found int"),
        (QUESTION | {"answers": []}, "'answers': expected a list with at least one"),
        (QUESTION | {"answers": ["", " "]}, "'answers': expected a list with at least one"),
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
    ],
)
def test_a_broken_row_is_named_and_skipped_only_on_request(tmp_path, row, field):
    path = write(tmp_path / "q.jsonl", QUESTION | {"id": "q0"}, "", row, QUESTION | {"id": "q2"})
    with pytest.raises(DataError) as e:
        load_questions(path)
    assert f"{path}, line 3: " in str(e.value) and field in str(e.value)
    with pytest.warns(UserWarning, match="1 broken row.*line 3"):
        assert [q.id for q in load_questions(path, on_error="skip")] == ["q0", "q2"]


@pytest.mark.parametrize(
    "row, field",
    [
        ({"id": "p"}, "'text' is missing"),
        ({"id": "p", "title": 3, "text": "x"}, "'title': expected text"),
        ({"id": "p", "contents": ["x"]}, "'contents': expected text, found list"),
    ],
)
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


# -- public question sets by name: the layouts of FlashRAG and Search-R1, read by the hub's own client ----------------


def hotpotqa_row(number, texts="sentences"):
    """FlashRAG's row; 2WikiMultihopQA calls the sentences "content". Two gold titles, one of them named twice."""
    titles = [f"Gold A{number}", "Common distractor", f"Gold B{number}"]
    return {
        "id": f"dev_{number}",
        "question": f"Who made A{number}",
        "golden_answers": ["Ada", "A. L."],
        "metadata": {
            "type": "bridge",
            "supporting_facts": {"title": [titles[2], titles[0], titles[2]], "sent_id": [0, 1, 2]},
            "context": {"title": titles, texts: [[f"{t} is.", " It stands."] for t in titles]},
        },
    }


def musique_row(number, answerable=True):
    steps = [
        {
            "id": n,
            "question": "?",
            "answer": "Ada",
            "paragraph_support_idx": 2 - n,
            "support_paragraph": {"title": f"T{n}", "paragraph_text": f"Step {n} of {number}.", "idx": 2 - n},
        }
        for n in (0, 1)
    ]
    return {
        "id": f"dev_{number}",
        "question": "Who?",
        "golden_answers": ["Ada"],
        "metadata": {"answerable": answerable, "question_decomposition": steps},
    }


@pytest.fixture(scope="module")
def flashrag(tmp_path_factory):
    """A folder laid out as the repository on the hub: a folder a set, its splits named in the card's head."""
    root = tmp_path_factory.mktemp("flashrag")
    bare = hotpotqa_row(0)
    bare["metadata"]["context"] = {"title": [], "sentences": []}  # a few rows of the real set come so
    plain = {"id": "test_0", "question": "Who?", "golden_answers": ["Ada"], "metadata": {}}
    rows = {
        "nq/test": [plain, plain | {"id": "test_1"}],
        "nq/train": [plain | {"id": "train_0"}],
        "triviaqa/test": [plain],
        "popqa/test": [plain | {"metadata": {"subj": "Ada"}}],
        "bamboogle/test": [plain],
        "hotpotqa/dev": [hotpotqa_row(1), bare, hotpotqa_row(2)],
        "2wikimultihopqa/dev": [hotpotqa_row(1, "content")],
        "musique/dev": [musique_row(0), musique_row(1)],
    }
    card = "---\nconfigs:\n"
    for name in dict.fromkeys(path.split("/")[0] for path in rows):
        card += f"- config_name: {name}\n  data_files:\n"
        (root / name).mkdir()
        for path in (p for p in rows if p.startswith(f"{name}/")):
            card += f"  - split: {path.split('/')[1]}\n    path: {path}.jsonl\n"
            write(root / f"{path}.jsonl", *rows[path])
    (root / "README.md").write_text(card + "---\n", encoding="utf-8")
    return root


@pytest.mark.parametrize("name", [name for name in public.SETS if name != "search-r1"])
def test_the_seven_sets_by_name_and_from_a_folder_are_the_same(flashrag, monkeypatch, name):
    monkeypatch.setattr(public, "_FLASHRAG", str(flashrag))
    by_name = load_questions(name)
    assert by_name == load_questions(flashrag / name) == load_questions(flashrag / name / f"{public.SETS[name]}.jsonl")
    assert all(q.source == name and q.id.startswith(f"{name}/") and q.known is None for q in by_name)
    assert load_questions(name, limit=1) == by_name[:1]


def test_another_split_of_a_set(flashrag, monkeypatch):
    monkeypatch.setattr(public, "_FLASHRAG", str(flashrag))
    assert load_questions("nq", split="train") == load_questions(flashrag / "nq", split="train") != load_questions("nq")
    with pytest.raises(DataError, match="cannot stream split 'train'"):
        load_questions("popqa", split="train")
    with pytest.raises(FileNotFoundError, match="train.jsonl: no such file"):
        load_questions(flashrag / "popqa", split="train")


@pytest.mark.parametrize("name", ["hotpotqa", "2wikimultihopqa"])
def test_questions_with_the_passages_that_their_rows_carry(flashrag, name):
    questions, passages = load_with_passages(flashrag / name)
    by_id = {p.id: p for p in passages}
    assert [by_id[id].title for id in questions[0].passages] == ["Gold B1", "Gold A1"] and questions[0].hops == 2
    assert by_id[questions[0].passages[0]].text == "Gold B1 is. It stands."
    assert sorted(p.title for p in passages).count("Common distractor") == 1  # of several rows, kept once
    assert len(passages) == (5 if name == "hotpotqa" else 3)
    assert load_questions(flashrag / name) == questions


def test_musique_in_both_layouts(flashrag, tmp_path):
    questions, passages = load_with_passages(flashrag / "musique")
    texts = {p.id: p.text for p in passages}
    assert [[texts[id] for id in q.passages] for q in questions] == [
        [f"Step 0 of {n}.", f"Step 1 of {n}."] for n in (0, 1)
    ]
    paragraphs = [
        {"idx": n, "title": f"T{n}", "paragraph_text": text, "is_supporting": n > 0}
        for n, text in enumerate(["A distractor.", "Second.", "First."])
    ]
    own = {
        "id": "2hop__1_2",
        "question": "Who?",
        "answer": "Ada",
        "answer_aliases": ["A. L."],
        "paragraphs": paragraphs,
        "question_decomposition": [{"paragraph_support_idx": 2}, {"paragraph_support_idx": 1}],
    }
    (question,), passages = load_with_passages(write(tmp_path / "musique.jsonl", own))
    texts = {p.id: p.text for p in passages}
    assert question.answers == ["Ada", "A. L."] and question.hops == 2 and len(passages) == 3
    assert [texts[id] for id in question.passages] == ["First.", "Second."]


CONTEXT = [["Bob", ["Bob is.", " He stood."]], ["Cy", ["Cy sat."]], ["Ada", ["Ada is."]]]
COLUMNS = {"title": [t for t, _ in CONTEXT], "sentences": [s for _, s in CONTEXT]}
LAYOUTS = {
    "as it was published": {"context": CONTEXT, "supporting_facts": [["Ada", 0], ["Bob", 1], ["Ada", 0]]},
    "on the hub": {"context": COLUMNS, "supporting_facts": {"title": ["Ada", "Bob", "Ada"], "sent_id": [0, 1, 0]}},
    "a struct an entry": {
        "context": [{"title": t, "sentences": s} for t, s in CONTEXT],
        "supporting_facts": [["Ada", 0], ["Bob", 1]],
    },
    "texts for sentences": {
        "context": [[t, " ".join(map(str.strip, s))] for t, s in CONTEXT],
        "supporting_facts": [["Ada", 0], ["Bob", 1]],
    },
}


IN_FILES = [(kind, layout) for layout in LAYOUTS for kind in ("jsonl", "parquet")]
IN_FILES = [f for f in IN_FILES if f[0] == "jsonl" or f[1] in ("on the hub", "a struct an entry")]  # no mixed lists


@pytest.mark.parametrize("kind, layout", IN_FILES)
@pytest.mark.parametrize("id", ["id", "_id"])
def test_hotpotqa_in_every_layout_in_which_it_is_around(tmp_path, layout, id, kind):
    row = {id: "5a8b", "question": "Who?", "answer": "Ada", "type": "bridge", "level": "hard"} | LAYOUTS[layout]
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        row["supporting_facts"] = LAYOUTS["on the hub"]["supporting_facts"]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "q.parquet")
    else:
        write(tmp_path / "q.jsonl", row)
    (question,), passages = load_with_passages(tmp_path / f"q.{kind}")
    by_id = {p.id: p for p in passages}
    assert [(p.title, p.text) for p in passages] == [
        ("Bob", "Bob is. He stood."),
        ("Cy", "Cy sat."),
        ("Ada", "Ada is."),
    ]
    assert (question.id, question.hops, question.answers) == ("5a8b", 2, ["Ada"])
    assert [by_id[id].title for id in question.passages] == ["Ada", "Bob"]


def test_passages_without_titles_and_musique_without_steps(tmp_path):
    plain = {"id": "1", "question": "Who?", "answer": "Ada", "context": ["Ada is.", "Bob is."]}
    (question,), passages = load_with_passages(write(tmp_path / "a.jsonl", plain))
    assert [(p.title, p.text) for p in passages] == [("", "Ada is."), ("", "Bob is.")] and not question.passages
    paragraphs = [{"title": t, "paragraph_text": f"{t}.", "is_supporting": t != "B"} for t in "ABC"]
    musique = {"id": "1", "question": "Who?", "answer": "Ada", "paragraphs": paragraphs}
    steps = {"question_decomposition": [{"paragraph_support_idx": 2}, {"paragraph_support_idx": None}]}
    for row, gold in ((musique, ["A.", "C."]), (musique | steps, ["C."])):
        (question,), passages = load_with_passages(write(tmp_path / "b.jsonl", row))
        assert [{p.id: p.text for p in passages}[id] for id in question.passages] == gold and len(passages) == 3


def test_a_set_by_name_when_the_hub_is_out_of_reach():
    with pytest.raises(DataError, match="hub:RUC-NLPIR/FlashRAG_datasets: cannot stream split 'test'.*local"):
        load_questions("nq", limit=1)


def test_sets_without_passages_say_what_to_do(flashrag):
    with pytest.raises(DataError, match="carry no passages.*RemoteSearch.*select_passages"):
        load_with_passages(flashrag / "nq")


@pytest.mark.parametrize(
    "broken",
    [
        {"context": {"title": ["A"], "sentences": [[1]]}},
        {"context": {"sentences": [["x"]]}},
        {"context": {"title": [None], "sentences": [["x"]]}},
        {"context": [["A"]]},
        {"context": [["A", [1]]]},
        {"context": [["A", ["x"]]], "supporting_facts": [7]},
        {"paragraphs": [{"title": "A"}]},
        {"paragraphs": [], "question_decomposition": [{"paragraph_support_idx": 7}]},
        {"question_decomposition": [{"support_paragraph": "text"}]},
    ],
)
def test_broken_passages_within_a_row_are_named(tmp_path, broken):
    with pytest.raises(DataError, match="line 1: field '(context|question_decomposition|title)'"):
        load_questions(write(tmp_path / "q.jsonl", QUESTION | broken))


def test_search_r1_by_name_although_its_two_files_differ(tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    def row(source, metadata):
        return {
            "id": "x_0",
            "question": "Who?",
            "golden_answers": ["Ada"],
            "data_source": source,
            "prompt": [{"role": "user", "content": "Question: Who?\n"}],
            "ability": "fact-reasoning",
            "reward_model": {"style": "rule", "ground_truth": {"target": ["Ada"]}},
            "extra_info": {"index": 0, "split": "x"},
            "metadata": metadata,
        }

    hotpotqa = hotpotqa_row(1)["metadata"]
    for split, rows in {
        "train": [row("nq", None), row("hotpotqa", hotpotqa)],
        "test": [row("bamboogle", {"subj": "Ada"}), row("popqa", {"subj": "Ada"})],
    }.items():
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{split}.parquet")
    monkeypatch.setattr(public, "_SEARCH_R1", str(tmp_path))
    assert [q.id for q in load_questions("search-r1")] == ["bamboogle/x_0", "popqa/x_0"]
    questions, passages = load_with_passages("search-r1", split="train")
    assert [(q.source, q.hops) for q in questions] == [("nq", 1), ("hotpotqa", 2)] and len(passages) == 3
    assert questions == load_questions(tmp_path / "train.parquet")


def test_a_corpus_by_name_and_its_part_about_the_questions(tmp_path, monkeypatch):
    rows = [
        {"id": str(n), "contents": f'"{title}"\nText {n}.'}
        for n, title in enumerate(
            ["Ada Lovelace", "Penicillin (drug)", "It", "Of", "Analytical Engine", "Penicillin V", "Nowhere", "Else"]
        )
    ]
    (tmp_path / "corpus").mkdir()
    with gzip.open(tmp_path / "corpus" / "wiki-18.jsonl.gz", "wt", encoding="utf-8") as f:
        f.writelines(json.dumps(r) + "\n" for r in rows)
    monkeypatch.setitem(public.CORPORA, "wiki-18", f"hub:{tmp_path / 'corpus'}")
    assert load_passages("wiki-18", limit=3)[0] == Passage("0", "Ada Lovelace", "Text 0.")
    with pytest.raises(ValueError, match="give limit="):
        load_passages("wiki-18")
    questions = [
        Question("a", "Who wrote of the analytical engine? Was it known?", ["Ada Lovelace"]),
        Question("b", "Who discovered penicillin?", ["Alexander Fleming"], passages=["6"]),
    ]
    about = ["0", "1", "4", "6"]
    assert [p.id for p in select_passages("wiki-18", questions, limit=100)] == about
    assert [p.id for p in select_passages("wiki-18", questions, limit=100, others=5)] == sorted({*about, "0", "5"})
    assert [p.id for p in select_passages("wiki-18", questions, limit=2)] == about[:2]


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
