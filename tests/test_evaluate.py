"""Evaluation: what is counted, by group, and kept."""

import pytest

from searchr1_lib.evaluate import Report, evaluate, row_of
from searchr1_lib.records import Question, SearchCall, Trajectory


def rolled(known, hops, answer, searches, **kwargs):
    return Trajectory(question=Question("q", "?", ["gold"], hops=hops, known=known), prompt_ids=[1],
                      completion_ids=[1, 2, 3], mask=[1, 0, 1], logprobs=[0.0] * 3, answer=answer,
                      searches=[SearchCall("s", [], 0.0)] * searches, finish_reason="answer", **kwargs)


ROLLED = [rolled(True, 1, "gold", 0), rolled(True, 2, "gold", 1), rolled(False, 1, "the Gold.", 1),
          rolled(False, 2, "wrong", 1), rolled(None, 1, None, 3)]


def test_the_groups_and_their_means():
    table = Report([row_of(t) for t in ROLLED], ROLLED).table()
    assert {g: m["n"] for g, m in table.items()} == {"known": 2, "look-up": 2, "look-up, 1 hop": 1,
                                                     "look-up, 2 hops": 1, "all": 5}
    assert table["known"]["em"] == 1 and table["known"]["searches"] == 0.5 and table["known"]["over_search"] == 0.5
    assert table["look-up"]["em"] == 0.5 and table["look-up"]["searches_per_need"] == pytest.approx(2 / 3)
    assert table["look-up"]["under_search"] == 0.5 and table["known"]["searches_per_need"] is None
    assert table["all"]["tokens"] == 2


def test_a_report_is_kept_and_read_again(tmp_path):
    report = Report([row_of(t) for t in ROLLED], ROLLED)
    report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json").table() == report.table()
    assert "look-up, 2 hops" in str(report)
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(ValueError, match="not a saved report"):
        Report.load(tmp_path / "report.json")


def test_no_questions_is_an_error():
    with pytest.raises(ValueError, match="no questions"):
        evaluate(None, [], None)
