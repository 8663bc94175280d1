"""The short warm start of form: both acts are shown, and nothing but what the model writes is trained."""

import random

import pytest

from searchr1_lib.data import load_passages, load_questions
from searchr1_lib.search import BM25Search
from searchr1_lib.study.form import demonstrations, examine
from searchr1_lib.suite.cli import main
from searchr1_lib.training.policy import load_policy

HOME = "data/real/mixed"


@pytest.fixture(scope="module")
def mixed():
    return BM25Search(load_passages(f"{HOME}/passages.jsonl"))


def test_both_acts_are_shown_and_read(mixed):
    policy, questions = load_policy("data/tiny_qwen"), load_questions(f"{HOME}/train.jsonl")[:80]
    made = demonstrations(policy, questions, mixed, random.Random(0))
    texts = [policy.decode(t.completion_ids) for t in made]
    assert 25 < sum("<search>" in text for text in texts) < 55
    for q, t, text in zip(questions, made, texts):
        wrote = policy.decode([i for i, m in zip(t.completion_ids, t.mask) if m])
        assert "<information>" not in wrote and wrote.endswith("</answer>") and text.startswith("<think> I recall")
        answer = wrote.split("<answer> ")[1].removesuffix(" </answer>")
        if q.known or "It says" in wrote:
            assert answer in q.answers
        else:
            assert answer == "unknown"
    searched = [t for q, t in zip(questions, texts) if "<search>" in t and not q.known]
    assert sum("It says" in text for text in searched) > len(searched) / 2


def test_the_command_leaves_an_adapter_and_says_what_changed(tmp_path, capsys, mixed):
    out = tmp_path / "form"
    command = ["form", "--model", "data/tiny_qwen", "--out", str(out), "--questions", "8", "--examined", "2"]
    assert main(command) == 0
    assert capsys.readouterr().out.startswith("before: malformed ") and (out / "adapter_model.safetensors").exists()
    policy = load_policy("data/tiny_qwen", adapter=out)
    shares = examine(policy, load_questions(f"{HOME}/validation.jsonl")[:2], mixed, max_turns=1, max_turn_tokens=30)
    assert set(shares) == {"malformed", "searched", "right, known", "right, look-up"}
    (out / "mine.txt").write_text("")
    assert main(command) == 2 and "mine.txt" in capsys.readouterr().err
