"""SkyRL-gym's environment plays our episodes, turn by turn, from its own Parquet."""

import pytest
import torch
from engine_world import HOUSE, LIMITS, MODEL, world

pytest.importorskip("skyrl_gym", reason="SkyRL-gym is missing: make engines, or pip install -e '.[skyrl]'")

import skyrl_gym

from searchr1_lib import load_policy, load_questions, rollout
from searchr1_lib.engines import skyrl
from searchr1_lib.engines.formats import EXTRA
from searchr1_lib.engines.world import Setup, World, question_from, save_parquet
from searchr1_lib.rewards import SearchR1Reward, score

SETUP = {"engine": str(HOUSE), "model": MODEL, **LIMITS}


@pytest.fixture(scope="module")
def recorded():
    """Our own rollouts, scored."""
    questions, engine = world()
    how = {"num_generations": 6, "generator": torch.Generator().manual_seed(0), **LIMITS}
    made = rollout(load_policy(MODEL, quantize=False, lora=False), questions, engine, **how)
    score(SearchR1Reward(), made).keep(made)
    return made


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The questions as SkyRL reads them, by id."""
    import pyarrow.parquet

    path = tmp_path_factory.mktemp("skyrl") / "train.parquet"
    save_parquet(path, world()[0], Setup(**SETUP).open())
    return {row["id"]: row for row in pyarrow.parquet.read_table(path).to_pylist()}, path


def turns_of(t) -> list[str]:
    """What the model wrote, by turn."""
    return ["".join(s.text for s in t.segments if s.by_model and s.turn == k) for k in range(t.turns)]


def test_episodes_are_ours(recorded, rows):
    finished = [t for t in recorded if t.finish_reason in ("answer", "turns")]
    assert any(t.searches for t in finished) and any(t.invalid_turns for t in finished)
    for t in finished:
        row = rows[0][t.question.id]
        env = skyrl_gym.make(row["env_class"], env_config=SETUP, extras=row)
        prompt, _ = env.init(row["prompt"])
        assert t.prompt.count(prompt[0]["content"]) == 1  # within the chat template
        shown = []
        for number, turn in enumerate(turns := turns_of(t), 1):
            out = env.step(turn)
            assert out["done"] == (number == len(turns))
            shown += [message["content"] for message in out["observations"]]
        assert shown == [s.text for s in t.segments if not s.by_model]
        assert out["reward"] == t.reward
        extra = out["metadata"][EXTRA]
        assert [c["argument"] for c in extra["calls"]] == [c.argument for c in t.calls]
        assert (extra["answer"], extra["finish_reason"]) == (t.answer, t.finish_reason)
        assert env.get_metrics()["searches"] == len(t.searches)


def test_the_parquet_is_read_here_too(rows):
    by_id, path = rows
    assert load_questions(path)[0].answers == world()[0][0].answers
    assert [question_from(row) for row in by_id.values()] == world()[0]
    foreign = {name: value for name, value in by_id["q0"].items() if name != "extra_info"}
    assert question_from(foreign).answers == world()[0][0].answers


def test_a_setup_without_a_model_measures_characters():
    w = Setup(engine=str(HOUSE), max_observation_tokens=100).open()
    assert isinstance(w, World) and w.how["measure"] is len
    assert Setup(engine=str(HOUSE), max_observation_tokens=100).open() is w
    episode = w.begin(world()[0][0])
    assert len(episode.step("<search> Ada Melk </search>").text) <= 100


def test_importing_it_loads_no_torch():
    import subprocess
    import sys

    code = "import sys, searchr1_lib.engines.skyrl; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert skyrl.NAME == "searchr1"
