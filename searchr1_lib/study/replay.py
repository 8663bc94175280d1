"""Recorded trajectories used again: their actions on another engine or policy.

``replay`` asks the recorded queries of another engine, and reads the recorded tokens with another policy
(teacher forcing: each token is judged after the recorded ones, nothing is sampled). It says where they
part. Past that place the record does not tell what would have happened; for that, roll out anew.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from ..environment.base import call_all
from ..environment.limits import Amount, Count, Seconds, check, valid
from ..environment.search import Search
from ..records import Hit, ToolCall, Trajectory
from ..training.buffer import ReplayBuffer as ReplayBuffer  # appendix A3 knows it by this name


@dataclass
class Replayed:
    """One trajectory beside its replay.

    Attributes:
        trajectory: what was recorded.
        searches: the other engine's answers, one for each recorded search; empty without an engine.
        logprobs: of each completion token under the other policy, (T,), 0.0 where the mask is 0; empty
            without a policy.
        choices: the other policy's most likely token at each place, (T,), None where the mask is 0;
            empty without a policy.
        instead: the text of its choice at ``token_parts``, "" if there is no such place.
    """

    trajectory: Trajectory
    searches: list[ToolCall] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    choices: list[int | None] = field(default_factory=list)
    instead: str = ""

    @property
    def search_parts(self) -> int | None:
        """Number, from 0, of the first search whose observation differs; None where none does."""
        pairs = zip(self.trajectory.searches, self.searches)
        return next((i for i, (old, new) in enumerate(pairs) if _read(old) != _read(new)), None)

    @property
    def token_parts(self) -> int | None:
        """The first completion token that the other policy, choosing greedily, would not have written."""
        pairs = zip(self.trajectory.completion_ids, self.choices)
        return next((i for i, (old, new) in enumerate(pairs) if new is not None and new != old), None)

    @property
    def kl(self) -> list[float]:
        """Per token, (T,), in nats: the estimate "k3" of KL(recorded policy || other policy), ``e^d - d - 1`` with
        ``d`` the other's log-probability minus the recorded one (Schulman 2020). 0.0 where the mask is 0; empty
        without a policy. As ``trajectory.token_values["kl"]`` the viewer colours tokens by it.
        """
        return [math.expm1(new - old) - (new - old) for old, new in zip(self.trajectory.logprobs, self.logprobs)]


@dataclass
class ReplayReport:
    """The outcome of a replay: ``rows``, one a trajectory. ``str`` of it is the report to read."""

    rows: list[Replayed]

    def table(self) -> dict[str, float | None]:
        """Means over the replay; None where nothing was there to average.

        searches, same_observation (share of searches after which the model would read the same),
        shared_documents (share of the recorded documents that the other engine returned too), failed
        (searches of the other engine that failed); tokens, logprob_recorded and logprob (mean a token,
        nats), kl (their difference: the estimate "k1" of KL(recorded policy || other policy)),
        same_choice (share of tokens that the other policy's greedy choice repeats); parted_at_search
        and parted_at_token (trajectories that part from their record there).
        """
        calls = [pair for r in self.rows for pair in zip(r.trajectory.searches, r.searches)]
        documents = [(map(_document, old.result), set(map(_document, new.result))) for old, new in calls]
        scored = [
            (r.trajectory.completion_ids[i], r.trajectory.logprobs[i], r.logprobs[i], choice)
            for r in self.rows
            for i, choice in enumerate(r.choices)
            if choice is not None
        ]
        recorded, now = _mean(old for _, old, _, _ in scored), _mean(new for _, _, new, _ in scored)
        return {
            "searches": len(calls),
            "same_observation": _mean(_read(old) == _read(new) for old, new in calls),
            "shared_documents": _mean(d in found for wanted, found in documents for d in wanted),
            "failed": sum(new.error is not None for _, new in calls),
            "parted_at_search": sum(r.search_parts is not None for r in self.rows),
            "tokens": len(scored),
            "logprob_recorded": recorded,
            "logprob": now,
            "kl": None if recorded is None or now is None else recorded - now,
            "same_choice": _mean(token == choice for token, _, _, choice in scored),
            "parted_at_token": sum(r.token_parts is not None for r in self.rows),
        }

    def __str__(self) -> str:
        t, n = self.table(), len(self.rows)
        lines = [f"{n} trajectories replayed"]
        if t["searches"]:
            lines += [
                f"engine: {t['searches']} searches, the same observation after {t['same_observation']:.0%}, "
                f"{t['failed']} failed; {t['parted_at_search']} trajectories part"
            ]
            lines += _first_five(_search_line(r, r.search_parts) for r in self.rows if r.search_parts is not None)
        if t["tokens"]:
            lines += [
                f"policy: {t['tokens']} tokens, mean log-probability {t['logprob']:.3f} (recorded "
                f"{t['logprob_recorded']:.3f}), the same greedy choice at {t['same_choice']:.0%}; "
                f"{t['parted_at_token']} trajectories part"
            ]
            lines += _first_five(_token_line(r, r.token_parts) for r in self.rows if r.token_parts is not None)
        return "\n".join(lines)


def replay(
    trajectories: Iterable[Trajectory],
    *,
    engine=None,
    policy=None,
    topk: int | None = None,
    temperature: float = 1.0,
    search_timeout: float | None = 60.0,
    batch_size: int = 32,
) -> ReplayReport:
    """Run the recorded actions again: the queries on ``engine``, the tokens under ``policy``, or both.

    Args:
        engine: anything that ``rollout`` takes. Observations are compared by what the model reads of them:
            titles and texts in their order, not ids or scores.
        policy: a ``Policy`` with the recording one's tokenizer.
        topk: documents asked of the engine (None: as many as the record holds for any search).
        temperature: the one that the record was sampled with; 0 is read as 1, as ``rollout`` records it.
        search_timeout: seconds to wait for one batch, and once more in all where it is asked one by one; None for ever.
        batch_size: trajectories that go at a time: their searches in one batch, their tokens in one forward.

    Raises:
        ValueError: neither engine nor policy; a parameter that cannot be; the record was made with another
            tokenizer.
    """
    if engine is None and policy is None:
        raise ValueError("replay: give it an engine, a policy, or both")
    check(batch_size=(batch_size, Count), temperature=(temperature, Amount), topk=(topk, Count | None))
    valid(Seconds | None, search_timeout, "search_timeout")
    rows = [Replayed(t) for t in trajectories]
    topk = topk or max([1, *(len(call.result) for r in rows for call in r.trajectory.searches)])
    for i in range(0, len(rows), batch_size):
        part = rows[i : i + batch_size]
        if engine is not None:
            _search_again(part, engine, topk, search_timeout)
        if policy is not None:
            _read_again(part, policy, temperature or 1.0)
    return ReplayReport(rows)


def _search_again(rows: Sequence[Replayed], engine, topk: int, timeout: float | None) -> None:
    queries = [call.argument for r in rows for call in r.trajectory.searches]
    if not queries:
        return
    calls = iter(call_all(Search(engine), queries, topk, timeout))
    for r in rows:
        r.searches = [next(calls) for _ in r.trajectory.searches]


def _read_again(rows: Sequence[Replayed], policy, temperature: float) -> None:
    """Fill in ``logprobs`` and ``choices``, from one forward pass over the whole sequences."""
    import torch

    from ..training.learner import Batch
    from ..training.logits import head_logits

    for r in rows:
        _same_tokenizer(r.trajectory, policy)
    batch = Batch.of([r.trajectory for r in rows], policy)
    head = policy.lm_head
    with torch.no_grad():
        hidden = policy.hidden(batch.ids, batch.readers, use_cache=False)
        written = batch.sampled.bool()
        judged = [
            _judged(head_logits(h, head.weight, head.bias), ids, temperature)  # of all they would not fit
            for h, ids in zip(hidden[:, :-1][written].split(1024), batch.ids[:, 1:][written].split(1024))
        ]
    logprobs = iter(x for part, _ in judged for x in part)
    choices = iter(x for _, part in judged for x in part)
    for r in rows:
        r.logprobs = [next(logprobs) if m else 0.0 for m in r.trajectory.mask]
        r.choices = [next(choices) if m else None for m in r.trajectory.mask]
        if r.token_parts is not None:
            r.instead = policy.tokenizer.decode([r.choices[r.token_parts]])


def _judged(logits, ids, temperature: float) -> tuple[list[float], list[int]]:
    """Log-probability of ``ids`` (N,) under ``logits`` (N, V), and the most likely tokens."""
    scaled = logits / temperature
    logprobs = scaled.gather(1, ids.unsqueeze(1)).squeeze(1) - scaled.logsumexp(-1)
    return logprobs.tolist(), logits.argmax(-1).tolist()


def _same_tokenizer(t: Trajectory, policy) -> None:
    ids = t.prompt_ids + t.completion_ids
    if not t.prompt_ids or max(ids) >= len(policy.token_bytes) or policy.encode(t.prompt) != t.prompt_ids:
        raise ValueError(
            f"replay: the trajectory of question {t.question.id!r} was recorded with another tokenizer "
            "than this policy's, so its tokens mean nothing to it"
        )


def _document(hit: Hit) -> tuple[str, str]:
    return hit.passage.title, hit.passage.text


def _read(call: ToolCall) -> tuple:
    """What the model reads of a search, apart from the wording of an error."""
    return call.error is None, [_document(h) for h in call.result]


def _search_line(r: Replayed, number: int) -> str:
    old, new = r.trajectory.searches[number], r.searches[number]
    pairs = enumerate(zip(old.result, new.result))
    rank = next((i for i, (a, b) in pairs if _document(a) != _document(b)), min(len(old.result), len(new.result)))
    return (
        f"{_id(r)}, search {number + 1}, rank {rank + 1}: {_cut(old.argument)} "
        f"gave {_name(old, rank)}, now {_name(new, rank)}"
    )


def _name(call: ToolCall, rank: int) -> str:
    if call.error is not None:
        return f"an error ({_cut(call.error, 200)})"
    return _cut(next(filter(None, _document(call.result[rank])), "")) if rank < len(call.result) else "nothing"


def _token_line(r: Replayed, place: int) -> str:
    t, before = r.trajectory, "".join(r.trajectory.tokens[:place])[-30:]
    return (
        f"{_id(r)}, token {place + 1} of {len(t.completion_ids)}: after {_cut(before)} stood "
        f"{_cut(t.tokens[place])} (log-probability now {r.logprobs[place]:.2f}), likelier is {_cut(r.instead)}"
    )


def _first_five(lines: Iterable[str]) -> list[str]:
    """Five different lines, with the times each occurs, and how many there are beside them."""
    counts = Counter(lines)
    shown = list(counts.items())[:5]
    rest = counts.total() - sum(n for _, n in shown)
    return [f"  {line}" + f" ({n} times)" * (n > 1) for line, n in shown] + [f"  … and {rest} more"] * (rest > 0)


def _cut(text: str, size: int = 60) -> str:
    return repr(text if len(text) <= size else text[: size - 1] + "…")


def _id(r: Replayed) -> str:
    return _cut(r.trajectory.question.id)[1:-1]


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return fmean(values) if values else None
