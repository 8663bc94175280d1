"""Rollouts: our sampler against three others, on the same weights, questions and tokens, in one process.

    (a) one      one question at a time, transformers' ``generate`` with stop strings: the simple loop
    (b) batch    the same for all at once; every turn encodes the whole history again
    (c) trl      TRL's ``GRPOTrainer._generate``: its own tool loop

Every sampler samples at temperature 1, but is made to write a given text: by bending the logits, or in ours the
draw. So all do the same work, and what each recorded is checked against that text. Ours also records
log-probabilities and entropies, which the others do not; TRL, which knows no other end of a turn, draws an
end-of-message token in place of the last one, which is then put back.

    python tests/benchmarks/bench_rollout.py [--quick]
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import statistics
import tempfile
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch

from searchr1_lib import rollout
from searchr1_lib.environment import protocol
from searchr1_lib.environment.search import fit_observation
from searchr1_lib.records import Hit, Passage, Question
from searchr1_lib.search import BM25Search
from searchr1_lib.study.warmstart import episode, play
from searchr1_lib.training import decoder
from searchr1_lib.training.policy import Policy, load_policy
from searchr1_lib.worlds.almanac import build_world
from searchr1_lib.worlds.optimum import TRUST, WORDINGS

TINY_QWEN = Path(__file__).resolve().parents[2] / "data" / "tiny_qwen"
LENGTHS = {"max_turn_tokens": 400, "max_observation_tokens": 500, "max_completion_length": 8000}


@dataclass
class Play:
    """What a rollout has to write: the token ids of each turn, each ending in a search or the answer."""

    question: Question
    turns: list[list[int]]


class Script:
    """Says what row i of a batch writes next: the next token of rollout ``rows[i]``."""

    def __init__(self, plays: list[Play], end: int):
        self.plays, self.end = plays, end  # end: the token of a row whose turn is over

    def begin(self, rows: list[int], turn: int, *, eos: int | None = None) -> None:
        """A turn begins. ``eos`` takes the place of each turn's last token."""
        turns = [self.plays[i].turns[turn] for i in rows]
        turns = turns if eos is None else [t[:-1] + [eos] for t in turns]
        width = max(map(len, turns))
        self.ids, self.at = torch.tensor([t + [self.end] * (width - len(t)) for t in turns]), 0

    def next(self, rows: list[int] | slice = slice(None)) -> torch.Tensor:
        """The next token (A,) of each row; ``rows`` are those that are still computed."""
        self.at += 1
        return self.ids[rows, self.at - 1]

    @contextmanager
    def bending(self, policy: Policy):
        """Within it the model's last logits are bent in place, so that nothing else can be drawn."""

        def bend(module, args, output):
            output.logits[:, -1].scatter_(1, self.next().to(policy.device).unsqueeze(1), 60.0)

        handle = causal_lm(policy).register_forward_hook(bend)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def drawing(self):
        """Within it our sampler draws what is written here; log-probabilities and entropies are the model's own."""
        script, draw = self, decoder.draw

        class Scripted(decoder.Decoder):
            def write(self, rows, stops, room, *authors):
                if self.cache is None:
                    self.number, self.turn = {id(row): i for i, row in enumerate(rows)}, -1
                self.turn += 1
                script.begin([self.number[id(row)] for row in rows], self.turn)
                return super().write(rows, stops, room, *authors)

            def _sample(self, logits):
                def forced(probs, generator=None):
                    draw(probs, generator)
                    return script.next(self.rows).to(probs.device)

                with patch.object(decoder, "draw", forced):
                    return super()._sample(logits)

        with patch("searchr1_lib.training.rollout.Decoder", Scripted):
            yield


class Shelf:
    """An engine that costs nothing: the same passages, of a length to choose, for every query."""

    def __init__(self, words: int):
        rng = random.Random(0)
        text = " ".join(rng.choices("river town born wrote novel mason letters market the of and in".split(), k=words))
        self.hits = [Hit(Passage("p", "Town", text), 1.0)]

    def search_batch(self, queries, k=3):
        return [self.hits for _ in queries]


# ---- the contestants: each returns the completion ids of all rollouts ------------------------------------


def ours(policy: Policy, script: Script, engine, questions: list[Question], group: int, turns: int) -> list[list[int]]:
    with script.drawing():
        made = rollout(policy, questions, engine, num_generations=group, max_turns=turns - 1, **LENGTHS)
    return [t.completion_ids for t in made]


def generate(policy: Policy, script: Script, engine, *, batch: int) -> list[list[int]]:
    """``batch`` rollouts at a time with transformers' ``generate``; each turn encodes the whole history."""
    parts = torch.arange(len(script.plays)).split(batch)
    with script.bending(policy):
        return [ids for part in parts for ids in _generate(policy, script, engine, part.tolist())]


def _generate(policy, script, engine, rows: list[int]) -> list[list[int]]:
    prompts = {i: policy.encode(policy.prompt_text(script.plays[i].question.text)) for i in rows}
    history, turn, active = {i: list(ids) for i, ids in prompts.items()}, 0, rows
    while active:
        script.begin(active, turn)
        width = max(len(history[i]) for i in active)
        ids = [[policy.pad_id] * (width - len(history[i])) + history[i] for i in active]
        mask = [[0] * (width - len(history[i])) + [1] * len(history[i]) for i in active]
        ids, mask = (torch.tensor(x, device=policy.device) for x in (ids, mask))
        with torch.no_grad():
            out = policy.model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=LENGTHS["max_turn_tokens"],
                stop_strings=list(protocol.STOPS),
                tokenizer=policy.tokenizer,
                pad_token_id=policy.pad_id,
            )
        queries = {}
        for i, row in zip(active, out[:, width:].tolist()):
            row = row[: row.index(policy.pad_id)] if policy.pad_id in row else row
            history[i] += row
            action = protocol.read_action(policy.decode(row))
            if action.kind == "search":
                queries[i] = action.text
        for i, hits in zip(queries, engine.search_batch(list(queries.values()), k=3) if queries else []):
            history[i] += policy.encode(observe(policy, hits))
        active, turn = list(queries), turn + 1
    return [history[i][len(prompts[i]) :] for i in rows]


class TRL:
    """TRL's trainer around our model, with search as its tool; what it generates is always the same script.

    It turns the LoRA matrices of a 4-bit model to bf16: give it a policy of its own.
    """

    TEMPLATE = (  # our prompt; a tool's message is written as it is, so that an observation is the same tokens
        "{%- if messages[0]['role'] != 'system' -%}{{- SYSTEM -}}{%- endif -%}{%- for m in messages -%}"
        "{%- if m['role'] == 'tool' -%}{#- m['name'] -#}{{- m['content'] -}}{%- else -%}"
        "{{- '<|im_start|>' + m['role'] + '\\n' + m['content'] -}}"
        "{%- for c in m.get('tool_calls') or [] -%}{{- c['function']['name'] + c['function']['arguments']|tojson -}}"
        "{%- endfor -%}{{- '<|im_end|>' -}}{%- if m['role'] != 'assistant' -%}{{- '\\n' -}}{%- endif -%}{%- endif -%}"
        "{%- endfor -%}{%- if add_generation_prompt and messages[-1]['role'] != 'tool' -%}"
        "{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
    )

    def __init__(self, policy: Policy, script: Script, engine, group: int, folder: str, reward=None, **settings):
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        self.policy, self.script, self.engine, self.group = policy, script, engine, group
        tokenizer = copy.deepcopy(policy.tokenizer)
        empty = policy.prompt_text("x").split("<|im_start|>user")[0]
        tokenizer.chat_template = self.TEMPLATE.replace("SYSTEM", repr(empty))
        tokenizer.response_template = {"role": "assistant"}  # a mark that responses can be parsed: by ours, below
        tokenizer.__class__ = type("Parsing", (type(tokenizer),), {"parse_response": self.parse})

        def search(query: str) -> str:
            """Search.

            Args:
                query: what to look for.
            """
            return observe(policy, self.engine.search_batch([query], k=3)[0])

        questions = [p.question for p in script.plays[::group]]
        rows = {
            "prompt": [[{"role": "user", "content": protocol.build_prompt(q.text, policy.prompt)}] for q in questions],
            "golds": [q.answers for q in questions],
        }
        settings = {"per_device_train_batch_size": len(script.plays), "gradient_checkpointing": False} | settings
        self.trainer = GRPOTrainer(
            model=policy.model,
            processing_class=tokenizer,
            tools=[search],
            train_dataset=Dataset.from_dict(rows),
            reward_funcs=reward or (lambda completions, **_: [0.0] * len(completions)),
            args=GRPOConfig(
                output_dir=folder,
                use_cpu=policy.device.type == "cpu",
                bf16=policy.device.type != "cpu",
                report_to="none",
                beta=0.0,
                num_generations=group,
                shuffle_dataset=False,
                max_completion_length=LENGTHS["max_completion_length"],
                **settings,
            ),
        )
        self.trainer._sync_tool_dicts = [{"search": search}] * len(script.plays)
        self.trainer._async_tool_dicts = [{}] * len(script.plays)
        self.prompts = [prompt for prompt in rows["prompt"] for _ in range(group)]
        self.generate, self.single_turn = self.trainer._generate, self.trainer._generate_single_turn
        self.trainer._generate, self.trainer._generate_single_turn = self.scripted, self.scripted_turn

    def parse(self, ids, prefix=None, tools=None):
        """Stands in for a response template: the query of the turn that ``ids`` ends, as a call of the tool."""
        text = self.policy.decode(ids)
        action = protocol.read_action(text)
        call = {"type": "function", "function": {"name": "search", "arguments": {"query": action.text}}}
        return {"role": "assistant", "content": text} | ({"tool_calls": [call]} if action.kind == "search" else {})

    def scripted(self, prompts):
        self.turn = -1
        with self.script.bending(self.policy):
            self.made = self.generate(prompts)
        return self.made

    def scripted_turn(self, prompt_ids, *args, **kwargs):
        turn = self.turn = self.turn + 1
        rows = [i for i, p in enumerate(self.script.plays) if len(p.turns) > turn]
        self.script.begin(rows, turn, eos=self.policy.tokenizer.eos_token_id)
        written, logprobs = self.single_turn(prompt_ids, *args, **kwargs)
        return [ids[:-1] + self.script.plays[i].turns[turn][-1:] for i, ids in zip(rows, written)], logprobs

    def run(self) -> list[list[int]]:
        """Generate once for all prompts."""
        return self.scripted(self.prompts)[1]


def observe(policy: Policy, hits: list[Hit]) -> str:
    return fit_observation(policy.measure, hits, LENGTHS["max_observation_tokens"])


def causal_lm(policy: Policy):
    return policy.model.get_base_model() if hasattr(policy.model, "get_base_model") else policy.model


# ---- what is played --------------------------------------------------------------------------------------


def almanac(policy: Policy, groups: int, group: int, seed: int = 0) -> tuple[list[Question], Script, BM25Search]:
    """Questions of which nothing is recalled, half of one hop and half of two, searched for as in a warm start."""
    rng, world = random.Random(seed), build_world()
    engine = BM25Search(world.passages)
    pool = [[q for q in world.questions["train"] if q.source == f"almanac/{n}-hop/{'0' * n}"] for n in (1, 2)]
    questions = [rng.choice(pool[i % 2]) for i in range(groups)]
    once = lambda asked, chain, number, searches, tried: (
        TRUST if tried or number == len(asked.relations) else WORDINGS[0]
    )
    done = play(((i, episode(world.asked[q.id], once), 3) for i, q in enumerate(questions)), engine)
    plays = []
    for i, pieces in sorted(done):
        q, texts = questions[i], [p.text for p in pieces if p.writer == "model"]
        for _ in range(group):  # of different lengths, as sampling gives them
            words = " Let me see." * rng.randrange(5)
            plays.append(Play(q, [policy.encode(t.replace(" </think>", words + " </think>", 1)) for t in texts]))
    return questions, Script(plays, policy.pad_id), engine


def long(
    policy: Policy, groups: int, group: int, turns: int, observation: int, thought: tuple[int, int] = (0, 5)
) -> tuple[list[Question], Script, Shelf]:
    """Rollouts of so many turns with observations of so many tokens; a thought takes from ``thought`` sentences."""
    rng = random.Random(0)
    questions = [Question(f"q{i}", f"Who wrote letter number {i}?", ["me"]) for i in range(groups)]
    words = min(range(1, 500), key=lambda n: abs(len(policy.encode(observe(policy, Shelf(n).hits))) - observation))
    engine = Shelf(words)

    def turn(number: int) -> list[int]:
        act = "<answer> me </answer>" if number == turns - 1 else f"<search> letter {rng.randrange(99)} </search>"
        return policy.encode(f"<think> I recall nothing.{' Let me see.' * rng.randrange(*thought)} </think>\n{act}")

    plays = [Play(q, [turn(t) for t in range(turns)]) for q in questions for _ in range(group)]
    return questions, Script(plays, policy.pad_id), engine


def expected(policy: Policy, script: Script, engine) -> list[list[int]]:
    """What every contestant must have recorded, turn by turn."""
    made = []
    for one in script.plays:
        ids: list[int] = []
        for turn in one.turns:
            ids += turn
            if turn is not one.turns[-1]:
                query = protocol.read_action(policy.decode(turn)).text
                ids += policy.encode(observe(policy, engine.search_batch([query], k=3)[0]))
        made.append(ids)
    return made


# ---- the measuring ---------------------------------------------------------------------------------------


def measured(policy: Policy, play) -> tuple[list[list[int]], float, float]:
    """What ``play()`` returns, its seconds, and its CPU seconds (which a busy machine disturbs less)."""
    start, cpu = time.perf_counter(), time.process_time()
    made = play()
    if policy.device.type == "cuda":
        torch.cuda.synchronize()
    return made, time.perf_counter() - start, time.process_time() - cpu


def contest(policy: Policy, name: str, questions, script, engine, group: int, runs: dict[str, int]) -> dict:
    """Seconds of each contestant (the median of its runs, taken in turn) and how many times longer than ours."""
    turns = max(len(p.turns) for p in script.plays)
    with tempfile.TemporaryDirectory() as folder:
        trl = TRL(copy.deepcopy(policy), script, engine, group, folder) if runs.get("trl") else None
        ways = {
            "ours": lambda: ours(policy, script, engine, questions, group, turns),
            "one": lambda: generate(policy, script, engine, batch=1),
            "batch": lambda: generate(policy, script, engine, batch=len(script.plays)),
            "trl": lambda: trl.run(),
        }
        taken: dict[str, list[tuple[float, float]]] = {way: [] for way in ways if runs.get(way)}
        for number in range(max(runs.values())):
            for way in taken:
                if number < runs[way]:
                    made, *seconds = measured(policy, ways[way])
                    taken[way].append(tuple(seconds))
                    assert made == expected(policy, script, engine), f"{way} recorded other tokens"
    wall, cpu = ({way: statistics.median(times[k] for times in t) for way, t in taken.items()} for k in (0, 1))
    sampled = sum(len(t) for p in script.plays for t in p.turns)
    read = sum(map(len, expected(policy, script, engine))) - sampled
    figures = {
        "rollouts": len(script.plays),
        "turns": statistics.fmean(len(p.turns) for p in script.plays),
        "sampled_tokens": sampled,
        "observation_tokens": read,
    }
    lines = [
        f"{name}: {len(script.plays)} rollouts of {figures['turns']:.1f} turns, {sampled} tokens sampled, {read} read"
    ]
    for way in taken:
        figures |= {
            f"{way}_s": wall[way],
            f"{way}_cpu_s": cpu[way],
            f"{way}_over_ours": wall[way] / wall["ours"],
            f"{way}_over_ours_cpu": cpu[way] / cpu["ours"],
        }
        lines.append(
            f"  {way:5} {wall[way]:7.2f} s = {figures[f'{way}_over_ours']:5.1f}x   "
            f"CPU {cpu[way]:7.2f} s = {figures[f'{way}_over_ours_cpu']:5.1f}x"
        )
    print("\n".join(lines), flush=True)
    return figures


def growth(policy: Policy, runs: int) -> list[dict]:
    """How our cost and (b)'s grow with turns, observation length and group size."""
    rows = []
    settings = (
        [("turns", n, (8, 4, n, 100)) for n in (1, 2, 4, 8)]
        + [("observation", n, (8, 4, 3, n)) for n in (50, 100, 200, 400)]
        + [("group", n, (8, n, 3, 100)) for n in (1, 2, 4, 8, 16)]
    )
    for what, value, (groups, group, turns, observation) in settings:
        questions, script, engine = long(policy, groups, group, turns, observation)
        got = contest(policy, f"{what} {value}", questions, script, engine, group, {"ours": runs, "batch": 1})
        tokens = got["sampled_tokens"] + got["observation_tokens"]
        per_token = 1e6 * got["ours_cpu_s"] / tokens
        rows.append({"what": what, "value": value, "tokens": tokens, "cpu_us_per_token": per_token} | got)
        print(f"  ours, a token: {per_token:.0f} us of CPU", flush=True)
    return rows


def main(argv: list[str] | None = None) -> dict:
    """Run all contests on the tiny Qwen, print the lines, return the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(TINY_QWEN))
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, no growth")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    figures: dict = {"threads": torch.get_num_threads()}
    runs = {"ours": 1, "one": 1, "batch": 1, "trl": 1} if args.quick else {"ours": 5, "one": 1, "batch": 3, "trl": 3}
    for name, policy in (
        ("fp32", load_policy(args.model, quantize=False, lora=False)),
        ("NF4 + LoRA", load_policy(args.model)),
    ):
        questions, script, engine = almanac(policy, 1, 2)
        ours(policy, script, engine, questions, 2, 2)  # warm up
        few = {way: min(n, 2) for way, n in runs.items() if way != "one"}
        for title, played, count in (
            (f"almanac, {name}", almanac(policy, 8, 8), runs),
            (f"4 turns, observations of 500, {name}", long(policy, 8, 8, 4, 500), few),
        ):
            figures[title] = contest(policy, title, *played, 8, count)
        if name == "fp32" and not args.quick:
            figures["growth"] = growth(policy, 3)
    return figures


if __name__ == "__main__":
    print(json.dumps(main(), indent=1))
