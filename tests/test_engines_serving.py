"""The trained policy, merged, answers through transformers alone, by the program that docs/engines.md prints."""

import json
import re
import subprocess
import sys

import torch
from engine_world import ROOT, world

from searchr1_lib import export_merged, load_policy, rollout

QUESTIONS = ["Where was Dorn born?", "Who wrote The Mill?", "Which town is older, Melk or Ostvar?", "Who is Bo Trand?"]
RUN = """
import sys
{program}
shelf = json.loads(Path(sys.argv[1]).read_text())
asked = json.loads(sys.argv[2])
said = [answer(question, lambda query: shelf["found"].get(query, []), turns=2, room=40) for question in asked]
assert not any(name.startswith("searchr1") for name in sys.modules)
print(json.dumps(said))
"""


def test_ten_questions(tmp_path):
    policy = load_policy("data/tiny_qwen", quantize=False)
    with torch.no_grad():
        for i, p in enumerate(policy.parameters()):  # an adapter that has learnt something
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 3e-3)
    folder = export_merged(policy, tmp_path / "merged")
    merged = load_policy(folder, quantize=False, lora=False)
    assert merged.prompt == policy.prompt
    questions, engine = world()
    for number, text in enumerate(QUESTIONS):
        questions.append(type(questions[0])(f"x{number}", text, ["?"]))
    how = {"num_generations": 1, "temperature": 0.0, "max_turns": 2, "max_turn_tokens": 40, "topk": 2}
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
