"""Peak memory of one GRPO update on 8 rollouts x 1,024 tokens with Qwen's vocabulary of 151,936, on the CPU.

Three ways, each in a process of its own, on the same small Qwen2 (LoRA on a frozen base) and the same rollouts:
``plain`` holds the logits (log_softmax and gather, no entropy), ``trl`` is TRL's own ``GRPOTrainer._compute_loss``,
``ours`` is ``token_logprobs_and_entropy`` and ``policy_loss``. Loss and gradient norm are compared as well.

    python tests/benchmarks/bench_memory.py
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROLLOUTS, PROMPT, TOKENS, VOCABULARY, HIDDEN = 8, 16, 1024, 151_936, 64
PLAIN_NEEDS = 18 * 2**30  # bytes: three tensors of all logits, and the rest
ROOT = Path(__file__).resolve().parents[2]


def main() -> dict:
    """Run each way, print the table, return the figures (MiB, seconds, ratios)."""
    import psutil

    figures: dict = {}
    for way in ("ours", "trl", "plain"):
        if way == "plain" and (free := psutil.virtual_memory().available) < PLAIN_NEEDS:
            print(f"plain: not measured, it needs {PLAIN_NEEDS >> 30} GiB and {free >> 30} are free")
            continue
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, __file__, way], env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        figures[way] = f = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{way:6} update {f['update_mib']:8.0f} MiB   process {f['process_mib']:8.0f} MiB   "
            f"{f['seconds']:6.1f} s   loss {f['loss']:.6f}   |gradient| {f['gradient']:.6f}",
            flush=True,
        )
    for other in [way for way in ("trl", "plain") if way in figures]:
        for what in ("update_mib", "process_mib", "seconds"):
            ratio = figures["ours"][what] / figures[other][what]
            figures[f"{what} ours/{other}"] = ratio
            print(f"{what:12} ours / {other:6} {ratio:.3f}")
    return figures


def measure(way: str) -> dict:
    """One update in this process. ``update_mib``: the peak above what was resident before it."""
    import psutil

    with tempfile.TemporaryDirectory() as folder:
        update, model = WAYS[way](folder)
        before, start = psutil.Process().memory_info().rss, time.perf_counter()
        loss = update()
        loss.backward()
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    gradient = sum(p.grad.square().sum().item() for p in model.parameters() if p.grad is not None) ** 0.5
    return {
        "update_mib": (peak - before) / 2**20,
        "process_mib": peak / 2**20,
        "seconds": seconds,
        "loss": loss.item(),
        "gradient": gradient,
    }


def rollouts() -> dict:
    """The same random rollouts for everybody, sampled by a policy a little different from the model's start."""
    import torch

    g = torch.Generator().manual_seed(0)
    ids = torch.randint(2, VOCABULARY, (ROLLOUTS, PROMPT + TOKENS), generator=g)
    return {
        "prompt_ids": ids[:, :PROMPT],
        "completion_ids": ids[:, PROMPT:],
        "prompt_mask": torch.ones(ROLLOUTS, PROMPT, dtype=torch.long),
        "completion_mask": torch.ones(ROLLOUTS, TOKENS, dtype=torch.long),
        "advantages": torch.randn(ROLLOUTS, generator=g),
        "old_per_token_logps": -11.94 + 0.1 * torch.randn(ROLLOUTS, TOKENS, generator=g),
        "num_items_in_batch": torch.tensor(ROLLOUTS * TOKENS),
    }


def adapted():
    """A small Qwen2 with Qwen's vocabulary and a random LoRA (as good as trained), the same in every process."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    base = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            bos_token_id=1,
            eos_token_id=1,
            pad_token_id=0,
        )
    )
    lora = LoraConfig(r=8, lora_dropout=0.0, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(base, lora)


def ours(folder: str):
    import torch

    from searchr1_lib.training.grpo import policy_loss, token_logprobs_and_entropy

    model, r = adapted(), rollouts()
    ids = torch.cat([r["prompt_ids"], r["completion_ids"]], 1)

    def update():
        hidden = model.base_model.model.model(ids).last_hidden_state[:, PROMPT - 1 : -1]
        head = model.get_output_embeddings().weight
        logprobs, entropy = token_logprobs_and_entropy(hidden, head, r["completion_ids"])
        return policy_loss(logprobs, r["old_per_token_logps"], r["advantages"], r["completion_mask"], entropy=entropy)[
            0
        ]

    return update, model


def plain(folder: str):
    import torch

    from searchr1_lib.training.grpo import policy_loss

    model, r = adapted(), rollouts()
    ids = torch.cat([r["prompt_ids"], r["completion_ids"]], 1)

    def update():
        log_p = model(ids).logits[:, PROMPT - 1 : -1].log_softmax(-1)
        logprobs = log_p.gather(-1, r["completion_ids"].unsqueeze(-1)).squeeze(-1)
        return policy_loss(logprobs, r["old_per_token_logps"], r["advantages"], r["completion_mask"])[0]

    return update, model


def trl(folder: str):
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    trainer = GRPOTrainer(
        model=adapted(),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            report_to="none",
            per_device_train_batch_size=ROLLOUTS,
            num_generations=ROLLOUTS,
            max_completion_length=TOKENS,
            beta=0.0,
            loss_type="grpo",
        ),
        train_dataset=Dataset.from_dict({"prompt": ["a"] * ROLLOUTS}),
        processing_class=tokenizer,
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    inputs = rollouts()
    return lambda: trainer._compute_loss(trainer.model, inputs), trainer.model


WAYS = {"ours": ours, "trl": trl, "plain": plain}

if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
    else:
        main()
