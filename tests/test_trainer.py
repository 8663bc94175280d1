"""Training: exact splitting, resuming after any interruption, faults, and the mission's own example."""

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch

from searchr1_lib.data import load_passages, load_questions
from searchr1_lib.environment.base import Observation
from searchr1_lib.files import TrajectoryLog
from searchr1_lib.records import Question, Trajectory
from searchr1_lib.rewards import RewardError, SearchR1Reward, score
from searchr1_lib.search import BM25Search, LocalSearch
from searchr1_lib.training.grpo import group_advantages
from searchr1_lib.training.learner import Batch, Learner, _weigh_forced
from searchr1_lib.training.policy import load_policy
from searchr1_lib.training.rollout import _Episode, rollout
from searchr1_lib.training.trainer import Settings, Trainer, TrainingError, describe, train_grpo

TINY = "data/tiny_qwen"
SHORT = Settings(
    steps=4,
    questions_per_step=2,
    num_generations=4,
    learning_rate=1.5e-3,
    checkpoint_every=2,
    max_turns=1,
    max_turn_tokens=40,
    entropy_coef=0.01,
)
TIMES = {"seconds", "seconds_rollout", "seconds_update", "tokens_per_second", "peak_memory_mb"}


@pytest.fixture(scope="module")
def engine():
    return BM25Search(load_passages("data/almanac/passages.jsonl"))


@pytest.fixture(scope="module")
def questions():
    return load_questions("data/almanac/train.jsonl")[:20]


def trainer(run_dir, engine, questions, settings=SHORT, **kwargs):
    return Trainer(load_policy(TINY), questions, engine, settings=settings, run_dir=run_dir, report=None, **kwargs)


def outcome(run_dir):
    """What must be the same: the metrics without times, and the adapter's bytes."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    newest = max((run_dir / "checkpoints").glob("step_*"), key=lambda p: int(p.name.split("_")[1]))
    return (
        [{k: v for k, v in r.items() if k not in TIMES} for r in rows],
        (newest / "adapter_model.safetensors").read_bytes(),
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory, engine, questions):
    run = tmp_path_factory.mktemp("finished") / "run"
    trainer(run, engine, questions).train()
    return run


def test_a_run_leaves_its_folder(finished):
    assert {p.name for p in finished.iterdir()} == {
        "settings.json",
        "metrics.jsonl",
        "trajectories.jsonl",
        "checkpoints",
        ".lock",
    }
    log = TrajectoryLog(finished / "trajectories.jsonl").read()
    assert len(log) == 4 * 8
    assert all(t.reward is not None and t.advantage is not None and t.rewards for t in log)
    assert {t.step for t in log} == {0, 1, 2, 3}
    rows, _ = outcome(finished)
    assert [r["step"] for r in rows] == [1, 2, 3, 4]
    assert all(r["ratio"] == pytest.approx(1, abs=1e-4) for r in rows)  # from the recorded log-probabilities
    assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == ["step_2", "step_4"]


def test_the_adapter_opens_with_peft(finished):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(TINY)
    model = PeftModel.from_pretrained(base, str(finished / "checkpoints" / "step_4"))
    assert any("lora_B" in n and p.abs().max() > 0 for n, p in model.named_parameters())


def test_resuming_gives_the_uninterrupted_run(tmp_path, engine, questions, finished):
    stop = lambda t, row: row["step"] == 3
    trainer(tmp_path / "run", engine, questions, callbacks=[stop]).train()
    with open(tmp_path / "run" / "metrics.jsonl", "a") as f:
        f.write('{"step": 99')  # cut off in the middle of a line
    trainer(tmp_path / "run", engine, questions).train()
    assert outcome(tmp_path / "run") == outcome(finished)


def test_killed_at_any_moment_it_goes_on_to_the_same_end(tmp_path, finished):
    """SIGKILL while the second checkpoint is being written, then again from nothing but the folder."""
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(f"""
        import os, signal, sys
        sys.path.insert(0, "tests")
        from test_trainer import SHORT, BM25Search, Trainer, load_passages, load_policy, load_questions
        from pathlib import Path
        engine = BM25Search(load_passages("data/almanac/passages.jsonl"))
        questions = load_questions("data/almanac/train.jsonl")[:20]
        t = Trainer(load_policy("{TINY}"), questions, engine, settings=SHORT, run_dir=sys.argv[1], report=None)
        if sys.argv[2] == "kill":
            real = t.policy.save_adapter
            def save(folder):
                real(folder)
                if t.step == 4:
                    os.kill(os.getpid(), signal.SIGKILL)
            t.policy.save_adapter = save
        t.train()
    """)
    )
    run = lambda what: subprocess.run(
        [sys.executable, str(script), str(tmp_path / "run"), what], capture_output=True, text=True
    )
    assert run("kill").returncode == -signal.SIGKILL
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.startswith("step")] == ["step_2"]
    again = run("on")
    assert again.returncode == 0, again.stderr[-2000:]
    assert outcome(tmp_path / "run") == outcome(finished)


def test_more_steps_go_on_from_a_finished_run(tmp_path, engine, questions):
    two, three = (SHORT.model_copy(update=dict(steps=n)) for n in (2, 3))
    trainer(tmp_path / "run", engine, questions, two).train()
    longer = trainer(tmp_path / "run", engine, questions, three)
    assert longer.step == 2
    longer.train()
    assert [m["step"] for m in longer.metrics] == [1, 2, 3]


def test_other_settings_or_another_version_are_refused(tmp_path, engine, questions, finished):
    with pytest.raises(ValueError, match="learning_rate"):
        trainer(finished, engine, questions, SHORT.model_copy(update=dict(learning_rate=1e-3)))
    (tmp_path / "settings.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="another version"):
        trainer(tmp_path, engine, questions)
    (tmp_path / "settings.json").write_text('{"form')
    with pytest.raises(ValueError, match="broken"):
        trainer(tmp_path, engine, questions)


def gradients(tmp_path, engine, trajectories, budget, **kwargs):
    settings = SHORT.model_copy(update=dict(tokens_per_micro_batch=budget, **kwargs))
    t = Trainer(
        load_policy(TINY),
        [trajectories[0].question],
        engine,
        settings=settings,
        run_dir=tmp_path / f"run{budget}{kwargs}",
        report=None,
    )
    with t.learner.checkpointing():
        metrics = t.learner.gradient(trajectories)
    return metrics, [p.grad.clone() for p in t.policy.parameters()]


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_micro_batches_and_checkpointing_change_nothing(tmp_path, engine, questions, loss_type):
    got = rollout(
        load_policy(TINY),
        questions[:3],
        engine,
        num_generations=4,
        max_turns=1,
        max_turn_tokens=40,
        generator=torch.Generator().manual_seed(0),
    )
    score(SearchR1Reward(), got).keep(got)
    for t, a in zip(got, group_advantages([t.reward for t in got], 4).tolist()):
        t.advantages = [a] * len(t.mask)
    whole = gradients(tmp_path, engine, got, 10**6, loss_type=loss_type)
    for other in (
        gradients(tmp_path, engine, got, 300, loss_type=loss_type),
        gradients(tmp_path, engine, got, 10**6, loss_type=loss_type, gradient_checkpointing=True),
    ):
        assert other[0] == pytest.approx(whole[0], abs=1e-5)
        for a, b in zip(whole[1], other[1]):
            assert torch.allclose(a, b, atol=1e-6, rtol=1e-3)


def test_memory_running_out_makes_smaller_micro_batches(tmp_path, engine, questions, monkeypatch):
    t = trainer(tmp_path, engine, questions, SHORT.model_copy(update=dict(steps=1)))
    real, seen = t.learner._hidden, []

    def tight(part):
        seen.append(len(part))
        if len(part) > 2:
            raise torch.OutOfMemoryError("no")
        return real(part)

    monkeypatch.setattr(t.learner, "_hidden", tight)
    t.train()
    assert t.step == 1 and t.learner.token_budget < SHORT.tokens_per_micro_batch


def test_nan_stops_with_advice_and_the_checkpoint_stands(tmp_path, engine, questions):
    def spoil(t, row):
        if row["step"] == 2:
            next(iter(t.policy.parameters())).data[0, 0] = float("nan")

    t = trainer(tmp_path, engine, questions, callbacks=[spoil])
    t.save_checkpoint()
    with pytest.raises((TrainingError, FloatingPointError), match="learning_rate|NaN|nan"):
        t.train()


def test_a_failing_reward_trains_nothing(tmp_path, engine, questions):
    def reward(trajectories):
        return [float("nan")] * len(trajectories)

    t = trainer(tmp_path, engine, questions, reward=reward)
    before = [p.clone() for p in t.policy.parameters()]
    with pytest.raises(RewardError, match="reward"):
        t.train()
    assert all(torch.equal(a, b) for a, b in zip(before, t.policy.parameters()))


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, engine, questions, monkeypatch):
    t = trainer(tmp_path, engine, questions)
    first = t.save_checkpoint()
    t.step = 2

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(TrainingError, match="No space left"):
        t.save_checkpoint()
    assert list((tmp_path / "checkpoints").iterdir()) == [first]


def test_only_what_the_trainer_wrote_is_a_checkpoint(tmp_path, engine, questions):
    one_each = SHORT.model_copy(update=dict(steps=2, checkpoint_every=1, keep_checkpoints=1))
    copied = [tmp_path / "checkpoints" / name for name in ("step_3_best", "step_best", "step_")]
    for folder in copied:
        folder.mkdir(parents=True)
    t = trainer(tmp_path, engine, questions, one_each)
    t.save_checkpoint()
    t.step = 1
    newest = t.save_checkpoint()
    assert sorted((tmp_path / "checkpoints").iterdir()) == sorted([*copied, newest])
    assert t._newest_checkpoint() == newest


def test_a_disk_that_is_really_full(tmp_path, engine, questions):
    """No file may grow beyond 20 kB: what is written then fails as on a full disk, deep in safetensors."""
    t = trainer(tmp_path, engine, questions)
    first, limits = t.save_checkpoint(), resource.getrlimit(resource.RLIMIT_FSIZE)
    t.step = 2
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(TrainingError, match="could not write .*step_2.*the one before stands: .*step_0"):
            t.save_checkpoint()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "checkpoints").iterdir()) == [first]


def test_nothing_else_in_the_folder_stops_a_run(tmp_path, engine, questions, finished):
    run, said = tmp_path / "run", []
    (run / "checkpoints" / "step_4").mkdir(parents=True)  # somebody's own, by the name that ours will have
    (run / "checkpoints" / "step_4" / "mine.txt").write_text("keep me")
    (run / "checkpoints" / "step_9").write_text("a file")
    (run / "checkpoints" / ".step_2.5.tmp").write_text("a file")
    with pytest.raises(ValueError, match="step_4 is not whole .*choose another run_dir"):
        trainer(run, engine, questions)
    stop = lambda t, row: row["step"] == 2
    (run / "checkpoints" / "step_4").rename(run / "step_4")
    trainer(run, engine, questions, callbacks=[stop]).train()
    (run / "step_4").rename(run / "checkpoints" / "step_4")
    t = Trainer(load_policy(TINY), questions, engine, settings=SHORT, run_dir=run, report=said.append)
    assert "step_4 is not whole" in said[0] and t.step == 2
    t.train()
    assert [f.read_text() for f in (run / "checkpoints").glob("replaced_step_4_*/mine.txt")] == ["keep me"]
    weights = [(folder / "checkpoints/step_4/adapter_model.safetensors").read_bytes() for folder in (run, finished)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    "damage",
    [
        lambda run: (run / "checkpoints/step_4/state.json").unlink(),
        lambda run: (run / "checkpoints/step_4/state.json").write_text('{"step": 4'),
        lambda run: os.truncate(run / "checkpoints/step_4/adapter_model.safetensors", 5000),
        lambda run: (run / "checkpoints/step_4/learner.safetensors").write_bytes(b"x"),
        lambda run: (run / "checkpoints/step_4/adapter_config.json").unlink(),
        lambda run: os.truncate(run / "metrics.jsonl", (run / "metrics.jsonl").stat().st_size - 3),
        lambda run: os.truncate(run / "trajectories.jsonl", (run / "trajectories.jsonl").stat().st_size // 2 + 50_000),
    ],
)
def test_the_newest_whole_checkpoint_is_gone_on_from(tmp_path, engine, questions, finished, damage):
    run, said = tmp_path / "run", []
    shutil.copytree(finished, run)
    damage(run)
    t = Trainer(load_policy(TINY), questions, engine, settings=SHORT, run_dir=run, report=said.append)
    assert t.step == 2 and "step_4 is not whole" in said[0] and "step_2" in said[1]
    t.train()
    assert outcome(run) == outcome(finished)


def test_where_no_checkpoint_is_whole_nothing_is_thrown_away(tmp_path, engine, questions, finished):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    os.truncate(run / "metrics.jsonl", 10)
    with pytest.raises(ValueError, match="step_4 is not whole .*step_2 is not whole .*choose another run_dir"):
        trainer(run, engine, questions)
    assert (run / "trajectories.jsonl").read_bytes() == (finished / "trajectories.jsonl").read_bytes()


def test_a_run_goes_on_as_itself_alone(tmp_path, engine, questions, finished):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    passages = load_passages("data/almanac/passages.jsonl")
    price = 0.2
    usual = {"questions": questions, "engine": engine, "reward": None, "policy": {}}
    others = {
        "reward": [SearchR1Reward(cost=0.9), lambda rollouts: [price * len(t.searches) for t in rollouts]],
        "questions": [questions[:19], questions[::-1], [*questions[:-1], Question(questions[-1].id, "Who?", ["a"])]],
        "engine": [BM25Search(passages[:-1]), BM25Search(passages, k1=1.0), lambda query: "nothing"],
        "policy": [{"quantize": False}, {"prompt": "Q: {question}"}, {"lora_alpha": 8}, {"seed": 1}],
    }
    named = {"quantize": "model", "prompt": "prompt", "lora_alpha": "lora", "seed": "adapter"}
    for what, values in others.items():
        for value in values:
            made = usual | {what: value}
            policy = load_policy(TINY, **made["policy"])
            name = named[next(iter(value))] if what == "policy" else what
            with pytest.raises(ValueError, match=f"the run there is another one .*{name}: "):
                Trainer(policy, made["questions"], made["engine"], made["reward"], SHORT, run, report=None)
    assert outcome(run) == outcome(finished)


def test_the_trained_policy_goes_on_in_its_own_run(tmp_path, engine, questions):
    t = trainer(tmp_path, engine, questions, SHORT.model_copy(update=dict(steps=1)))
    for steps in (2, 3):
        t.train()
        settings = SHORT.model_copy(update=dict(steps=steps))
        t = Trainer(t.policy, questions, engine, settings=settings, run_dir=tmp_path, report=None)
        assert t.step == steps - 1


def test_other_versions_are_told(tmp_path, engine, questions, finished):
    run, said = tmp_path / "run", []
    shutil.copytree(finished, run)
    settings = json.loads((run / "settings.json").read_text())
    settings["versions"]["torch"] = "0.1"
    (run / "settings.json").write_text(json.dumps(settings))
    Trainer(load_policy(TINY), questions, engine, settings=SHORT, run_dir=run, report=said.append)
    assert said == [f"the run there was made with torch 0.1, here is {torch.__version__}: results may differ"]


def test_two_in_one_folder(tmp_path, engine, questions):
    refused = []

    def another(t, row):
        with pytest.raises(ValueError, match="another trainer is at work in"):
            trainer(tmp_path, engine, questions)
        refused.append(row["step"])
        return True

    first = trainer(tmp_path, engine, questions, callbacks=[another])
    stale = trainer(tmp_path, engine, questions)
    first.train()
    assert refused == [1]
    with pytest.raises(ValueError, match="another trainer was in .* since this one was made"):
        stale.train()
    trainer(tmp_path, engine, questions, SHORT.model_copy(update=dict(steps=2))).train()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_ctrl_c_finishes_the_step_and_saves(tmp_path, engine, questions):
    def interrupt(t, row):
        if row["step"] == 1:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs have it ignored
    try:
        t = trainer(tmp_path, engine, questions, callbacks=[interrupt])
        t.train()
        assert t.step == 1 and (tmp_path / "checkpoints" / "step_1").is_dir()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_kl_against_the_frozen_base_starts_at_zero(tmp_path, engine, questions):
    t = trainer(tmp_path, engine, questions, SHORT.model_copy(update=dict(steps=2, beta=0.05)))
    t.train()
    assert t.metrics[0]["kl"] == pytest.approx(0, abs=1e-6) and t.metrics[1]["kl"] > 0


def test_the_missions_own_example_runs(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(TINY), AutoTokenizer.from_pretrained(TINY)
    trained = train_grpo(
        model,
        tokenizer,
        [("Who discovered penicillin?", "Alexander Fleming")],
        LocalSearch(index_dir="./data"),
        epochs=3,
        lr=1e-5,
        run_dir=tmp_path / "run",
        max_turn_tokens=40,
    )
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3
    assert hasattr(trained, "disable_adapter")


@pytest.mark.parametrize(
    "dataset, message",
    [
        ([], "empty"),
        ([("only",)], "item 0"),
        ([3], "item 0"),
        ([("Who?", "x"), ("When?", 1912)], "item 1 .*1912"),
        ([("When?", [1912])], "item 0"),
        ([("When?", None)], "item 0"),
    ],
)
def test_a_wrong_dataset_is_named(dataset, message):
    with pytest.raises(ValueError, match=message):
        train_grpo(None, None, dataset, None)


@pytest.mark.parametrize("epochs", [0, -1, 1.5, True, None])
def test_epochs_are_counted(epochs):
    with pytest.raises(ValueError, match="epochs"):
        train_grpo(None, None, [Question("1", "x?", ["y"])], None, epochs=epochs)


def test_an_unknown_setting_is_named():
    with pytest.raises(ValueError, match="temprature"):
        train_grpo(None, None, [Question("1", "x?", ["y"])], None, temprature=1)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(steps=0),
        dict(steps=True),
        dict(steps="3"),
        dict(num_generations=1),
        dict(learning_rate=2),
        dict(temperature=0),
        dict(temperature=float("nan")),
        dict(max_turns=-1),
        dict(max_grad_norm=-1),
        dict(epsilon=-0.1),
        dict(epsilon_high=float("inf")),
        dict(search_timeout=0),
        dict(seed=None),
        dict(mask_observations=1),
    ],
)
def test_impossible_settings_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SHORT.model_copy(update=wrong)


def test_max_grad_norm_may_be_0_and_a_whole_number_is_a_number():
    assert Settings(max_grad_norm=0).max_grad_norm == 0 and isinstance(Settings(beta=1).beta, float)
    assert Settings(search_timeout=None).limits()["search_timeout"] is None


def test_a_pass_over_the_questions_asks_each_once(tmp_path, engine, questions):
    t = trainer(tmp_path, engine, questions)
    asked = [q.id for step in range(10) for q in t.questions_of(step)]
    assert sorted(asked) == sorted(q.id for q in questions)


def test_the_learning_rate_rises_stays_and_falls(tmp_path, engine, questions):
    t = trainer(tmp_path, engine, questions, SHORT.model_copy(update=dict(steps=20, warmup_steps=3, decay_steps=4)))
    rates = [t.settings.learning_rate_at(step) / 1.5e-3 for step in range(20)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1]) and rates[4:16] == [1.0] * 12
    assert rates[16:] == pytest.approx([0.8, 0.6, 0.4, 0.2])


VARIANTS = {
    "value head": dict(baseline="value", scale_rewards="batch", num_iterations=2),
    "snapshot": dict(beta=0.01, ref_model_sync_steps=1),
    "8 bit": dict(optim="adamw_8bit"),
    "dynamic sampling": dict(dynamic_sampling=2, entropy_coef=0.0),
    "turn credit": dict(credit="return"),
    "igpo, shuffled": dict(credit="igpo", shuffle_credit=True),
    "trees": dict(credit="tree_grpo", trees=2),
    "replay": dict(replay_groups=2, replay_max_age=1, llds_coef=0.1),
}


@pytest.mark.parametrize("kind", VARIANTS)
def test_every_variant_trains_and_resumes_exactly(tmp_path, engine, questions, kind):
    settings = SHORT.model_copy(update=dict(steps=2, checkpoint_every=1, **VARIANTS[kind]))
    whole = trainer(tmp_path / "whole", engine, questions, settings)
    before = [p.detach().clone() for p in whole.learner.parameters()]
    whole.train()
    moved = [not torch.equal(a, b) for a, b in zip(before, whole.learner.parameters())]
    assert moved[-1] and sum(moved) > len(moved) / 2  # the last parameter is the value head's bias, if there is one
    trainer(tmp_path / "part", engine, questions, settings, callbacks=[lambda t, row: True]).train()
    trainer(tmp_path / "part", engine, questions, settings).train()
    assert outcome(tmp_path / "part") == outcome(tmp_path / "whole")


@pytest.fixture(scope="module")
def scored(engine, questions):
    got = rollout(
        load_policy(TINY),
        questions[:6],
        engine,
        num_generations=4,
        max_turns=2,
        max_turn_tokens=60,
        generator=torch.Generator().manual_seed(2),
    )
    score(SearchR1Reward(), got).keep(got)
    return got


def learner(**kwargs):
    return Learner(load_policy(TINY), SHORT.model_copy(update=dict(entropy_coef=0.0, **kwargs)))


def test_rollouts_that_teach_nothing_cost_no_backward_pass(scored, monkeypatch):
    one = learner()
    one.assign_advantages(scored)
    idle = [t for t in scored if t.advantage == 0]
    assert idle and len(idle) < len(scored)
    metrics, grads = one.gradient(scored), [p.grad for p in one.parameters()]
    other = learner()
    monkeypatch.setattr(other, "_is_idle", lambda t: False)
    assert other.gradient(scored) == pytest.approx(metrics, abs=1e-6)
    for a, b in zip(grads, other.parameters()):
        assert torch.allclose(a, b.grad, atol=1e-7)


def test_a_batch_of_idle_rollouts_still_moves_by_momentum(scored):
    one = learner(optim="adamw_torch", learning_rate=1e-3)
    one.assign_advantages(scored)
    one.update(scored, 0)
    before = [p.detach().clone() for p in one.parameters()]
    for t in scored:
        t.advantages = [0.0] * len(t.mask)
    row = one.update(scored, 1)
    assert row["grad_norm"] == 0 and any(not torch.equal(a, b) for a, b in zip(before, one.parameters()))


def test_max_grad_norm_0_clips_nothing_and_the_norm_is_logged(scored):
    norms, moved = {}, {}
    for most in (0, 1e9, 1e-3):
        one = learner(max_grad_norm=most)
        one.optimizer = torch.optim.SGD(one.parameters(), lr=1.0)
        one.optimizer.param_groups[0]["speed"] = 1
        one.assign_advantages(scored)
        before = torch.cat([p.detach().flatten() for p in one.parameters()])
        norms[most] = one.update(scored, 0)["grad_norm"]
        moved[most] = torch.cat([p.detach().flatten() for p in one.parameters()]) - before
    assert norms[0] == norms[1e9] == norms[1e-3] > 1e-3
    assert torch.equal(moved[0], moved[1e9]) and moved[1e-3].norm() < moved[0].norm()


def test_the_value_head_learns_what_to_expect(scored):
    one = learner(baseline="value", scale_rewards="none", learning_rate=1e-3, num_iterations=8, cliprange_value=1.0)
    one.assign_advantages(scored)
    assert all(t.advantage == pytest.approx(t.reward, abs=1e-6) for t in scored)  # the head begins with 0 everywhere
    first = float(one.gradient(scored)["value_loss"])
    assert first == pytest.approx(
        sum(t.reward**2 * sum(t.mask) for t in scored) / 2 / sum(sum(t.mask) for t in scored), rel=1e-4
    )
    assert one.update(scored, 0)["value_loss"] < 0.9 * first


def test_credit_by_turn_differs_from_turn_to_turn(scored):
    for i, t in enumerate(scored):
        t.turn_rewards = [float(i % 2)] + [0.0] * (t.turns - 1)
    one = learner(credit="return")
    one.assign_advantages(scored)
    for t in scored:
        if t.turns > 1:
            first = [t.advantages[k] for s in t.segments if s.turn == 0 for k in range(s.start, s.end)]
            later = [t.advantages[k] for s in t.segments if s.turn > 0 for k in range(s.start, s.end)]
            assert len(set(first)) == 1 and set(later) == {0.0}  # every later turn earned the same
    assert any(t.turns > 1 and t.advantages[0] != 0 for t in scored)


def test_dynamic_sampling_draws_again_and_keeps_the_size(tmp_path, engine, questions):
    settings = SHORT.model_copy(update=dict(dynamic_sampling=3))
    order = trainer(tmp_path / "look", engine, questions, settings).questions_of(0)
    flat = {order[0].id, *(q.id for q in questions[::2] if q.id != order[1].id)}
    t = trainer(
        tmp_path / "run",
        engine,
        questions,
        settings,
        reward=lambda ts: [1.0 if x.question.id in flat else float(i % 2) for i, x in enumerate(ts)],
    )
    drawn, chosen = t._collect()
    assert len(chosen) == 8 and len(drawn) > 8
    assert [x.question.id in flat for x in drawn].count(True) % 4 == 0
    assert len({x.group for x in drawn}) == len(drawn) // 4  # a group each, also of a question drawn twice
    ids = set(map(id, chosen))
    assert all(x.question.id in flat and x.advantage == 0 for x in drawn if id(x) not in ids)


def test_the_reference_is_the_base_or_a_snapshot(scored):
    torch.manual_seed(1)
    one = learner(beta=0.1, ref_model_sync_steps=2, learning_rate=1e-3)
    for p in one.parameters():
        p.data.add_(torch.randn_like(p) * 0.01)
    one.assign_advantages(scored)
    base = one.references(scored)
    assert one.update(scored, 0)["kl"] == pytest.approx(0, abs=1e-6)  # the snapshot was taken just now
    again = one.references(scored)
    assert any(max(abs(a - b) for a, b in zip(base[id(t)], again[id(t)])) > 1e-3 for t in scored)
    assert one.update(scored, 1)["kl"] > 1e-6


@pytest.mark.parametrize(
    "wrong",
    [
        dict(baseline="value"),
        dict(credit="return", baseline="leave_one_out"),
        dict(credit="turn"),
        dict(shuffle_credit=True),
        dict(credit="tree_grpo"),
        dict(trees=3),
        dict(trees=8),
        dict(trees=2, explore=1),
        dict(trees=2, pairs=1),
        dict(explore=1, pairs=1),
        dict(pairs=4),
        dict(pairs=1, baseline="none", scale_rewards="none"),
        dict(llds_coef=0.1),
        dict(optim="sgd"),
        dict(gamma=1.5),
        dict(top_entropy_quantile=0.0),
        dict(dynamic_sampling=1, baseline="none", scale_rewards="none"),
        dict(kl_every=-1),
        dict(loss_type="ppo"),
    ],
)
def test_settings_that_cannot_be_name_the_parameter(wrong):
    with pytest.raises(ValueError, match="|".join(wrong)):
        Settings(**wrong)


FP16 = SHORT.model_copy(
    update=dict(steps=1, questions_per_step=1, entropy_coef=0.0, kl_every=0, max_turns=0, max_turn_tokens=40)
)


@pytest.fixture(scope="module")
def short(engine, questions):
    """Four short rollouts of one question, in fp16."""
    return rollout(
        load_policy(TINY, dtype="float16"),
        questions[:1],
        engine,
        num_generations=4,
        generator=torch.Generator().manual_seed(0),
        **FP16.limits(),
    )


def learner_on(rollouts, rewards, dtype="float16"):
    made = Learner(load_policy(TINY, dtype=dtype), FP16)
    for t, reward in zip(rollouts, rewards):
        t.reward = reward
    made.assign_advantages(rollouts)
    return made


def test_in_fp16_a_step_without_variance_changes_nothing(short):
    one = learner_on(short, [1.0] * 4)
    before = [p.detach().clone() for p in one.parameters()]
    assert one.update(short, 0)["grad_norm"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, one.parameters()))


def test_in_fp16_no_step_is_lost_and_the_gradient_is_the_true_one(short):
    exact = learner_on(short, [0.0, 1.0, 0.0, 1.0], "float32")
    exact.gradient(short)
    want = torch.cat([p.grad.flatten() for p in exact.parameters()])
    one = learner_on(short, [0.0, 1.0, 0.0, 1.0])
    for scale in (one.loss_scale, 2.0**30):  # the second overflows
        one.loss_scale = scale
        one.gradient(short)
        got = torch.cat([p.grad.flatten() for p in one.parameters()])
        assert (got - want).norm() < 0.05 * want.norm()
    assert one.loss_scale < 2.0**30
    again = learner_on(short, [0.0, 1.0, 0.0, 1.0])
    again.load_tensors(one.tensors())
    assert again.loss_scale == one.loss_scale
    one.loss_scale = 2.0**30
    before = [p.detach().clone() for p in one.parameters()]
    row = one.update(short, 0)
    assert row["grad_norm"] == pytest.approx(float(want.norm()), rel=0.05)
    assert any(not torch.equal(a, b) for a, b in zip(before, one.parameters()))


def test_where_fp16_is_too_narrow_training_ends_with_advice(tmp_path, engine, questions):
    reward = lambda ts: [1e12 * (i % 2) for i in range(len(ts))]
    t = Trainer(
        load_policy(TINY, dtype="float16"),
        questions,
        engine,
        reward,
        FP16.model_copy(update=dict(scale_rewards="none")),
        tmp_path,
        report=None,
    )
    before = [p.detach().clone() for p in t.policy.parameters()]
    with pytest.raises(TrainingError, match="gradient norm is (nan|inf).*learning_rate.*bfloat16 or float32"):
        t.train()
    assert t.learner.loss_scale == 1 and not (tmp_path / "metrics.jsonl").exists()
    assert all(torch.equal(a, b) for a, b in zip(before, t.policy.parameters()))


def test_a_paged_optimiser_needs_a_gpu():
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="paged_adamw_8bit"):
            learner(optim="paged_adamw_8bit")


def test_only_the_undecided_tokens_get_an_advantage(scored):
    one = learner(top_entropy_quantile=0.2)
    one.assign_advantages(scored)
    tokens = [
        (a, e) for t in scored if t.advantage for a, e, m in zip(t.advantages, t.token_values["entropy"], t.mask) if m
    ]
    least = min(e for a, e in tokens if a)
    assert all(a == 0 for a, e in tokens if e < least)
    everything = sum(sum(t.mask) for t in scored)
    chosen = sum(e >= least for t in scored for e, m in zip(t.token_values["entropy"], t.mask) if m)
    assert 0.15 < chosen / everything < 0.25
    assert any(t.advantage == 0 and one._is_idle(t) for t in scored)


def test_without_the_mask_retrieved_text_is_trained_on(scored):
    masked, bare = learner(loss_type="dapo"), learner(loss_type="dapo", mask_observations=False)
    assert any(0 in t.mask for t in scored)
    for one in (masked, bare):
        one.assign_advantages(scored)
    usual, all_tokens = masked.gradient(scored), bare.gradient(scored)
    assert usual["tokens"] == sum(sum(t.mask) for t in scored)
    assert all_tokens["tokens"] == sum(len(t.mask) for t in scored)
    assert usual["ratio"] == pytest.approx(1, abs=1e-4) and all_tokens["ratio"] == pytest.approx(1, abs=1e-4)
    assert any((a.grad - b.grad).abs().max() > 1e-6 for a, b in zip(masked.parameters(), bare.parameters()))


def test_the_deciding_token_of_a_forced_tag_is_found_however_the_tag_is_cut():
    class Cut:
        """A tokenizer that cuts after so many characters."""

        authors, places = ("policy",), {"policy": 0}

        def __init__(self, size):
            self.size, self.token_bytes = size, {}

        def token_text(self, i):
            return self.token_bytes[i].decode()

        def encode(self, text):
            pieces = [text[i : i + self.size] for i in range(0, len(text), self.size)]
            self.token_bytes = {i: piece.encode() for i, piece in enumerate(pieces)}
            return list(self.token_bytes)

    for size, decides in ((1, 2), (2, 1), (3, 0), (20, 0)):
        t = Trajectory(Question("q", "?", "x"), [], [], [], [], token_values={"entropy": []})
        _Episode(Cut(size), SimpleNamespace(roles={}), t, []).take(Observation("\n<search>", decides=2), "")
        assert t.forced == decides and t.mask == [0] * len(t.mask) != []  # the letter after "<"


def test_blame_for_a_forced_choice_has_an_end():
    logits = torch.tensor([[4.0, 0.0]], requires_grad=True)  # the policy takes the second way once in 56
    forced, push = torch.ones(1, 1), []
    for advantage in (-1.0, 1.0):
        logprobs = logits.log_softmax(-1)[:, 1:]
        weighed = _weigh_forced(torch.tensor([advantage]), logprobs.detach(), forced, False)
        push.append(torch.autograd.grad((weighed * logprobs).sum(), logits)[0][0, 1].item())
    rare = 1 / (1 + math.e**4)
    assert push == pytest.approx([-rare * (1 - rare), 1 - rare])
    free = _weigh_forced(torch.tensor([-1.0]), torch.tensor([[-4.0]]), torch.zeros(1, 1), False)
    assert free.tolist() == [[-1.0]]


def test_a_pair_teaches_what_rollouts_of_the_policy_teach_in_the_mean():
    """Of two acts with worth 0.3 and -0.2: the gradient of what the policy earns, summed over both, twice."""
    worth, logits = torch.tensor([0.3, -0.2]), torch.tensor([1.5, 0.0], requires_grad=True)
    (earned,) = torch.autograd.grad((logits.softmax(-1) * worth).sum(), logits)
    logprobs = logits.log_softmax(-1)
    weighed = _weigh_forced(worth, logprobs.detach(), torch.ones(2), True)
    (pair,) = torch.autograd.grad((weighed * logprobs).sum(), logits)
    assert torch.allclose(pair, 2 * earned)
    assert _weigh_forced(worth, logprobs.detach(), torch.zeros(2), True).equal(worth)


def test_pairs_stand_in_every_step_and_weigh_what_was_forced(tmp_path, engine, questions):
    settings = SHORT.model_copy(update=dict(pairs=1, entropy_coef=0.0))
    assert settings.first_actions(0) == settings.first_actions(1000) == [None, None, "search", "answer"]
    t = trainer(tmp_path, engine, questions, settings)
    drawn, _ = t._collect()
    t.learner.assign_advantages(drawn)
    likely = t.learner._by_token(drawn, lambda hidden, batch: t.learner._logprobs(hidden, batch)[0])

    def gradient() -> list[torch.Tensor]:
        t.learner.gradient(drawn)
        return [p.grad.clone() for p in t.policy.parameters()]

    weighed, forced = gradient(), [x for x in drawn if x.forced is not None]
    assert {x.advantages[x.forced] > 0 for x in forced} == {True, False}
    t.learner.settings = settings.model_copy(update=dict(pairs=0))
    for x in forced:  # by hand: what was blamed is multiplied by its probability there
        blamed = x.advantages[x.forced] < 0
        x.advantages[x.forced] *= 2 * (1 if blamed else math.exp(likely[id(x)][x.forced]))
    for by_setting, by_hand in zip(weighed, gradient()):
        assert torch.allclose(by_setting, by_hand, atol=1e-6)


def test_the_forced_choice_keeps_its_advantage_where_only_undecided_tokens_have_one(tmp_path, engine, questions):
    t = trainer(tmp_path, engine, questions, SHORT.model_copy(update=dict(explore=1, top_entropy_quantile=0.1)))
    _, chosen = t._collect()
    t.learner.assign_advantages(chosen)
    whole = group_advantages([x.reward for x in chosen], SHORT.num_generations).tolist()
    forced = [(x, a) for x, a in zip(chosen, whole) if x.forced is not None]
    assert forced and all(x.advantages[x.forced] == a for x, a in forced)


def test_both_ways_are_tried_in_every_group_and_the_forced_choice_is_trained(tmp_path, engine, questions):
    settings = SHORT.model_copy(update=dict(explore=1, entropy_coef=0.0))
    t = trainer(tmp_path, engine, questions, settings)
    drawn, chosen = t._collect()
    assert [x.first_action for x in drawn] == [None, None, "search", "answer"] * 2
    t.learner.assign_advantages(chosen)
    decides = {a: t.policy.encode(f"<{a}>")[0] for a in ("search", "answer")}  # "<search" is one token of the tiny Qwen
    for x in drawn:
        trained = Batch.of([x], t.policy).mask[0, len(x.prompt_ids) - 1 :].tolist()
        forced = [i for i, (a, b) in enumerate(zip(trained, x.mask)) if a != b]
        if x.first_action is None:
            assert not forced
        elif x.finish_reason != "stop":
            assert [x.completion_ids[i] for i in forced] == [decides[x.first_action]]
    far_off = {id(x): [p if m else 20.0 for m, p in zip(x.mask, x.logprobs)] for x in chosen}  # where none was sampled
    metrics = t.learner.gradient(chosen, far_off)
    assert metrics["ratio"] == pytest.approx(1, abs=1e-4) and metrics["kl"] == pytest.approx(0, abs=1e-4)
    row = describe(drawn, 4)
    assert row["searches"] == sum(len(x.searches) for x in drawn if x.first_action is None) / 4
    with pytest.raises(ValueError, match="explore=2"):
        SHORT.model_copy(update=dict(explore=2))
