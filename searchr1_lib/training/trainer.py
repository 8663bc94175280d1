"""The training loop of GRPO: roll out, score, update, log, checkpoint; and going on after an interruption.

GRPO (Shao et al. 2024, "DeepSeekMath", arXiv 2402.03300, equations 3 and 4) on multi-turn rollouts with
retrieved text masked out (Jin et al. 2025, "Search-R1", arXiv 2503.09516, equation 2).

Everything random in a step is drawn from (seed, step) alone: which questions, and the sampling. So a run
that was killed and started again needs no saved random state, and on a CPU it gives the same metrics and
the same adapter bytes as a run that was never interrupted.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import torch
from filelock import FileLock, Timeout

from ..environment.limits import Count, valid
from ..environment.search import tools_of
from ..files import TrajectoryLog, append_json_lines, read_json, read_json_lines, sha256_of, whole_folder, write_json
from ..metrics import mean, means, row_of
from ..records import FINISH_REASONS, Question, Trajectory
from ..rewards import SearchR1Reward, score
from ..search.base import identity_of
from .buffer import ReplayBuffer
from .credit import OWN_REWARD
from .grpo import groups_without_variance
from .identity import identity, of_questions, of_weights
from .learner import Learner, TrainingError
from .policy import Policy, attach_lora
from .rollout import rollout
from .settings import DECIDING, Settings

FORMAT = 4  # of a run's folder; another number is another layout
_STATE = "state.json"  # of a checkpoint; it is written last
_FREE_SPACE = "Free some space and start again: it goes on"


class Trainer:
    """Trains a policy and leaves a run's folder.

    There ``settings.json`` says what the run is made of, ``metrics.jsonl`` has a row and ``trajectories.jsonl`` all
    rollouts of each step, and ``checkpoints/step_N/`` an adapter in PEFT's format and what else it takes to go on.
    What else stands in the folder is left alone.

    Args:
        policy: with LoRA adapters; they are changed in place.
        questions: what to ask; a step draws from a shuffled pass over them.
        engine: what searches.
        reward: a callable on a batch of trajectories, by default ``SearchR1Reward()``: exact match, minus 0.15
            for each search of a right answer and 1 for malformed turns.
        settings: a ``Settings``.
        run_dir: the run's folder. If it holds checkpoints of the same run, training goes on there: only ``steps`` may
            differ, not the other settings, the reward, the questions, the engine, the prompt, the base model or the
            adapter that it began with.
        callbacks: called as ``callback(trainer, metrics)`` after each step; one that returns True stops.
        advantages: in place of those of the settings, see ``Learner``.
        author_rewards: by an author's name the reward that it has instead of the common one, as in DeSA's first stage
            (arXiv 2510.04695): ``{"search": InformationGain()}`` pays who writes queries for the gold passages found.
        report: is given a progress line now and then (None: silent).

    Raises:
        ValueError: no questions; nothing to train; the folder holds another run, one of another version, or
            checkpoints none of which is whole; or another trainer is at work there.
    """

    def __init__(
        self,
        policy: Policy,
        questions: Sequence[Question],
        engine,
        reward: Callable | None = None,
        settings: Settings | None = None,
        run_dir: str | os.PathLike = "runs/train",
        *,
        callbacks: Sequence[Callable] = (),
        advantages: Callable | None = None,
        author_rewards: Mapping[str, Callable] | None = None,
        report: Callable[[str], None] | None = print,
    ):
        self.policy, self.questions, self.engine = policy, list(questions), engine
        self.reward, self.settings = reward or SearchR1Reward(), settings or Settings()
        self.run_dir, self.callbacks, self.report = Path(run_dir), list(callbacks), report or (lambda line: None)
        self.author_rewards = dict(author_rewards or {})
        if not self.questions:
            raise ValueError("Trainer: no questions to train on")
        if odd := sorted({*self.author_rewards} - {*policy.authors}):
            raise ValueError(f"author_rewards: {', '.join(odd)} is no author of this policy; {policy.authors} are")
        asked = [getattr(getattr(tool, "engine", None), "policy", None) for tool in tools_of(engine)]
        if self.settings.train_colleagues and not any(a is not None and a.model is policy.model for a in asked):
            raise ValueError("train_colleagues: the engine asks no agent that writes with the weights of this policy")
        self.learner = Learner(policy, self.settings, self.report, advantages)
        self.buffer = self._new_buffer()
        self.step = 0
        self.metrics: list[dict] = []
        self.log, self._metrics_file = (
            TrajectoryLog(self.run_dir / "trajectories.jsonl"),
            self.run_dir / "metrics.jsonl",
        )
        self._stop = False
        with self._alone():
            self._open_run()

    # -- the loop ------------------------------------------------------------------------------------

    def train(self) -> Policy:
        """Train to ``settings.steps``; returns the policy. Ctrl-C ends it after the current step, saved.

        Raises:
            TrainingError: the loss or the gradient is no number any more, or the disk is full; the last
                good checkpoint stands.
            RewardError: the reward failed; the step was not trained on.
            ValueError: another trainer is at work in the run's folder, or was since this one was made.
        """
        s, started, first = self.settings, time.perf_counter(), self.step
        shown = -1e9
        with self._alone(), self.learner.checkpointing(), self._gentle_interrupt():
            if self._metrics_file.exists() and sum(1 for _ in read_json_lines(self._metrics_file)) != len(self.metrics):
                raise ValueError(f"another trainer was in {self.run_dir} since this one was made: make it anew")
            while self.step < s.steps and not self._stop:
                row = self._one_step()
                verdicts = [callback(self, row) for callback in self.callbacks]  # every one is called
                self._stop = self._stop or any(verdict is True for verdict in verdicts)
                last = self.step == s.steps or self._stop
                if last or self.step % s.checkpoint_every == 0:
                    self.save_checkpoint()
                if last or time.perf_counter() - shown > 10:
                    shown = time.perf_counter()
                    self.report(self._line(row, (shown - started) / (self.step - first) * (s.steps - self.step)))
        return self.policy

    def _one_step(self) -> dict:
        started = time.perf_counter()
        drawn, chosen = self._collect()
        rolled = time.perf_counter()
        try:
            self.learner.assign_advantages(chosen)
            colleagues = self._colleagues(chosen)
            again = self._drawn_again()
            update = self.learner.update(chosen + colleagues + again, self.step)
        except FloatingPointError as e:
            advice = (
                f"a lower learning_rate (now {self.settings.learning_rate:g}), beta > 0, or a smaller max_grad_norm"
            )
            if self.policy.lm_head.weight.dtype == torch.float16:
                advice += ", or load the policy with dtype bfloat16 or float32: fp16 may be too narrow for it"
            raise self._failure(str(e), f"Try {advice}") from None
        done = time.perf_counter()
        sampled = sum(sum(t.mask[t.shared :]) + sum(sum(c.mask) for c in t.colleagues) for t in drawn)
        row = {
            "step": self.step + 1,
            **describe(drawn, self.settings.num_generations),
            **update,
            "resampled_groups": (len(drawn) - len(chosen)) // self.settings.num_generations,
            "learning_rate": self.settings.learning_rate_at(self.step),
            "sampled_tokens": sampled,
            "tokens_per_second": sampled / (rolled - started),
            "seconds": done - started,
            "seconds_rollout": rolled - started,
            "seconds_update": done - rolled,
            "peak_memory_mb": peak_memory_mb(self.policy.device),
        }
        if self.settings.replay_groups:
            row["replayed"] = len(again) / len(chosen + again)
            self.buffer.add(drawn)
        self.step += 1
        self.metrics.append(row)
        try:
            self.log.append(drawn)
            append_json_lines(self._metrics_file, [row])
            for tool in tools_of(self.engine):
                tool.merge(drawn, self.step - 1)
        except OSError as e:
            raise self._failure(f"could not write the log ({e.strerror or e})", _FREE_SPACE) from None
        return row

    def _colleagues(self, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        """The rollouts of the agents that were asked, if they learn, with the reward of the one that asked and the
        advantage among those of the same author that were asked about the same question (M-GRPO, arXiv 2511.13288).
        """
        pairs = [(c, t) for t in trajectories for c in t.colleagues if self.settings.train_colleagues]
        for c, t in pairs:
            c.reward, c.step, c.group = t.reward, t.step, f"{t.group}/{c.segments[0].author if c.segments else ''}"
        colleagues = [c for c, _ in pairs]
        if colleagues:
            self.learner.assign_in_groups(colleagues)
        return colleagues

    def _new_buffer(self) -> ReplayBuffer:
        """Empty, for the rollouts of the last ``replay_max_age`` steps."""
        s = self.settings
        most = s.replay_max_age * s.questions_per_step * s.num_generations * (s.dynamic_sampling + 1)
        return ReplayBuffer(most, max_age=s.replay_max_age - 1, by="advantage")

    def _drawn_again(self) -> list[Trajectory]:
        """Groups of earlier steps, with the advantages and log-probabilities that were recorded then: their ratios are
        how far the policy has moved since.
        """
        s = self.settings
        return self.buffer.sample_groups(s.replay_groups, random.Random(f"{s.seed}/{self.step}/replay"))

    def _collect(self) -> tuple[list[Trajectory], list[Trajectory]]:  # type: ignore[return]  # the last attempt does
        """The scored rollouts of a step: all that were drawn, and those to train on.

        With ``dynamic_sampling`` (DAPO, arXiv 2503.14476, section 3.2) other questions are drawn in place of those
        whose groups have no variance, until none is left or the budget is used up; the last ones then stay in.
        """
        s, size = self.settings, self.settings.num_generations
        generator = torch.Generator(device=self.policy.device).manual_seed(s.seed * 1_000_003 + self.step)
        questions = self.questions_of(self.step)
        drawn: list[Trajectory] = []
        chosen: list[Trajectory] = []
        how = {"generator": generator, "first_action": s.first_actions(self.step), **s.limits()}
        how |= {"num_generations": size, "temperature": s.temperature, "trees": s.trees}
        for attempt in range(s.dynamic_sampling + 1):
            fresh = rollout(self.policy, questions, self.engine, **how)
            score(self.reward, fresh).keep(fresh)
            for author, own in self.author_rewards.items():
                for t, value in zip(fresh, score(own, fresh).values):
                    t.rewards[OWN_REWARD + author] = value
            for i, t in enumerate(fresh):  # a rollout's own name of its group tells it from others of one call only
                t.step, t.group = self.step, f"{self.step}:{(len(drawn) + i) // size}"
            drawn += fresh
            flat = groups_without_variance([t.reward for t in fresh], size).tolist() if s.dynamic_sampling else []
            if not any(flat) or attempt == s.dynamic_sampling:
                return drawn, chosen + fresh
            for i, t in enumerate(fresh):
                if flat[i // size]:
                    t.advantages = [0.0] * len(t.mask)  # it is logged, not trained on
                else:
                    chosen.append(t)
            questions = random.Random(f"{s.seed}/{self.step}/{attempt}").choices(self.questions, k=sum(flat))

    def questions_of(self, step: int) -> list[Question]:
        """The questions of a step, see the function of this name."""
        return questions_of(self.questions, self.settings, step)

    @contextmanager
    def _gentle_interrupt(self) -> Iterator[None]:
        """The first Ctrl-C ends training after the step; a second one interrupts at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop_after_step(signum, frame):
            if self._stop:
                raise KeyboardInterrupt
            self._stop = True
            self.report("interrupted: finishing this step and saving (once more to stop at once)")

        before = signal.signal(signal.SIGINT, stop_after_step)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _failure(self, what: str, advice: str) -> TrainingError:
        newest = self._newest_checkpoint() or "none yet"
        return TrainingError(f"step {self.step + 1}: {what}. The last good checkpoint is {newest}. {advice}")

    def _line(self, row: dict, left: float) -> str:
        show = lambda x: "–" if x is None else f"{x:.2f}"
        return (
            f"step {row['step']:4d}/{self.settings.steps}  reward {row['reward']:.2f}  EM {row['em']:.2f}  "
            f"searches: known {show(row['searches_known'])}, look-up {show(row['searches_lookup'])}  "
            f"entropy {row['entropy']:.2f}  {row['seconds']:.1f} s a step, about {left / 60:.1f} min left"
        )

    # -- the run's folder ----------------------------------------------------------------------------

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Within it no other trainer works in the run's folder; a kill ends it as well."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.run_dir / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"another trainer is at work in {self.run_dir}: wait, or choose another run_dir") from None
        try:
            yield
        finally:
            lock.release()

    def _open_run(self) -> None:
        """Make the folder, or go on from its newest whole checkpoint."""
        file, made_of = self.run_dir / "settings.json", self._made_of()
        folder, state = self._newest_whole()
        if file.exists():
            self._check_same_run(file, made_of, state.get("adapter"))
        write_json(file, made_of)
        self._resume(folder, state)

    def _made_of(self) -> dict[str, Any]:
        """All that decides the result, and the versions of what computes it."""
        p, weights = self.policy, self.policy.model.named_parameters()
        scaling = {n: m.scaling for n, m in p.model.named_modules() if hasattr(m, "scaling")}
        parts = {
            "reward": identity(self.reward),
            "questions": of_questions(self.questions),
            "engine": identity_of(self.engine),
            "advantages": identity(self.learner.advantages),
            "prompt": identity([p.prompt, p.thinking, p.tokenizer.chat_template]),
            "model": of_weights({n: w for n, w in weights if not w.requires_grad}),
            "lora": identity(scaling),
            "adapter": self._adapter(),
        }
        parts |= {OWN_REWARD + author: identity(own) for author, own in self.author_rewards.items()}
        versions = {name: version(name) for name in DECIDING}
        return {"format": FORMAT, "settings": self.settings.model_dump(), "made_of": parts, "versions": versions}

    def _adapter(self) -> str:
        return of_weights({n: w for n, w in self.policy.model.named_parameters() if w.requires_grad})

    def _check_same_run(self, file: Path, new: dict[str, Any], reached: str | None) -> None:
        """Raise ValueError where the folder's run is not this one; only ``steps`` may differ, so a run can grow.

        The adapter may be the one that the run began with (then it stands in ``new`` from here on), or the one that
        it has ``reached``.
        """
        other = f"choose another run_dir than {self.run_dir}"
        try:
            old = read_json(file)
        except ValueError as e:
            raise ValueError(f"broken settings ({e}); remove the folder or {other}") from None
        form = old.get("format") if isinstance(old, dict) else None
        if form != FORMAT:
            raise ValueError(f"{file} is of another version (format {form}, this is {FORMAT}); {other}")
        if new["made_of"]["adapter"] == reached:
            new["made_of"]["adapter"] = old["made_of"]["adapter"]
        # a setting that is younger than the run stood at its default
        before, now = (Settings().model_dump() | run["settings"] | run["made_of"] for run in (old, new))
        differ = sorted(k for k in before.keys() | now.keys() if k != "steps" and before.get(k) != now.get(k))
        if differ:
            values = ", ".join(f"{k}: {before.get(k)!r} there, {now.get(k)!r} here" for k in differ)
            raise ValueError(f"the run there is another one ({values}); {other}, or the same ones to go on with it")
        for name, here in new["versions"].items():
            if (there := old["versions"].get(name)) != here:
                self.report(f"the run there was made with {name} {there}, here is {here}: results may differ")

    def _checkpoints(self) -> list[Path]:
        """What looks like our own, the oldest first; what somebody put beside it (``step_3_best``) is left alone."""
        found = [f for f in (self.run_dir / "checkpoints").glob("step_*") if f.is_dir()]
        return sorted((f for f in found if re.fullmatch(r"step_\d+", f.name)), key=_step_of)

    def _newest_checkpoint(self) -> Path | None:
        return next((f for f in reversed(self._checkpoints()) if (f / _STATE).exists()), None)

    def _newest_whole(self) -> tuple[Path | None, dict[str, Any]]:
        """The newest checkpoint that can be gone on from, and its state; says which are skipped.

        Raises:
            ValueError: there are some, and none of them can.
        """
        skipped = []
        for folder in reversed(self._checkpoints()):
            try:
                return folder, self._whole_state(folder)
            except (ValueError, OSError, KeyError) as e:
                skipped.append(f"{folder} is not whole ({e})")
                self.report(f"{skipped[-1]}: skipped")
        if skipped:
            raise ValueError(f"{'; '.join(skipped)}. No checkpoint can be gone on from: choose another run_dir")
        return None, {}

    def _whole_state(self, folder: Path) -> dict[str, Any]:
        """The state of a checkpoint. Raises ValueError, OSError or KeyError where something of it is damaged."""
        state = read_json(folder / _STATE)
        for name, before in state["sha256"].items():
            if sha256_of(folder / name) != before:
                raise ValueError(f"{name} is damaged")
        for name, size in state["sizes"].items():
            if (self.run_dir / name).stat().st_size < size:
                raise ValueError(f"{name} is shorter than it was")
        return state

    def save_checkpoint(self) -> Path:
        """Write ``checkpoints/step_N/``, whole or not at all, and drop the oldest ones."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        folder = self.run_dir / "checkpoints" / f"step_{self.step}"
        logs = [file for file in (self._metrics_file, self.log.path) if file.exists()]
        state = {"step": self.step, "token_budget": self.learner.token_budget, "adapter": self._adapter()}
        try:
            if folder.exists() and not (folder / _STATE).exists():  # damaged, or not ours
                folder.rename(folder.with_name(f"replaced_{folder.name}_{time.time_ns()}"))
            with whole_folder(folder) as unfinished:
                self.policy.save_adapter(unfinished)
                save_file(self.learner.tensors(), unfinished / "learner.safetensors")
                files = (f for f in unfinished.rglob("*") if f.is_file())
                state["sha256"] = {f.relative_to(unfinished).as_posix(): sha256_of(f) for f in files}
                write_json(unfinished / _STATE, state | {"sizes": {f.name: f.stat().st_size for f in logs}})
        except (OSError, SafetensorError) as e:  # a full disk is the latter too
            before = f"the one before stands: {self._newest_checkpoint()}"
            raise TrainingError(f"could not write {folder} ({e}); {before}. {_FREE_SPACE}") from e
        ours = [f for f in self._checkpoints() if _step_of(f) <= self.step and (f / _STATE).exists()]
        for old in ours[: -self.settings.keep_checkpoints]:
            shutil.rmtree(old)
        return folder

    def _resume(self, folder: Path | None, state: dict[str, Any]) -> None:
        """Go on from a checkpoint, or begin; what was logged after it is cut off, it will be done again."""
        from safetensors.torch import load_file

        for left in (self.run_dir / "checkpoints").glob(".step_*.*"):  # of a process killed while it wrote
            if left.is_dir() and re.fullmatch(r"\.step_\d+\.\d+\.(tmp|old)", left.name):
                shutil.rmtree(left)
        for file in (self._metrics_file, self.log.path):
            if file.exists():
                os.truncate(file, state.get("sizes", {}).get(file.name, 0))
        for tool in tools_of(self.engine):
            tool.rewind(state.get("step", 0))
        if folder is None:
            return
        self.policy.load_adapter(folder)
        self.learner.load_tensors(load_file(folder / "learner.safetensors", device=str(self.policy.device)))
        self.step, self.learner.token_budget = state["step"], state["token_budget"]
        self.metrics = list(read_json_lines(self._metrics_file))
        if self.settings.replay_groups and self.log.path.exists():
            self.buffer.add(t for t in self.log if t.step >= self.step - self.settings.replay_max_age)
        if self.step < self.settings.steps:
            self.report(f"going on after step {self.step}, from {folder}")


def _step_of(folder: Path) -> int:
    return int(folder.name[len("step_") :])


def questions_of(questions: Sequence[Question], settings: Settings, step: int) -> list[Question]:
    """The questions of a step: consecutive ones of an endless row of shuffled passes.

    A pass mixes known and look-up questions evenly (``evenly``). Where a step has four of one kind by chance and
    six of another, the policy is pulled towards searching or towards answering, whatever is asked.
    """
    n = len(questions)
    places = range(step * settings.questions_per_step, (step + 1) * settings.questions_per_step)
    rng = lambda number: random.Random(f"{settings.seed}/{number}")
    passes = {number: evenly(questions, rng(number)) for number in {i // n for i in places}}
    return [passes[i // n][i % n] for i in places]


def evenly(questions: Sequence[Question], rng: random.Random) -> list[Question]:
    """The questions in random order, but each stretch with nearly the same share of known, look-up and unmarked.

    >>> qs = [Question(str(i), "?", ["x"], known=i < 2) for i in range(4)]
    >>> [q.known for q in evenly(qs, random.Random(0))] in ([True, False] * 2, [False, True] * 2)
    True
    """
    kinds: dict[bool | None, list[Question]] = {}
    for q in questions:
        kinds.setdefault(q.known, []).append(q)
    placed = []
    for kind in rng.sample(sorted(kinds, key=str), len(kinds)):
        shuffled = rng.sample(kinds[kind], len(kinds[kind]))
        placed += [((k + 0.5) / len(shuffled), q) for k, q in enumerate(shuffled)]
    return [q for _, q in sorted(placed, key=lambda pair: pair[0])]


def describe(trajectories: list[Trajectory], num_generations: int) -> dict:
    """What the rollouts of a step look like: the part of the metrics that needs no model.

    Rollouts that were made to search or to answer (``explore``, ``pairs``) say nothing about the policy and count only
    where groups are looked at.
    """
    flat = groups_without_variance([t.reward for t in trajectories], num_generations)
    trajectories = [t for t in trajectories if t.first_action is None]
    rows, rewards = [row_of(t) for t in trajectories], [t.reward for t in trajectories]
    kinds = {kind: means([row for row in rows if row["known"] is known]) for kind, known in _KINDS.items()}
    return {
        "reward": fmean(rewards),
        "reward_std": pstdev(rewards),
        **{name: mean(rows, name) for name in ("em", "searches", "malformed")},
        **{f"{name}_{kind}": kinds[kind][name] for name in ("em", "reward", "searches") for kind in kinds},
        **{f"search_first_{kind}": kinds[kind]["searched"] for kind in kinds},
        "searches_per_need_lookup": kinds["lookup"]["searches_per_need"],
        "over_search": kinds["known"]["over_search"],
        "under_search": kinds["lookup"]["under_search"],
        "search_errors": sum(bool(c.error) for t in trajectories for c in t.searches),
        "completion_tokens": mean(rows, "tokens"),
        "zero_variance_groups": float(flat.float().mean()),
        **{f"finish_{reason}": fmean(t.finish_reason == reason for t in trajectories) for reason in FINISH_REASONS},
        **{f"rewards/{part}": fmean(t.rewards[part] for t in trajectories) for part in trajectories[0].rewards},
    }


#: Kinds of question that the metrics of a step tell apart, and what ``Question.known`` is for each.
_KINDS = {"known": True, "lookup": False}


def peak_memory_mb(device) -> float:
    """The most memory used so far, in MiB: on the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def train_grpo(
    model,
    tokenizer,
    dataset,
    search_engine,
    epochs: int = 3,
    lr: float = 1e-5,
    *,
    reward: Callable | None = None,
    run_dir: str | os.PathLike | None = None,
    **settings,
):
    """Teach a model when to search and when to answer, in one call.

    Args:
        model: a transformers causal LM, in 4-bit or not; LoRA adapters are attached if it has none.
        tokenizer: its tokenizer.
        dataset: ``Question``s or (question, answer) pairs; an answer may be a list of accepted ones.
        search_engine: see ``searchr1_lib.training.rollout.rollout``.
        epochs: passes over the dataset.
        lr: learning rate.
        reward: by default ``SearchR1Reward()``, see ``Trainer``.
        run_dir: where metrics, trajectories and checkpoints go; by default a new folder under ``runs/``.
        **settings: any other field of ``Settings``.

    Returns:
        the trained model (with its adapters), in training mode without dropout.

    Raises:
        ValueError: an empty dataset, an item that is neither form, or an unknown setting.
    """
    from .policy import prompt_of

    valid(Count, epochs, "epochs")
    questions = [_question(i, item) for i, item in enumerate(dataset)]
    if not questions:
        raise ValueError("train_grpo: the dataset is empty")
    wanted = Settings(**settings | {"learning_rate": lr})
    size = min(wanted.questions_per_step, len(questions))
    steps = settings.get("steps", epochs * -(-len(questions) // size))
    how = wanted.model_copy(update={"questions_per_step": size, "steps": steps})
    if not hasattr(model, "disable_adapter"):
        model.requires_grad_(False)
        model = attach_lora(model)
    policy = Policy(model, tokenizer, prompt_of(getattr(model.config, "_name_or_path", "")))
    run_dir = run_dir or Path("runs") / time.strftime("train_grpo-%Y%m%d-%H%M%S")
    Trainer(policy, questions, search_engine, reward, how, run_dir).train()
    return policy.model


def _question(number: int, item) -> Question:
    if isinstance(item, Question):
        return item
    try:
        text, answers = item
        return Question(f"q{number}", text, answers)
    except (TypeError, ValueError) as e:
        form = "neither a Question nor a (question, answer) pair"
        raise ValueError(f"dataset item {number} is {form}: {item!r:.80} ({e})") from None
