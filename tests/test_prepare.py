"""Data folders as the notebooks read them: the common knowledge, the mixed set, public sets with their passages."""

import json
from collections import Counter
from pathlib import Path

import pytest
from test_data import SAMPLES, hotpotqa_row, write

from searchr1_lib.data import load_passages, load_questions
from searchr1_lib.records import Question
from searchr1_lib.rewards import normalize_answer
from searchr1_lib.suite import cli
from searchr1_lib.worlds import prepare

COMMON = load_questions(prepare.DATA / "common_knowledge.jsonl")
SPLITS = ("train", "validation", "test")


def test_common_knowledge_is_well_formed():
    assert 180 <= len(COMMON) <= 250 and all(q.known and q.text.endswith("?") for q in COMMON)
    assert len({normalize_answer(q.text) for q in COMMON}) == len(COMMON)
    assert min(Counter(q.source for q in COMMON).values()) >= 15


def test_every_common_answer_can_be_matched_and_is_not_given_away():
    for q in COMMON:
        answers = [normalize_answer(a) for a in q.answers]
        assert all(answers) and len({a.casefold() for a in q.answers}) == len(q.answers), q
        asked = f" {normalize_answer(q.text)} "
        assert not any(f" {a} " in asked for a in answers), q


def test_the_shipped_mixed_set_is_what_the_generator_makes(tmp_path):
    cli.main(["prepare", "mixed", "--out", str(tmp_path)])
    shipped = prepare.DATA / "real" / "mixed"
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {p.name: p.read_bytes() for p in shipped.iterdir()}


def test_the_mixed_set_keeps_its_splits_apart():
    parts = {split: prepare.load_mixed(split) for split in SPLITS}
    ids = [q.id for part in parts.values() for q in part]
    assert len(set(ids)) == len(ids)
    assert sum(q.known for part in parts.values() for q in part) == len(COMMON)  # at one half, all of it is used
    known_to = {p.id for p in load_passages(prepare.DATA / "real" / "mixed" / "passages.jsonl")}
    for part in parts.values():
        assert sum(q.known for q in part) * 2 == len(part)
        assert all(q.passages and set(q.passages) <= known_to for q in part if not q.known)
    topics = {split: {q.source for q in part if q.known} for split, part in parts.items()}
    assert topics["train"] == topics["test"] == topics["validation"]


@pytest.mark.parametrize("share", [0.1, 1 / 3, 0.5, 0.8, 0.99])
def test_the_proportion_is_the_one_asked_for(share):
    mixed = prepare.load_mixed("train", share)
    assert sum(q.known for q in mixed) / len(mixed) == pytest.approx(share, abs=1 / len(mixed))
    assert mixed == prepare.load_mixed("train", share) != prepare.load_mixed("train", share, seed=1)


def test_a_mixture_that_cannot_be():
    one = [Question("a", "Who?", ["Ada"])]
    for share in (0, 1, -0.2, 1.5):
        with pytest.raises(ValueError, match="known_share must be between 0 and 1"):
            prepare.mix_questions(one, one, share)
    with pytest.raises(ValueError, match="empty"):
        prepare.mix_questions(one, [])


def test_a_public_set_becomes_a_folder(tmp_path, capsys):
    (tmp_path / "hotpotqa").mkdir()
    write(tmp_path / "hotpotqa" / "train.jsonl", *map(hotpotqa_row, range(5)))
    write(tmp_path / "hotpotqa" / "dev.jsonl", *map(hotpotqa_row, range(10, 14)))
    out = tmp_path / "out"
    cli.main(
        ["prepare", str(tmp_path / "hotpotqa"), "--out", str(out), "--train", "3", "--validation", "1", "--test", "2"]
    )
    parts = {split: load_questions(out / f"{split}.jsonl") for split in SPLITS}
    assert {split: [q.text[-2:].strip("A") for q in part] for split, part in parts.items()} == {
        "train": ["0", "1", "2"],
        "validation": ["3"],
        "test": ["10", "11"],
    }
    ids = {p.id for p in load_passages(out / "passages.jsonl")}
    assert all(len(q.passages) == 2 and set(q.passages) <= ids for part in parts.values() for q in part)
    assert json.loads(capsys.readouterr().out) == json.loads((out / "made.json").read_text())


def test_a_set_without_a_training_split(tmp_path, capsys):
    rows = [{"id": f"test_{n}", "question": f"Who is {n}?", "golden_answers": ["Ada"]} for n in range(4)]
    (tmp_path / "popqa").mkdir()
    file = write(tmp_path / "popqa" / "test.jsonl", *rows)
    corpus = ["--corpus", str(write(tmp_path / "corpus.jsonl", {"id": "p", "title": "Ada", "text": "Ada is."}))]
    for source in ("bamboogle", str(file.parent)):
        assert cli.main(["prepare", source, "--out", str(tmp_path / "out"), *corpus]) == 2
        assert "add --train 0 --validation 0" in capsys.readouterr().err and not (tmp_path / "out").exists()
    for source, counts, splits in (
        (file.parent, (0, 0, 3), {"test": 3}),
        (file, (1, 1, 2), {"train": 1, "validation": 1, "test": 2}),
    ):
        asked = [x for name, n in zip(SPLITS, counts) for x in (f"--{name}", str(n))]
        cli.main(["prepare", str(source), "--out", str(tmp_path / "out"), *corpus, *asked])
        assert json.loads(capsys.readouterr().out)["questions"] == splits


def rows_of(number, first=0):
    return [hotpotqa_row(n) for n in range(first, first + number)]


def prepared(capsys, *arguments):
    """Its exit code, what it printed, and what it complained of."""
    try:
        code = cli.main(["prepare", *map(str, arguments)])
    except SystemExit as e:
        code = e.code
    return code, *capsys.readouterr()


def parts_of(out):
    return {split: load_questions(out / f"{split}.jsonl") for split in SPLITS if (out / f"{split}.jsonl").exists()}


def test_a_folder_with_training_questions_alone_shares_them_out(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    write(tmp_path / "mine" / "train.jsonl", *rows_of(20))
    code, _, error = prepared(capsys, tmp_path / "mine", "--out", tmp_path / "out")
    parts = parts_of(tmp_path / "out")
    ids = [q.id for part in parts.values() for q in part]
    assert code == 0 and len(ids) == len(set(ids)) == 20 and list(parts) == list(SPLITS)
    assert error == "fewer questions than asked for: train 16 of 1000, validation 1 of 100, test 3 of 200\n"


@pytest.mark.parametrize("there, split", [(300, (231, 23, 46)), (3, (1, 1, 1)), (1299, (1000, 99, 199))])
def test_a_file_with_fewer_rows_than_asked_for_is_shared_out(tmp_path, capsys, there, split):
    file = write(tmp_path / "q.jsonl", *rows_of(there))
    code, made, error = prepared(capsys, file, "--out", tmp_path / "out")
    assert code == 0 and tuple(json.loads(made)["questions"].values()) == split and "fewer questions" in error
    assert [len(part) for part in parts_of(tmp_path / "out").values()] == list(split)


def test_too_few_rows_for_the_splits_and_none_asked_for(tmp_path, capsys):
    file = write(tmp_path / "q.jsonl", *rows_of(2))
    for more, said in (
        ([], "holds 2 question(s), too few for train, validation, test"),
        (["--train", "0", "--validation", "0", "--test", "0"], "no questions are asked for"),
        (["--train", "-5"], "argument --train: expected a whole number from 0, not '-5'"),
        (["--others", "-1"], "argument --others: expected a whole number from 0, not '-1'"),
        (["--rows", "0"], "argument --rows: expected a whole number from 1, not '0'"),
        (["--test", "nan"], "argument --test: expected a whole number from 0, not 'nan'"),
    ):
        code, _, error = prepared(capsys, file, "--out", tmp_path / "out", *more)
        assert code == 2 and said in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_what_is_tested_is_never_taught(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    write(tmp_path / "mine" / "train.jsonl", *rows_of(10))
    again = [row | {"id": f"again {n}", "question": f" {row['question'].upper()}"} for n, row in enumerate(rows_of(3))]
    write(tmp_path / "mine" / "test.jsonl", *again)
    code, _, error = prepared(
        capsys, tmp_path / "mine", "--out", tmp_path / "out", "--train", 9, "--validation", 1, "--test", 3
    )
    parts = parts_of(tmp_path / "out")
    assert code == 0 and [len(part) for part in parts.values()] == [6, 1, 3] and "train 6 of 9" in error
    assert not {q.text for q in parts["train"]} & {q.text.strip().capitalize() for q in parts["test"]}


def test_what_stands_in_the_output_folder_already(tmp_path, capsys):
    mine, out = tmp_path / "mine", tmp_path / "out"
    mine.mkdir()
    write(mine / "train.jsonl", *rows_of(20))
    write(mine / "passages.jsonl", {"id": "p", "title": "", "text": "x"})
    before = {p: p.read_bytes() for p in mine.iterdir()}
    for source, folder, said in (
        (mine, mine, "are one folder or one in the other"),
        (mine, mine / "deep" / "er", "are one folder or one in the other"),
        (mine / "train.jsonl", mine, "are one folder or one in the other"),
        (mine / "train.jsonl", tmp_path, "are one folder or one in the other"),
        ("mixed", mine, "mine holds passages.jsonl, which was not made by this command"),
        ("mixed", mine / "train.jsonl", "train.jsonl holds a file's text"),
        ("nq", mine, "mine holds passages.jsonl"),  # before the hub is asked
    ):
        code, _, error = prepared(capsys, source, "--out", folder)
        assert code == 2 and said in error, error
        assert {p: p.read_bytes() for p in mine.iterdir()} == before and [*tmp_path.iterdir()] == [mine]
    assert prepared(capsys, mine, "--out", out)[0] == 0
    (out / ".made.json.1234.tmp").write_text("of a process that was killed")
    code, made, _ = prepared(capsys, mine, "--out", out, "--train", 20, "--validation", 0, "--test", 0)
    assert code == 0 and json.loads(made)["questions"] == {"train": 20}  # its own folder is made anew, as a whole
    assert sorted(p.name for p in out.iterdir()) == ["made.json", "passages.jsonl", "train.jsonl"]
    (out / "notes.txt").write_text("mine")
    assert "out holds notes.txt" in prepared(capsys, mine, "--out", out)[2] and (out / "notes.txt").exists()
    with pytest.raises(ValueError, match="out holds notes.txt"):
        prepare.write_folder(out, {}, [], {})


def test_a_folder_is_written_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    file = write(tmp_path / "q.jsonl", *rows_of(20))
    assert prepared(capsys, file, "--out", tmp_path / "out")[0] == 0
    before = {p: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    save, saved = prepare.data.save_questions, []

    def full(path, questions):
        if saved:
            raise OSError(28, "No space left on device")
        saved.append(save(path, questions))

    monkeypatch.setattr(prepare.data, "save_questions", full)
    code, _, error = prepared(capsys, file, "--out", tmp_path / "out", "--train", 2)
    assert code == 2 and "No space left" in error
    assert {p: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before and len([*tmp_path.iterdir()]) == 2


def test_what_cannot_be_prepared_is_said_in_one_line(tmp_path, capsys):
    for arguments in (["nq"], [str(tmp_path / "none.jsonl")], ["mixed", "--known-share", "2"]):
        assert cli.main(["prepare", *arguments, "--out", str(tmp_path / "out")]) == 2
        assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="the samples in ../shared are not here")
def test_a_sample_of_hotpotqa_from_search_to_evaluation(tmp_path):
    """Real questions on the real machinery; the tiny model knows nothing of them, so only the mechanics count."""
    from searchr1_lib import LocalSearch, load_policy
    from searchr1_lib.study.evaluate import evaluate

    sample, out = SAMPLES / "hotpotqa_train100", tmp_path / "hotpotqa"
    questions, passages = prepare.load_set(
        str(sample / "questions.jsonl"),
        {"train": 6, "validation": 2, "test": 4},
        corpus=str(sample / "corpus.jsonl"),
        others=1,
    )
    prepare.write_folder(out, questions, passages, {})
    assert len(passages) == 994 and [len(questions[s]) for s in SPLITS] == [6, 2, 4]
    policy = load_policy(str(Path(__file__).resolve().parents[1] / "data" / "tiny_qwen"))
    report = evaluate(
        policy,
        load_questions(out / "test.jsonl"),
        LocalSearch(out),
        first_action="search",
        max_turns=1,
        max_turn_tokens=24,
    )
    assert len(report.rows) == 4 and all(row["known"] is None and row["need"] is None for row in report.rows)
    assert sum(len(t.searches) for t in report.trajectories) > 0
    assert all(call.result for t in report.trajectories for call in t.searches)


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="the samples in ../shared are not here")
def test_the_part_of_a_corpus_about_some_questions(tmp_path):
    sample = SAMPLES / "hotpotqa_train100"
    counts = {"train": 10, "validation": 0, "test": 0}
    questions, part = prepare.load_set(
        str(sample / "questions.jsonl"), counts, corpus=str(sample / "corpus.jsonl"), others=10
    )
    gold = {id for q in questions["train"] for id in q.passages}
    assert list(questions) == ["train"] and gold <= {p.id for p in part} and 110 < len(part) < 300


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="the samples in ../shared are not here")
@pytest.mark.notebooks
def test_notebooks_01_and_02_run_on_a_sample_of_hotpotqa(tmp_path, monkeypatch):
    from searchr1_lib import suite

    sample, out = SAMPLES / "hotpotqa_train100", tmp_path / "hotpotqa"
    cli.main(
        [
            "prepare",
            str(sample / "questions.jsonl"),
            "--corpus",
            str(sample / "corpus.jsonl"),
            "--others",
            "1",
            "--train",
            "20",
            "--validation",
            "5",
            "--test",
            "20",
            "--out",
            str(out),
        ]
    )
    monkeypatch.setenv("SEARCHR1_RUNS", str(tmp_path))
    given = [f"data={out}", "eval_questions=4", "dense_passages=40", "ann_vectors=400"]
    _, outcomes = suite.run_suite("smoke", "hotpotqa", given, only=["01", "02"])
    assert [(o.notebook[:2], o.error) for o in outcomes] == [("01", None), ("02", None)]
