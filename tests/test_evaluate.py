"""Evaluation: what is counted, by group, and kept; the paper's table from the shell, killed and started again."""

import argparse
import json
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from searchr1_lib.data import load_questions, save_questions
from searchr1_lib.files import TrajectoryLog
from searchr1_lib.metrics import row_of
from searchr1_lib.records import Question, SearchCall, Trajectory
from searchr1_lib.search import BM25Search, SearchError
from searchr1_lib.study import evaluate as module
from searchr1_lib.study.analysis import wilson
from searchr1_lib.study.evaluate import (
    PAPER,
    Report,
    evaluate,
    format_paper_table,
    key_of,
    open_engine,
    paper_table,
    read_sets,
)
from searchr1_lib.suite import cli
from searchr1_lib.training.policy import load_policy

SHARED = Path("../shared/data/hotpotqa_train100")


def main(arguments) -> int:
    return cli.main(["evaluate", *arguments])


def rolled(known, hops, answer, searches, **kwargs):
    return Trajectory(
        question=Question("q", "?", ["gold"], hops=hops, known=known),
        prompt_ids=[1],
        completion_ids=[1, 2, 3],
        mask=[1, 0, 1],
        logprobs=[0.0] * 3,
        answer=answer,
        calls=[SearchCall("s", [], 0.0)] * searches,
        finish_reason="answer",
        **kwargs,
    )


ROLLED = [
    rolled(True, 1, "gold", 0),
    rolled(True, 2, "gold", 1),
    rolled(False, 1, "the Gold.", 1),
    rolled(False, 2, "wrong", 1),
    rolled(None, 1, None, 3),
]


def test_the_groups_and_their_means():
    table = Report([row_of(t) for t in ROLLED], ROLLED).table()
    assert {g: m["n"] for g, m in table.items()} == {
        "known": 2,
        "look-up": 2,
        "look-up, 1 hop": 1,
        "look-up, 2+ hops": 1,
        "all": 5,
    }
    assert table["known"]["em"] == 1 and table["known"]["searches"] == 0.5 and table["known"]["over_search"] == 0.5
    assert table["look-up"]["em"] == 0.5 and table["look-up"]["searches_per_need"] == pytest.approx(2 / 3)
    assert table["look-up"]["under_search"] == 0.5 and table["known"]["searches_per_need"] is None
    assert table["all"]["tokens"] == 2


def test_a_report_is_kept_and_read_again(tmp_path):
    report = Report([row_of(t) for t in ROLLED], ROLLED)
    report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json").table() == report.table()
    assert "look-up, 2+ hops" in str(report)
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(ValueError, match="not a saved report"):
        Report.load(tmp_path / "report.json")


def test_no_questions_is_an_error():
    with pytest.raises(ValueError, match="no questions"):
        evaluate(None, [], None)


# -- the paper's table ----------------------------------------------------------------------------------------------


def rows_of(source, ems, searches=1):
    return [{"source": source, "em": em, "f1": (em + 1) / 2, "searches": searches} for em in ems]


def test_the_average_is_over_the_sets_not_over_the_questions():
    table = paper_table(rows_of("hotpotqa", [1, 1, 0, 0]) + rows_of("nq", [0] * 100) + rows_of("almanac/bridge", [1]))
    assert list(table) == ["nq", "hotpotqa", "almanac", "average"]  # the paper's order, then others
    assert table["hotpotqa"]["em"]["mean"] == 0.5 and table["nq"]["n"] == 100
    assert table["average"]["n"] == 2 and table["average"]["em"]["mean"] == 0.25  # the almanac is not the paper's
    assert table["average"]["searches"] == {"mean": 1, "low": 1, "high": 1}
    assert paper_table(rows_of("almanac", [1, 0]))["average"]["em"]["mean"] == 0.5
    with pytest.raises(ValueError, match="no rows"):
        paper_table([])


def test_the_intervals_are_those_of_the_textbooks():
    stats = pytest.importorskip("scipy.stats")
    for k, n in ((0, 10), (3, 10), (125, 125), (1500, 3610)):
        want = stats.binomtest(k, n).proportion_ci(method="wilson")
        assert wilson(k, n) == pytest.approx((want.low, want.high), abs=1e-6)
    ems = [1, 0, 0] * 200
    table = paper_table(rows_of("nq", ems) + rows_of("popqa", [0] * 600))
    half = 1.96 * (1 / 18) ** 0.5 / 600**0.5  # F1 is 1 or 1/2, so its variance is (2/9)/4
    f1, average = table["nq"]["f1"], table["average"]["f1"]
    assert (f1["high"] - f1["low"]) / 2 == pytest.approx(half, rel=0.1)
    assert (average["high"] - average["low"]) / 2 == pytest.approx(half / 2, rel=0.1)  # the other set does not vary


def test_the_layout_is_the_papers():
    table = paper_table([row for name in PAPER for row in rows_of(name, [1, 0, 0, 0])])
    heads, titles, n, em, interval, *rest = format_paper_table(table).splitlines()
    assert heads.split() == ["General", "QA", "Multi-hop", "QA"]
    assert titles.split() == "NQ TriviaQA PopQA HotpotQA 2Wiki MuSiQue Bamboogle Avg.".split()
    assert n.split() == ["n", *["4"] * 7, "7"] and em.split() == ["EM", *["0.250"] * 8]
    assert interval.split()[2] == "0.046–0.699" and len(rest) == 4  # no note: all seven are there
    few = format_paper_table(paper_table(rows_of("nq", [1]) + rows_of("mine", [0])))
    assert "mine" in few.splitlines()[1] and "–" in few.splitlines()[2].split()
    assert few.endswith("Avg.: over 1 set of the paper's seven")


def test_sources_name_their_sets(tmp_path):
    pa, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))

    rows = [
        {
            "data_source": name,
            "prompt": [{"role": "user", "content": f"Answer it. Question: Who {i} {name}?"}],
            "reward_model": {"ground_truth": {"target": ["x"]}},
            "extra_info": {"split": "test", "index": i},
        }
        for name in PAPER
        for i in range(3)
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "test.parquet")  # Search-R1's own test file
    got = read_sets([str(tmp_path / "test.parquet")], limit=2)
    assert [key_of(q)[0] for q in got] == [name for name in PAPER for _ in range(2)]
    plain = tmp_path / "mine.jsonl"
    plain.write_text('{"id": "1", "question": "Who?", "answers": ["x"]}\n')
    assert key_of(read_sets([str(plain)], None)[0]) == ("mine", "1")
    assert key_of(read_sets([f"nq={plain}"], None)[0]) == ("nq", "1")
    assert len(read_sets([f"nq={plain}", f"popqa={plain}"], None)) == 2
    (tmp_path / "town").mkdir()
    assert key_of(read_sets([str(plain.rename(tmp_path / "town" / "test.jsonl"))], None)[0]) == ("town", "1")
    with pytest.raises(ValueError, match="nq has another question '1'"):
        read_sets([f"nq={tmp_path / 'town' / 'test.jsonl'}"] * 2, None)


def test_engines_by_what_one_types(tmp_path, monkeypatch):
    assert "http://127.0.0.1:8000/retrieve" in open_engine("http://127.0.0.1:8000").name
    assert open_engine("data/almanac").search("River", k=1)
    monkeypatch.delenv("SERPER_API_KEY", raising=False)
    with pytest.raises(ValueError, match="SERPER_API_KEY"):
        open_engine("web:serper")
    row = {
        "id": "1",
        "question": "Who?",
        "answer": "Ada",
        "supporting_facts": {"title": ["Ada"], "sent_id": [0]},
        "context": {"title": ["Ada", "Bob"], "sentences": [["Ada wrote it."], ["Bob read it."]]},
    }
    (tmp_path / "hotpotqa.jsonl").write_text(json.dumps(row) + "\n")
    engine = open_engine("passages", [f"hotpotqa={tmp_path / 'hotpotqa.jsonl'}"])
    assert engine.search("wrote", k=1)[0].passage.title == "Ada"


# -- from the shell -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Six questions of the almanac in a file, half of them recalled at every hop."""
    file, questions = tmp_path_factory.mktemp("asked") / "almanac.jsonl", load_questions("data/almanac/test.jsonl")
    save_questions(file, [q for known in (True, False) for q in [q for q in questions if q.known is known][:3]])
    return file


def command(asked, out, **more):
    options = {
        "model": "data/tiny_qwen",
        "engine": "data/almanac",
        "data": asked,
        "out": out,
        "batch_size": 2,
        "max_turn_tokens": 40,
        "max_turns": 2,
    } | more
    return [x for k, v in options.items() for x in ("--" + k.replace("_", "-"), str(v))]


@pytest.fixture(scope="module")
def finished(asked, tmp_path_factory):
    """The folder of an evaluation that nobody disturbed."""
    out = tmp_path_factory.mktemp("finished") / "out"
    main(command(asked, out))
    return out


def test_killed_in_the_middle_of_a_line_and_started_again(asked, finished, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    script = textwrap.dedent("""
        import os, signal, sys
        from searchr1_lib.study import evaluate
        from searchr1_lib.suite import cli
        append, count = evaluate.TrajectoryLog.append, []
        def dying(log, trajectories):
            count.append(1)
            if len(count) == 2:
                with open(log.path, "ab") as f:
                    f.write(b'{"question": {"id": "al')
                os.kill(os.getpid(), signal.SIGKILL)
            append(log, trajectories)
        evaluate.TrajectoryLog.append = dying
        cli.main(["evaluate", *sys.argv[1:]])
    """)
    killed = subprocess.run([sys.executable, "-c", script, *command(asked, out)], capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    assert len(TrajectoryLog(out / "trajectories.jsonl").read()) == 2 and not (out / "report.json").exists()

    import searchr1_lib.training.rollout

    rollout, answered = searchr1_lib.training.rollout.rollout, []

    def watched(policy, questions, *args, **kwargs):
        answered.extend(q.id for q in questions)
        return rollout(policy, questions, *args, **kwargs)

    monkeypatch.setattr(searchr1_lib.training.rollout, "rollout", watched)
    main(command(asked, out))
    ids = [q.id for q in load_questions(asked)]
    assert answered == ids[2:]  # the first two stood in the log
    assert [t.question.id for t in TrajectoryLog(out / "trajectories.jsonl")] == ids
    assert (out / "report.json").read_text() == (finished / "report.json").read_text()

    printed = capsys.readouterr().out
    monkeypatch.setattr("searchr1_lib.training.policy.load_policy", None)  # nothing is left to do: no model is loaded
    main(command(asked, out))
    assert capsys.readouterr().out == printed and "almanac" in printed


def test_the_report_agrees_with_the_log(asked, finished):
    found = json.loads((finished / "report.json").read_text())
    rows = [row_of(t) for t in TrajectoryLog(finished / "trajectories.jsonl")]
    assert found["table"] == paper_table(rows) and found["failed_searches"] == 0
    assert found["table"]["almanac"]["n"] == 6 and found["table"]["almanac"]["searches"]["mean"] > 0


def test_answers_that_met_a_broken_engine_are_given_again(asked, tmp_path, monkeypatch, capsys):
    class Flaky(BM25Search):
        broken = True

        def search_batch(self, queries, k=3):
            if self.broken and k > 1:
                raise SearchError("the wire is cut")
            return super().search_batch(queries, k)

    from searchr1_lib.data import load_passages

    engine = Flaky(load_passages("data/almanac/passages.jsonl"))
    monkeypatch.setattr(module, "open_engine", lambda *_: engine)
    main(command(asked, tmp_path))
    assert "searches failed, so the figures are too low" in capsys.readouterr().err
    failed = json.loads((tmp_path / "report.json").read_text())["failed_searches"]
    engine.broken = False
    main(command(asked, tmp_path))
    assert failed > 0 and json.loads((tmp_path / "report.json").read_text())["failed_searches"] == 0
    assert len(TrajectoryLog(tmp_path / "trajectories.jsonl").read()) > 6


def test_another_evaluation_is_not_gone_on_with(asked, finished, tmp_path, capsys):
    assert main(command(asked, finished, max_turns=1, engine="http://me:secret@127.0.0.1:9")) == 2
    assert "another engine, limits; choose another --out" in capsys.readouterr().err
    other = tmp_path / "almanac.jsonl"
    other.write_text("".join(line.replace("?", " today?") for line in asked.read_text().splitlines(keepends=True)))
    assert main(command(other, finished)) == 2
    assert "answers another question" in capsys.readouterr().err


def copied(source, target, **changed):
    """A copy of a folder with other texts in some of its files."""
    shutil.copytree(source, target)
    for name, (old, new) in changed.items():
        path = next(target.glob(f"{name}*"))
        path.write_text(path.read_text().replace(old, new, 1))
    return target


def test_all_that_makes_an_evaluation_is_its_identity(asked, tmp_path, monkeypatch, capsys):
    """The paths stay the same; what stands there does not."""
    here = {name: tmp_path / name for name in ("model", "adapter", "engine")}
    for name, source in (("model", "data/tiny_qwen"), ("engine", "data/almanac")):
        copied(source, here[name])
    load_policy(here["model"]).save_adapter(here["adapter"])
    out = tmp_path / "out"
    how = here | {"limit": 1, "max_turns": 1, "max_turn_tokens": 8}
    main(command(asked, out, **how))
    before = {p: p.read_bytes() for p in out.iterdir()}
    monkeypatch.setattr("searchr1_lib.training.policy.load_policy", None)
    assert main(command(asked, out, **how, batch_size=7)) == 0  # as before, and nothing is left to do
    (here["engine"] / "test.jsonl").write_text("which it does not read")
    assert main(command(asked, out, **how)) == 0
    changes = (
        ("model", "search_r1", ("{", "{ "), "weights"),
        ("adapter", "adapter_config", ("{", "{ "), "adapter"),
        ("engine", "passages", ("is", "was"), "engine"),
    )
    for name, file, change, said in changes:
        path, text = next(here[name].glob(f"{file}*")), next(here[name].glob(f"{file}*")).read_text()
        path.write_text(text.replace(*change, 1))
        assert main(command(asked, out, **how)) == 2
        assert f"{out} holds an evaluation with another {said}; choose another --out" in capsys.readouterr().err
        path.write_text(text)
    monkeypatch.setattr(module, "versions", lambda names: dict.fromkeys(names, "1.0"))
    assert main(command(asked, out, **how)) == 2 and "another versions" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in out.iterdir()} == before


def test_passages_of_other_rows_are_another_engine(tmp_path):
    known = set()
    for text in ("Ada wrote it.", "Bob wrote it."):
        rows = [{"id": i, "question": "Who?", "answer": "Ada", "context": [["Ada", [text + i]]]} for i in "12"]
        (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        one, same, more = (open_engine("passages", [f"hotpotqa={tmp_path / 'q.jsonl'}"], n).identity for n in (1, 1, 2))
        assert one == same != more
        known |= {one, more}
    assert len(known) == 4


@pytest.mark.parametrize("text", ['{"model', "[]", '"x"'])
def test_broken_settings_are_named(asked, finished, tmp_path, capsys, text):
    copied(finished, tmp_path / "out")
    (tmp_path / "out" / "settings.json").write_text(text)
    assert main(command(asked, tmp_path / "out")) == 2
    assert re.search(r"error: .*out/settings.json: (not JSON|no settings of)", capsys.readouterr().err)


def test_an_evaluation_has_a_folder_to_itself(asked, tmp_path, capsys):
    for out, foreign in (
        (copied("tests/data/house/model", tmp_path / "a"), "chat_template.jinja"),
        (asked, "a file's text"),
    ):
        assert main(command(asked, out)) == 2
        assert f"holds {foreign}, which was not made by this command" in capsys.readouterr().err
    names = ({p.name for p in folder.iterdir()} for folder in (tmp_path / "a", Path("tests/data/house/model")))
    assert next(names) == next(names)


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"temperature": float("nan")}, "temperature must be"),
        ({"temperature": -1.0}, "temperature must be greater than or equal to 0, got -1.0"),
        ({"seed": None}, "seed must be a valid integer, got None"),
        ({"seed": -1}, "seed must be greater than or equal to 0"),
        ({"batch_size": 0}, "batch_size must be greater than or equal to 1, got 0"),
        ({"num_generations": 0}, "num_generations must be greater than or equal to 1"),
        ({"num_generations": True}, "num_generations must be a valid integer, got True"),
    ],
)
def test_numbers_are_checked_before_any_work(wrong, said):
    with pytest.raises(ValueError, match=said):
        evaluate(None, [Question("q", "?", ["a"])], None, **wrong)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model": "data/none"}, "no model folder at 'data/none'"),
        ({"adapter": "data/almanac"}, "no adapter in data/almanac"),
        ({"engine": "data/none"}, "data/none: no such folder"),
        ({"data": "nope.jsonl"}, "nope.jsonl: no such file"),
        ({"prompt": "README.md"}, "README.md: the prompt has no {question}"),
        ({"max_turns": -1}, "max_turns must be"),
    ],
)
def test_mistakes_are_one_line(asked, tmp_path, change, message, capsys):
    assert main(command(asked, tmp_path, **change)) == 2
    *progress, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and message in error and not any("error" in line for line in progress)
    assert not list(tmp_path.iterdir())  # so the corrected command can be given at once


def test_a_server_that_is_down_costs_nothing_and_its_password_is_written_nowhere(asked, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("searchr1_lib.training.policy.load_policy", None)
    assert main(command(asked, tmp_path, engine="http://me:secret@127.0.0.1:9/retrieve?key=secret")) == 1
    error = capsys.readouterr().err
    assert re.search("error: .*127.0.0.1:9/retrieve", error) and "secret" not in error
    monkeypatch.undo()
    engine = open_engine("data/almanac")
    monkeypatch.setattr(module, "open_engine", lambda *_: engine)
    main(command(asked, tmp_path, engine="http://me:secret@127.0.0.1:9/retrieve?key=secret", limit=1))
    assert not [f for f in tmp_path.iterdir() if "secret" in f.read_text()]


def test_the_arguments(capsys):
    with pytest.raises(SystemExit):
        main(["--model", "m", "--engine", "e", "--data", "d", "--limit", "0"])
    assert "expected a whole number from 1" in capsys.readouterr().err


def test_qwen3_thinks_only_if_asked():
    asked = ["--model", "m", "--engine", "e", "--data", "d"]
    module.add_arguments(parser := argparse.ArgumentParser())
    assert parser.parse_args(asked).thinking is False and parser.parse_args([*asked, "--thinking"]).thinking is True


@pytest.mark.skipif(not SHARED.is_dir(), reason="the samples are not here")
def test_hotpotqas_sample_end_to_end(tmp_path, capsys):
    main(
        [
            "--model",
            "data/tiny_qwen",
            "--engine",
            str(SHARED),
            "--data",
            f"hotpotqa={SHARED / 'questions.jsonl'}",
            "--limit",
            "3",
            "--out",
            str(tmp_path),
            "--max-turns",
            "1",
            "--max-turn-tokens",
            "30",
        ]
    )
    assert "HotpotQA" in capsys.readouterr().out
    assert json.loads((tmp_path / "report.json").read_text())["table"]["hotpotqa"]["n"] == 3
