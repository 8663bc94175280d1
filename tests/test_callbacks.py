"""Callbacks: what they write, when they stop, and that they survive an interruption."""

import json
import subprocess
import sys

import pytest
from test_trainer import SHORT, engine, questions, trainer  # noqa: F401  (fixtures)

from searchr1_lib.study.callbacks import EarlyStopping, EvaluateEvery, NothingToLearn, TensorBoard


class Stub:
    """As much of a trainer as EarlyStopping reads."""

    def __init__(self, values):
        self.metrics, self.lines = [{"step": i + 1, "reward": v} for i, v in enumerate(values)], []
        self.report = self.lines.append


def stops_at(values, **how):
    stop = EarlyStopping(**how)
    return next((n for n in range(1, len(values) + 1) if stop(Stub(values[:n]), {"reward": values[n - 1]})), None)


def test_early_stopping_waits_for_its_patience():
    assert stops_at([0, 1, 2, 2, 2, 2, 2], patience=3, window=1) == 6
    assert stops_at([0, 1, 2, 3, 4, 5, 6], patience=3, window=1) is None
    assert stops_at([0.0, 0.001, 0.002, 0.003, 0.004], patience=3, window=1, min_delta=0.01) == 4
    assert stops_at([1, 0, 1, 0, 1, 0, 1, 0, 1, 0], patience=3, window=2) == 5  # the mean of two stays at 0.5
    assert stops_at([None, 1, None, 1], patience=1, window=1) == 4
    with pytest.raises(ValueError, match="no metric 'rewrd'"):
        EarlyStopping("rewrd")(Stub([1.0]), {"reward": 1.0})
    for wrong in ({"patience": 0}, {"window": 2.5}, {"min_delta": float("nan")}, {"patience": True}):
        with pytest.raises(ValueError, match=f"^{next(iter(wrong))} must"):
            EarlyStopping(**wrong)


def test_a_training_without_variance_ends(tmp_path, engine, questions):  # noqa: F811
    def steps(name, **settings):
        one = trainer(
            tmp_path / name,
            engine,
            questions,
            SHORT.model_copy(update=dict(steps=4, **settings)),
            reward=lambda trajectories: [0.5] * len(trajectories),
            callbacks=[NothingToLearn(2)],
        )
        one.train()
        return len(one.metrics)

    assert steps("equal", entropy_coef=0.0) == 2
    assert steps("equal, with a penalty", beta=0.01) == 4  # has a gradient all the same
    assert steps("equal, without a baseline", entropy_coef=0.0, baseline="none", scale_rewards="none") == 4
    with pytest.raises(ValueError, match="patience"):
        NothingToLearn(0)


def test_evaluations_are_written_and_survive_an_interruption(tmp_path, engine, questions):  # noqa: F811
    def run(folder, *more):
        every = EvaluateEvery(2, questions[:3], max_turn_tokens=20)
        settings = SHORT.model_copy(update=dict(steps=3, checkpoint_every=1))
        trainer(folder, engine, questions, settings, callbacks=[every, *more]).train()
        rows = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
        assert rows == every.rows
        for row in rows:
            for part in row.values():
                part.pop("seconds") if isinstance(part, dict) else None
        return rows

    whole = run(tmp_path / "whole")
    assert [row["step"] for row in whole] == [2, 3]
    assert whole[0]["all"]["n"] == 3 and "em" in whole[0]["all"] and whole[0]["all"]["reward"] is not None
    run(tmp_path / "part", lambda t, row: row["step"] == 2)
    assert run(tmp_path / "part") == whole
    for every in (0, 2.5, float("nan")):
        with pytest.raises(ValueError, match="every >= 1"):
            EvaluateEvery(every, questions)


def test_tensorboard_reads_what_was_written(tmp_path, engine, questions):  # noqa: F811
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    settings = SHORT.model_copy(update=dict(steps=2, checkpoint_every=1))
    for stop in (True, False):  # stopped after the first step, then resumed
        trainer(
            tmp_path, engine, questions, settings, callbacks=[TensorBoard(), lambda t, row, stop=stop: stop]
        ).train()
    read = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [e.step for e in read.Scalars("reward")] == [1, 2]
    assert [e.value for e in read.Scalars("reward")] == pytest.approx([r["reward"] for r in rows])


def test_a_live_plot_is_redrawn_in_place_in_a_real_kernel():
    import nbformat
    from nbclient import NotebookClient

    cell = """
from types import SimpleNamespace
from searchr1_lib.study.callbacks import LivePlot
plot, rows = LivePlot(seconds=0), []
for step in range(1, 4):
    rows.append({"step": step, "reward": step / 3})
    plot(SimpleNamespace(metrics=rows, settings=SimpleNamespace(steps=3)), rows[-1])
"""
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
    NotebookClient(nb, kernel_name="python3", timeout=60).execute()
    outputs = nb.cells[0].outputs
    assert len(outputs) == 1 and "image/png" in outputs[0].data
    assert "After 3 steps" in outputs[0].data["text/plain"]


def test_a_live_plot_is_silent_in_a_terminal():
    code = (
        "from types import SimpleNamespace as N; from searchr1_lib.study.callbacks import LivePlot\n"
        "LivePlot(0)(N(metrics=[], settings=N(steps=1)), {'step': 1})"
    )
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert got.returncode == 0 and got.stdout == "" and got.stderr == ""
