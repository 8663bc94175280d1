"""A trajectory as the records of other engines, and back; plain lists and numbers, no engine is imported.

    record = give("verl", trajectory)
    take("verl", record) == trajectory

Ids, mask, log-probabilities and reward stand in the engine's own fields. All that it has no field for (the question,
segments, tool calls, what the viewer shows) stands in its place for extras, under the name ``EXTRA``. A record without
extras, of an agent that is not ours, is ``read`` with a policy's tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from ..environment.base import Done, Request
from ..environment.limits import Limits
from ..environment.search import SearchEnvironment, tools_of
from ..records import ENVIRONMENT, Hit, Passage, Question, Segment, ToolCall, Trajectory

EXTRA = "searchr1"
_OWN = ("prompt_ids", "completion_ids", "mask", "logprobs", "reward")
_DOCUMENT = re.compile(r"^Doc \d+\(Title: (.*?)\) (.*)$", re.MULTILINE)


def give(engine: str, trajectory: Trajectory) -> dict[str, Any]:
    """The trajectory as a record of this engine, one of ``ENGINES``."""
    return _format(engine)[0](trajectory)


def take(engine: str, record: dict[str, Any], policy=None, question: Question | None = None) -> Trajectory:
    """The trajectory of a record.

    Args:
        engine: one of ``ENGINES``.
        policy, question: for a record without our extras, see ``read``.

    Raises:
        ValueError: an unknown engine, fields that differ in length, or a record of tokens alone without a policy.
    """
    own = _format(engine)[1](record)
    extra = own.pop("extra")
    if extra is not None:
        return Trajectory.from_dict({**extra, **own})
    if policy is None or question is None:
        raise ValueError(f"this record of {engine} holds tokens alone: give policy= and question= to read them with")
    return read(policy, question, **own)


def read(
    policy,
    question: Question,
    prompt_ids: Sequence[int],
    completion_ids: Sequence[int],
    mask: Sequence[int],
    logprobs: Sequence[float],
    reward: float | None = None,
) -> Trajectory:
    """A trajectory from tokens alone: an unbroken run of mask 1 is a turn, what stands between two is an observation.

    Documents are read from the observation's text (``Doc 1(Title: …) …``), so passages have no ids and no scores.

    Args:
        policy: anything with a ``Policy``'s tokenizer, such as ``served.ServedPolicy``.
    """
    from ..training.rollout import _Episode

    runs = [(bool(m), len(list(run))) for m, run in groupby(mask)]
    limits = Limits(max_turns=len(runs))  # so that none is the last one
    world = SearchEnvironment(tools_of([Nothing()]), limits)
    t = Trajectory(question, list(prompt_ids), [], [], [], finish_reason="length", reward=reward)
    t.prompt, t.token_values["entropy"] = policy.tokenizer.decode(t.prompt_ids), []
    episode, outcome, start = _Episode(policy, world, t, []), None, 0
    for by_model, length in runs:
        part = slice(start, start + length)
        ids, values = list(completion_ids[part]), list(logprobs[part])
        episode._append(ids, int(by_model), values, [0.0] * length)
        if by_model:
            episode.turn_start, text = start, episode.policy.decode(ids)
            outcome = world.act(text, "stop" if ids[-1] in policy.stop_ids else None)
            episode._close_turn(text)
            t.turns, t.invalid_turns = world.turn, world.invalid_turns
        else:
            text, kind = policy.decode(ids), "information" if isinstance(outcome, Request) else "invalid"
            t.segments.append(Segment(ENVIRONMENT, kind, text, t.turns - 1, start, start + length))
            episode._record_ends(start)
            if isinstance(outcome, Request):
                t.calls.append(ToolCall(outcome.tool.name, outcome.argument, _hits(text)))
        start += length
    if isinstance(outcome, Done):
        t.answer, t.finish_reason = outcome.answer, outcome.reason
    del t.token_values["entropy"]  # nobody recorded it
    return t


class Nothing:
    """An engine that finds nothing, where what was found stands in a record."""

    def search(self, query: str) -> list:
        return []


def _hits(observation: str) -> list[Hit]:
    """The documents of an observation, best first; a score is the rank's, as for an engine without scores."""
    text = observation.split("<information>")[-1].split("</information>")[0]
    found = enumerate(_DOCUMENT.findall(text))
    return [Hit(Passage("", title.strip('"'), body), float(-rank)) for rank, (title, body) in found]


def rest(t: Trajectory) -> dict[str, Any]:
    """All but what stands in an engine's own fields."""
    return {name: value for name, value in t.to_dict().items() if name not in _OWN}


def _runs(t: Trajectory) -> list[tuple[int, int, int]]:
    """Unbroken runs of the mask: (its value, start, end)."""
    starts = [i for i in range(len(t.mask)) if i == 0 or t.mask[i] != t.mask[i - 1]]
    return [(t.mask[a], a, b) for a, b in zip(starts, [*starts[1:], len(t.mask)])]


# ---- TRL: a row of what ``rollout_func`` returns ---------------------------------------------------------


def _to_trl(t: Trajectory) -> dict[str, Any]:
    ids = {"prompt_ids": t.prompt_ids, "completion_ids": t.completion_ids}
    return {**ids, "logprobs": t.logprobs, "env_mask": t.mask, "reward": t.reward, EXTRA: rest(t)}


def _of_trl(row: dict[str, Any]) -> dict[str, Any]:
    own = {name: row[name] for name in ("prompt_ids", "completion_ids", "logprobs")}
    return {**own, "mask": row["env_mask"], "reward": row.get("reward"), "extra": row.get(EXTRA)}


# ---- verl: the fields of an ``AgentLoopOutput`` ----------------------------------------------------------


def _to_verl(t: Trajectory) -> dict[str, Any]:
    tokens = {"prompt_ids": t.prompt_ids, "response_ids": t.completion_ids, "response_mask": t.mask}
    told = {"reward_score": t.reward, "num_turns": 1 + len(_runs(t)), "metrics": {}, "extra_fields": {EXTRA: rest(t)}}
    return {**tokens, "response_logprobs": t.logprobs, **told}


def _of_verl(output: dict[str, Any]) -> dict[str, Any]:
    names = {"prompt_ids": "prompt_ids", "completion_ids": "response_ids", "mask": "response_mask"}
    own = {ours: output[theirs] for ours, theirs in names.items()}
    told = {"logprobs": output["response_logprobs"], "reward": output["reward_score"]}
    return {**own, **told, "extra": output["extra_fields"].get(EXTRA)}


# ---- SkyRL: one row of a ``GeneratorOutput``, whose columns are lists of these ---------------------------


def _to_skyrl(t: Trajectory) -> dict[str, Any]:
    tokens = {"prompt_token_ids": t.prompt_ids, "response_ids": t.completion_ids, "loss_masks": t.mask}
    why = "length" if t.finish_reason == "length" else "stop"
    return {**tokens, "rollout_logprobs": t.logprobs, "rewards": t.reward, "stop_reasons": why, EXTRA: rest(t)}


def _of_skyrl(row: dict[str, Any]) -> dict[str, Any]:
    names = {"prompt_ids": "prompt_token_ids", "completion_ids": "response_ids", "mask": "loss_masks"}
    own = {ours: row[theirs] for ours, theirs in names.items()}
    reward = row["rewards"]
    reward = sum(reward) if isinstance(reward, list) else reward  # SkyRL may spread it over the tokens
    return {**own, "logprobs": row["rollout_logprobs"], "reward": reward, "extra": row.get(EXTRA)}


# ---- OpenEnv: a ``TrainingTrace``, one entry a call of the model, and the reward of the episode ----------


def _to_openenv(t: Trajectory) -> dict[str, Any]:
    turns, row = [], t.prompt_ids + t.completion_ids
    for number, (_, start, end) in enumerate(run for run in _runs(t) if run[0]):
        before = len(t.prompt_ids) + start
        tokens = {"prompt_token_ids": row[:before], "completion_token_ids": t.completion_ids[start:end]}
        learnt = {"per_token_logps": t.logprobs[start:end], "loss_mask": [0] * before + [1] * (end - start)}
        turns.append({"node_id": f"turn-{number}", **tokens, **learnt, "metadata": {}})
    turns[0]["metadata"] = {"n_prompt": len(t.prompt_ids), EXTRA: rest(t)}
    return {"trace": {"schema_version": 1, "turns": turns}, "reward": t.reward}


def _of_openenv(record: dict[str, Any]) -> dict[str, Any]:
    turns = record["trace"]["turns"]
    row: list[int] = []
    mask: list[int] = []
    logprobs: list[float] = []
    for turn in turns:
        before, written = turn["prompt_token_ids"], turn["completion_token_ids"]
        if before[: len(row)] != row:
            raise ValueError(f"{turn['node_id']} does not go on where the call before it ended: no single sequence")
        between = len(before) - len(row)
        row = before + written
        mask += [0] * between + turn["loss_mask"][len(before) :]
        logprobs += [0.0] * between + turn["per_token_logps"]
    first = len(turns[0]["prompt_token_ids"])
    own = {"prompt_ids": row[:first], "completion_ids": row[first:], "mask": mask[first:], "logprobs": logprobs[first:]}
    return {**own, "reward": record["reward"], "extra": turns[0]["metadata"].get(EXTRA)}


# ---- verifiers: a ``Trace``, whose nodes hold each message's own tokens ----------------------------------


def _to_verifiers(t: Trajectory) -> dict[str, Any]:
    nodes = [_node(None, "user", t.prompt, t.prompt_ids, 0, [])]
    for number, (by_model, start, end) in enumerate(_runs(t)):
        role, ids = "assistant" if by_model else "user", t.completion_ids[start:end]
        logprobs = t.logprobs[start:end] if by_model else []
        nodes.append(_node(number, role, "".join(t.tokens[start:end]), ids, by_model, logprobs))
    task = {"type": "SearchTask", "data": {"id": t.question.id, "prompt": t.question.text}}
    told = {"task": task, "agent": {"config": {"harness": {"id": "null"}}}, "is_completed": True, "ok": True}
    rewards = {} if t.reward is None else {"reward": {"score": t.reward}}
    return {**told, "nodes": nodes, "rewards": rewards, "info": {EXTRA: rest(t)}}


def _node(parent: int | None, role: str, text: str, ids: list[int], by_model: int, logprobs: list[float]) -> dict:
    tokens = {"token_ids": ids, "mask": [bool(by_model)] * len(ids), "logprobs": logprobs}
    return {"parent": parent, "message": {"role": role, "content": text}, "sampled": bool(by_model), **tokens}


def _of_verifiers(trace: dict[str, Any]) -> dict[str, Any]:
    ids = [i for node in trace["nodes"] for i in node["token_ids"]]
    mask = [int(m) for node in trace["nodes"] for m in node["mask"]]
    sampled = iter([x for node in trace["nodes"] for x in node["logprobs"]])
    logprobs = [next(sampled) if m else 0.0 for m in mask]
    first = mask.index(1)  # a completion begins with what the model wrote
    own = {"prompt_ids": ids[:first], "completion_ids": ids[first:], "mask": mask[first:], "logprobs": logprobs[first:]}
    scores = [r for r in trace["rewards"].values() if r is not None]
    reward = sum(r["score"] * r.get("weight", 1.0) for r in scores) if scores else None
    return {**own, "reward": reward, "extra": trace["info"].get(EXTRA)}


# ---- slime: the fields of a ``Sample`` -------------------------------------------------------------------


def _to_slime(t: Trajectory) -> dict[str, Any]:
    tokens = {"tokens": t.prompt_ids + t.completion_ids, "response_length": len(t.completion_ids), "loss_mask": t.mask}
    text = {"prompt": t.prompt, "response": t.text, "label": t.question.answers}
    status = "truncated" if t.finish_reason == "length" else "completed"
    learnt = {"rollout_log_probs": t.logprobs, "reward": t.reward, "status": status}
    return {**text, **tokens, **learnt, "metadata": {EXTRA: rest(t)}}


def _of_slime(sample: dict[str, Any]) -> dict[str, Any]:
    first = len(sample["tokens"]) - sample["response_length"]
    own = {"prompt_ids": sample["tokens"][:first], "completion_ids": sample["tokens"][first:]}
    learnt = {"mask": sample["loss_mask"], "logprobs": sample["rollout_log_probs"], "reward": sample["reward"]}
    return {**own, **learnt, "extra": sample["metadata"].get(EXTRA)}


#: Engine -> (its record of a trajectory, what stands in a record).
ENGINES: dict[str, tuple[Callable[[Trajectory], dict[str, Any]], Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "trl": (_to_trl, _of_trl),
    "verl": (_to_verl, _of_verl),
    "skyrl": (_to_skyrl, _of_skyrl),
    "openenv": (_to_openenv, _of_openenv),
    "verifiers": (_to_verifiers, _of_verifiers),
    "slime": (_to_slime, _of_slime),
}


def _format(engine: str):
    if engine not in ENGINES:
        raise ValueError(f"engine must be {', '.join(ENGINES)}, got {engine!r}")
    return ENGINES[engine]
