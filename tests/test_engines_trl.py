"""TRL on our episodes: its first step is ours, in one process and in two."""

import json
import os
import subprocess
import sys

import pytest
import torch
from engine_world import HOUSE, LIMITS, MODEL, ROOT, reward, world

from searchr1_lib import Settings, load_policy, rollout
from searchr1_lib import Trainer as OurTrainer
from searchr1_lib.files import TrajectoryLog, read_json_lines
from searchr1_lib.rewards import SearchR1Reward, score
from searchr1_lib.study.viewer import render_html
from searchr1_lib.training.learner import Learner
from searchr1_lib.training.trainer import questions_of

pytest.importorskip("accelerate", reason="TRL is missing: pip install -e '.[trl]'")
pytest.importorskip("trl", reason="TRL is missing: pip install -e '.[trl]'")

from searchr1_lib.engines.trl import Trainer, config_of

SETTINGS = {**LIMITS, "steps": 2, "questions_per_step": 2, "num_generations": 4, "learning_rate": 2e-3, "seed": 5}
SETTINGS |= {"loss_type": "dapo"}  # that of grpo is 0 in a first step, whatever the rollouts were


def policy_of(seed=0):
    return load_policy(MODEL, seed=seed)


def weights(policy) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in policy.parameters()])


def same_rollouts(ours, theirs) -> None:
    assert [t.question.id for t in ours] == [t.question.id for t in theirs]
    for a, b in zip(ours, theirs):
        assert (a.prompt_ids, a.completion_ids, a.mask) == (b.prompt_ids, b.completion_ids, b.mask)
        assert b.logprobs == pytest.approx(a.logprobs, abs=1e-5)  # another process may round otherwise
        assert (a.reward, a.rewards, a.turn_rewards) == (b.reward, b.rewards, b.turn_rewards)
        assert b.advantages == pytest.approx(a.advantages, abs=1e-5) and len(b.advantages) == len(b.mask)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "gspo"])
def test_first_step_is_ours(loss_type, tmp_path):
    """From the same seed: the same questions and rollouts; advantages, loss, gradient and new weights to rounding."""
    questions, engine = world()
    settings = Settings(**SETTINGS | {"steps": 1, "loss_type": loss_type})
    mine, other = policy_of(), policy_of()
    ours = OurTrainer(mine, questions, engine, reward(), settings, tmp_path / "ours", report=None)
    ours.train()
    theirs = Trainer(other, questions, engine, reward(), settings, tmp_path / "trl", micro_batch=4)
    begin = weights(other)
    assert torch.equal(begin, weights(policy_of()))
    theirs.train()
    same_rollouts(list(TrajectoryLog(tmp_path / "ours" / "trajectories.jsonl")), theirs.drawn)
    (row,) = read_json_lines(tmp_path / "trl" / "metrics.jsonl")
    assert row["loss"] == pytest.approx(ours.metrics[0]["loss"], abs=1e-5)
    assert (loss_type == "dapo") == (abs(row["loss"]) > 1e-3)
    for name in ("grad_norm", "reward", "searches", "learning_rate"):
        assert row[name] == pytest.approx(ours.metrics[0][name], rel=1e-3), name
    assert all(p.dtype == torch.float32 for p in other.parameters())
    moved = weights(mine) - begin
    assert float(torch.nn.functional.cosine_similarity(weights(other) - begin, moved, dim=0)) > 0.999
    assert moved.abs().max() > 1e-4


def test_what_it_leaves_opens_here(tmp_path):
    """Its folder holds what our viewer and our policy read."""
    questions, engine = world()
    settings = Settings(**SETTINGS | {"warmup_steps": 3})
    trainer = Trainer(policy_of(), questions, engine, None, settings, tmp_path)
    trainer.train()
    rates = [row["learning_rate"] for row in read_json_lines(tmp_path / "metrics.jsonl")]
    assert rates == [settings.learning_rate_at(0), settings.learning_rate_at(1)] != [settings.learning_rate] * 2
    assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(settings.learning_rate_at(2))
    logged = list(TrajectoryLog(tmp_path / "trajectories.jsonl"))
    assert [t.step for t in logged] == [0] * 8 + [1] * 8 and len({t.group for t in logged}) == 4
    assert len(render_html(logged)) > 1000
    again = load_policy(MODEL, adapter=tmp_path / "adapter")
    assert torch.equal(weights(again), weights(trainer.policy))
    with pytest.raises(ValueError, match="holds a run already"):
        Trainer(policy_of(), questions, engine, None, Settings(**SETTINGS), tmp_path)


def launch(folder, steps: int, *more: str) -> list[dict]:
    """Train in two processes; the rows of metrics."""
    told = {name.replace("_", "-"): value for name, value in (SETTINGS | {"steps": steps}).items()}
    arguments = [part for name, value in told.items() for part in (f"--{name}", str(value))]
    files = ["--model", MODEL, "--engine", str(HOUSE), "--data", str(HOUSE / "questions.jsonl"), "--out", str(folder)]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += ["--main_process_port", "0", "-m", "searchr1_lib", "trl"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*launcher, *files, *arguments, *more], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return list(read_json_lines(folder / "metrics.jsonl"))


def test_two_processes(tmp_path):
    """Each rolls out its half of the questions from a seed of its own; together they take one step, and it is ours."""
    row = launch(tmp_path, 2)[0]
    theirs = [t for t in TrajectoryLog(tmp_path / "trajectories.jsonl") if t.step == 0]
    assert [t.group for t in theirs] == ["0:0:0"] * 4 + ["0:1:0"] * 4

    settings, policy, (questions, engine) = Settings(**SETTINGS), policy_of(seed=SETTINGS["seed"]), world()
    ours = []
    for process, question in enumerate(questions_of(questions, settings, 0)):
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + process * 2_147_483_629)
        ours += rollout(policy, [question], engine, num_generations=4, generator=generator, **LIMITS)
    score(SearchR1Reward(), ours).keep(ours)
    learner = Learner(policy, settings)
    learner.assign_advantages(ours)
    same_rollouts(ours, theirs)
    metrics = learner.update(ours, 0)
    assert abs(metrics["loss"]) > 1e-3
    assert row["loss"] == pytest.approx(metrics["loss"], rel=1e-3)
    assert row["grad_norm"] == pytest.approx(metrics["grad_norm"], rel=1e-3)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "LORA"


@pytest.mark.parametrize(
    "given, said",
    [
        ({"explore": 1}, "TRL has no explore=1: leave it"),
        ({"baseline": "leave_one_out", "scale_rewards": "none"}, "baseline='leave_one_out'"),
        ({"credit": "return", "mask_observations": False}, "credit='return', mask_observations=False: leave them"),
        ({"trees": 2, "replay_groups": 1}, "trees=2, replay_groups=1"),
        ({"credit": "gigpo"}, "credit='gigpo': leave it"),
    ],
)
def test_what_trl_has_not_is_named(given, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        config_of(Settings(**SETTINGS | given), tmp_path, cpu=True)


def test_questions_of_the_same_text_are_refused(tmp_path):
    questions, engine = world()
    with pytest.raises(ValueError, match="same text"):
        Trainer(policy_of(), [*questions, questions[0]], engine, None, Settings(**SETTINGS), tmp_path)
