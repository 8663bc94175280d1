"""What may happen after each step of a training: an evaluation, an early stop, TensorBoard, a picture that redraws.

A callback is called as ``callback(trainer, metrics)``, where ``metrics`` is the row of the step just done; one that
returns True ends the training, saved. All of these can be interrupted: after a resume they go on as if they had
never stopped.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from ..environment.limits import Amount, Checked, Count
from ..files import read_json_lines, write_json_lines
from ..records import Question
from .evaluate import evaluate


class EvaluateEvery:
    """Evaluates every so many steps, and after the last; the figures go to ``evaluations.jsonl`` in the run's folder.

    Args:
        every: steps from one evaluation to the next.
        questions: what to ask; not those that are trained on.
        **how: for ``evaluate``, for instance ``temperature=1.0`` or ``max_turns=2``; by default greedy, with the
            training's engine, reward and limits.

    Attributes:
        rows: one dict an evaluation: ``step``, and EM, F1, searches, reward of "all", "known" and "look-up".
    """

    def __init__(self, every: int, questions: Sequence[Question], **how):
        if not isinstance(every, int) or every < 1 or not questions:  # ``in range`` would count up to a float
            given = f"{len(questions)} and {every} given"
            raise ValueError(f"EvaluateEvery needs questions and a whole number every >= 1: {given}")
        self.every, self.questions, self.how = every, list(questions), how
        self.rows: list[dict[str, Any]] = []

    def __call__(self, trainer, metrics) -> None:
        step, s = metrics["step"], trainer.settings
        if step % self.every and step < s.steps:
            return
        how = {"engine": trainer.engine, "reward": trainer.reward, "seed": s.seed, **s.limits(), **self.how}
        report = evaluate(trainer.policy, self.questions, **how)
        file = trainer.run_dir / "evaluations.jsonl"
        before = read_json_lines(file) if file.exists() else ()
        self.rows = [row for row in before if row["step"] < step]  # a resumed run repeats some
        self.rows.append({"step": step, **report.table()})
        write_json_lines(file, self.rows)


class EarlyStopping(Checked, use_attribute_docstrings=True):
    """Ends a training whose metric has not improved for a while. Looks at the logged metrics only."""

    metric: str
    """a name in the metrics, higher is better"""
    patience: Count = 50
    """steps without improvement after which it stops"""
    window: Count = 10
    """steps whose mean is compared, since single steps are noisy"""
    min_delta: Amount = 0.01
    """what counts as an improvement"""

    def __init__(self, metric: str = "reward", **how: Any):
        super().__init__(metric=metric, **how)

    def __call__(self, trainer, metrics) -> bool:
        if self.metric not in metrics:
            raise ValueError(f"EarlyStopping: no metric {self.metric!r}; there are {', '.join(metrics)}")
        values = [row[self.metric] for row in trainer.metrics if row[self.metric] is not None]
        means = [fmean(values[i - self.window : i]) for i in range(self.window, len(values) + 1)]
        best, at = -math.inf, 0
        for i, mean in enumerate(means):
            if mean > best + self.min_delta:
                best, at = mean, i
        stop = len(means) - 1 - at >= self.patience
        if stop:
            trainer.report(f"stopped: {self.metric} has not risen above {best:.3f} for {self.patience} steps")
        return stop


class NothingToLearn(Checked, use_attribute_docstrings=True):
    """Ends a training whose gradient has been exactly 0 for a while: all rewards of each group were equal.

    So ends a collapse, and so may end a training that gets everything right. Where something else makes a gradient (no
    baseline or a critic, a KL term, an entropy bonus) equal rewards are no reason to stop.
    """

    patience: Count
    """such steps in a row after which it stops"""

    def __init__(self, patience: int = 10):
        super().__init__(patience=patience)

    def __call__(self, trainer, metrics) -> bool:
        last = trainer.metrics[-self.patience :]
        stop = len(last) == self.patience and all(row["grad_norm"] == 0 for row in last)
        if stop:
            trainer.report(f"stopped: no group of the last {self.patience} steps had rewards that differ")
        return stop


class TensorBoard:
    """Writes every number of the metrics into the run's ``tensorboard/`` (``pip install tensorboard``)."""

    def __init__(self):
        from torch.utils.tensorboard import SummaryWriter  # here: without the package there is an error before any work

        self.make, self.writer = SummaryWriter, None

    def __call__(self, trainer, metrics) -> None:
        if self.writer is None:
            # what an interrupted run wrote after its last checkpoint is superseded
            self.writer = self.make(trainer.run_dir / "tensorboard", purge_step=metrics["step"])
        for name, value in metrics.items():
            if isinstance(value, (int, float)) and name != "step":
                self.writer.add_scalar(name, value, metrics["step"])
        self.writer.flush()


class LivePlot:
    """The learning curves in a notebook, redrawn in place; outside a notebook it does nothing.

    Args:
        seconds: at most one picture in so many seconds; the last step is always drawn.
    """

    def __init__(self, seconds: float = 10.0):
        self.seconds, self.shown = seconds, -math.inf

    def __call__(self, trainer, metrics) -> None:
        last = metrics["step"] == trainer.settings.steps
        if not _in_notebook() or not (last or time.monotonic() - self.shown > self.seconds):
            return
        from IPython.display import display

        from . import plots

        picture = plots.Picture(plots.learning_curves(trainer.metrics, title=f"After {metrics['step']} steps"))
        display(picture, display_id=f"learning curves {id(self)}", update=self.shown > -math.inf)
        self.shown = time.monotonic()


def _in_notebook() -> bool:
    """Whether this is a Jupyter kernel (also under papermill and nbconvert), not a terminal."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and getattr(ipython.get_ipython(), "kernel", None) is not None
