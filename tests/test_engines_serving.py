"""The trained policy, merged, answers through transformers alone, by the program that docs/engines.md prints."""

import json
import re
import subprocess
import sys

from engine_world import ROOT

from searchr1_lib import BM25Search, export_merged, load_passages, load_policy, load_questions, rollout

RUN = """
import sys
{program}
shelf = json.loads(Path(sys.argv[1]).read_text())
asked = json.loads(sys.argv[2])
said = [answer(question, lambda query: shelf["found"].get(query, []), turns=2, room=110) for question in asked]
assert not any(name.startswith("searchr1") for name in sys.modules)
print(json.dumps(said))
"""


def test_ten_questions(tmp_path):
    policy = load_policy("data/tiny_qwen", adapter="data/tiny_qwen_grpo", quantize=False)
    folder = export_merged(policy, tmp_path / "merged")
    merged = load_policy(folder, quantize=False, lora=False)
    assert merged.prompt == policy.prompt
    questions = load_questions("data/almanac/test.jsonl")[:10]
    engine = BM25Search(load_passages("data/almanac/passages.jsonl"))
    how = {"num_generations": 1, "temperature": 0.0, "max_turns": 2, "max_turn_tokens": 110, "topk": 2}
    ours = rollout(merged, questions, engine, **how)
    assert len(ours) == 10

    found = {c.argument: [(h.passage.title, h.passage.text) for h in c.result] for t in ours for c in t.calls}
    (tmp_path / "found.json").write_text(json.dumps({"found": found}))
    page = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(import json.*?)```", page, re.DOTALL)
    program = RUN.format(program=program.replace("runs/merged", str(folder)))
    asked = json.dumps([q.text for q in questions])
    command = [sys.executable, "-c", program, str(tmp_path / "found.json"), asked]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [t.answer for t in ours]
    assert sum(t.answer is not None for t in ours) >= 5
