"""Records and the trajectory log: one JSON form, and nothing lost in a crash."""

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchr1_lib.files import TrajectoryLog, write_json_lines, write_whole
from searchr1_lib.records import Hit, Passage, Question, SearchCall, Segment, Trajectory
from searchr1_lib.study.tables import read_parquet, to_dataset, to_parquet


def trajectory(text="<answer> é\u2028 </answer>", logprob=-0.1):
    return Trajectory(
        question=Question("q", "Who?", ["é"], passages=["p"], hops=2, known=False, source="s"),
        prompt_ids=[1, 2],
        completion_ids=[3, 4],
        mask=[1, 0],
        logprobs=[logprob, 0.0],
        segments=[Segment("policy", "answer", text, 0, 0, 2)],
        calls=[SearchCall("q", [Hit(Passage("p", "T", "x\ny"), 1.5)], 0.1, None)],
        answer="é",
        finish_reason="answer",
        reward=1.0,
        rewards={"exact_match": 1.0},
        advantages=[0.5, 0.5],
        group="g",
    )


def test_one_answer_is_not_its_letters_and_a_stored_list_is_a_list():
    assert Question("q", "Capital?", "Paris").answers == ["Paris"]
    assert Question("q", "Capital?", '["Paris", "Lutetia"]').answers == ["Paris", "Lutetia"]
    assert Question("q", "Capital?", ("Paris",), passages="p1").passages == ["p1"]
    for wrong, found in ((1912, "int"), (None, "NoneType"), (["a", 1912], "int"), ({"a": 1}, "dict"), (b"a", "bytes")):
        with pytest.raises(ValueError, match=f"field 'answers': expected text, found {found}"):
            Question("q", "When?", wrong)


@given(st.lists(st.text(st.characters(codec="utf-8"))))
def test_a_list_of_answers_comes_back_from_its_text(answers):
    for stored in (json.dumps(answers), json.dumps(answers, ensure_ascii=False), repr(answers)):
        assert Question("q", "?", stored).answers == answers


def test_reading_a_stored_list_takes_time_in_proportion():
    for text in ("['a' , " * 50_000 + "x]", "[" + " ," * 50_000, "['" + "\\" * 50_000, "[" + "''" * 50_000):
        Question("q", "?", text)


@given(st.text(), st.floats(-50, 0))
def test_a_trajectory_comes_back_equal(text, logprob):
    t = trajectory(text, logprob)
    assert Trajectory.from_dict(json.loads(json.dumps(t.to_dict()))) == t


def test_a_cut_last_line_is_left_out_and_removed_by_the_next_append(tmp_path):
    log = TrajectoryLog(tmp_path / "deep" / "log.jsonl")
    log.append([trajectory(), trajectory()])
    whole = log.path.read_bytes()
    for cut in (1, 10, len(whole) // 2 - 1):
        log.path.write_bytes(whole + whole[:cut])
        assert len(log.read()) == 2
        log.append([trajectory("third")])
        assert [t.text for t in log][2] == "third" and len(log.read()) == 3


def test_a_log_cut_at_any_byte_gives_its_whole_lines(tmp_path):
    log = TrajectoryLog(tmp_path / "log.jsonl")
    log.append([trajectory("one é"), trajectory("two"), trajectory("three")])
    whole = log.path.read_bytes()
    for cut in range(len(whole) + 1):
        log.path.write_bytes(whole[:cut])
        assert len(log.read()) == whole[:cut].count(b"\n")


def test_a_writer_killed_in_mid_write_loses_nothing_that_was_whole(tmp_path):
    path = tmp_path / "log.jsonl"
    code = (
        "import sys; from searchr1_lib import Question, Trajectory, TrajectoryLog\n"
        "t = Trajectory(Question('q', 'x' * 50_000, ['x']), [], [], [], [])\n"
        "log = TrajectoryLog(sys.argv[1])\n"
        "while True: log.append([t] * 40); print('.', flush=True)"
    )
    with subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE) as writer:
        for _ in range(3):
            writer.stdout.readline()
        size = path.stat().st_size
        while path.stat().st_size == size:  # until it is writing
            assert writer.poll() is None
        writer.kill()
        promised = 40 * (3 + writer.stdout.read().count(b"."))
    log = TrajectoryLog(path)
    found = len(log.read())
    assert found >= promised
    log.append([trajectory("after")])
    assert [t.text for t in log.read()][found:] == ["after"]


def test_a_lone_surrogate_from_the_web_is_kept_and_stops_nothing(tmp_path):
    t, log = trajectory("a \ud800 b"), TrajectoryLog(tmp_path / "log.jsonl")
    t.question.text = "\udfff?"
    log.append([t, trajectory("whole")])
    assert log.read()[0] == t and len(log.path.read_bytes().decode("utf-8").splitlines()) == 2
    to_parquet(log, tmp_path / "log.parquet")
    assert [x.text for x in read_parquet(tmp_path / "log.parquet")] == ["a ? b", "whole"]
    assert to_dataset(log)[0]["question"]["text"] == "??"
    write_json_lines(log.path, [t.to_dict()])
    assert log.read() == [t]


def test_a_log_that_is_only_a_cut_line_starts_again(tmp_path):
    log = TrajectoryLog(tmp_path / "log.jsonl")
    log.path.write_bytes(b"x" * 200_000)
    log.append([trajectory()])
    assert len(log.read()) == 1


@pytest.mark.parametrize(
    "line, why", [("{}", "not a trajectory"), ("[]", ""), ("{", ""), ('{"surprise": 1}', "surprise")]
)
def test_a_broken_line_in_the_middle_is_named(tmp_path, line, why):
    log = TrajectoryLog(tmp_path / "log.jsonl")
    log.append([trajectory()])
    with open(log.path, "a") as f:
        f.write(line + "\n")
    log.append([trajectory()])
    with pytest.raises(ValueError, match=rf"log\.jsonl, line 2: .*{why}"):
        log.read()


def test_lengths_must_agree():
    row = trajectory().to_dict()
    row["mask"] = [1]
    with pytest.raises(ValueError, match="differ in length"):
        Trajectory.from_dict(row)


def test_a_missing_log_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no trajectory log"):
        TrajectoryLog(tmp_path / "none.jsonl").read()


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    write_whole(tmp_path / "a.txt", "old")
    with pytest.raises(TypeError):
        write_json_lines(tmp_path / "a.txt", [{"fine": 1}, {"bad": object()}])
    assert (tmp_path / "a.txt").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_environment_text_is_not_the_models():
    assert not Segment("environment", "information", "<answer>x</answer>", 0, 0, 1).by_model
    t = trajectory()
    t.segments.append(Segment("environment", "information", "env", 0, 1, 2))
    assert "env" not in t.model_text and "env" in t.text
