"""A model and its tokenizer, ready to sample and to train: the tiny Qwen or any Qwen, NF4 and LoRA.

The base weights are 4-bit NormalFloat with double quantisation (Dettmers et al. 2023, "QLoRA", arXiv
2305.14314) and stay frozen; the LoRA matrices (Hu et al. 2021, arXiv 2106.09685) are trained in fp32.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

import torch

from . import protocol

TINY_QWEN = "data/tiny_qwen"


class Policy:
    """A causal language model with its tokenizer and prompt.

    Args:
        model: a transformers causal LM, plain or wrapped by PEFT. It is put in training mode and stays
            there: without dropout that changes nothing, and bitsandbytes would otherwise repack NF4
            weights on some CPUs into a layout that has no backward pass.
        tokenizer: its fast tokenizer.
        prompt: template of the user message, with ``{question}``.

    Raises:
        ValueError: the model uses dropout (recorded and recomputed log-probabilities would differ).
    """

    def __init__(self, model, tokenizer, prompt: str = protocol.PROMPT):
        if dropout := _dropout(model):
            raise ValueError(f"the policy must not use dropout, found {', '.join(dropout)}: set it to 0")
        self.model, self.tokenizer, self.prompt = model.train(), tokenizer, prompt
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False  # no repacking, whatever mode somebody puts it in
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.decoder, self.lm_head, self.config = base.get_decoder(), base.get_output_embeddings(), base.config
        self.token_bytes = token_bytes(tokenizer, self.config.vocab_size)
        self.stop_ids = _stop_ids(tokenizer, base)

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @property
    def pad_id(self) -> int:
        """A token id to fill tensors with. Masks say what is padding, never this id."""
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0

    def prompt_text(self, question: str) -> str:
        """The whole prompt for a question, in the tokenizer's chat template when it has one."""
        user = protocol.build_prompt(question, self.prompt)
        if not self.tokenizer.chat_template:
            return user
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": user}], tokenize=False, add_generation_prompt=True)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, nothing added."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: list[int]) -> str:
        """The text of token ids; special tokens give nothing, broken characters give U+FFFD."""
        return self.bytes_of(ids).decode("utf-8", "replace")

    def bytes_of(self, ids: list[int]) -> bytes:
        """The exact bytes of token ids; special tokens give none."""
        return b"".join(self.token_bytes[i] for i in ids)

    def parameters(self) -> list[torch.nn.Parameter]:
        """What training may change."""
        return [p for p in self.model.parameters() if p.requires_grad]

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Within it the model is the frozen base: the adapters are off (the reference policy of GRPO)."""
        if not hasattr(self.model, "disable_adapter"):
            raise ValueError("a reference policy needs LoRA adapters to switch off; load the policy with lora=True")
        with self.model.disable_adapter():
            yield

    def save_adapter(self, folder: str | os.PathLike) -> None:
        """Write the LoRA adapter in PEFT's format (safetensors)."""
        self.model.save_pretrained(str(folder), safe_serialization=True)

    def load_adapter(self, folder: str | os.PathLike) -> None:
        """Put a saved adapter's weights into this policy's adapter.

        Raises:
            FileNotFoundError: no adapter there.
            ValueError: it belongs to another model or another LoRA shape.
        """
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        file = Path(folder) / "adapter_model.safetensors"
        if not file.is_file():
            raise FileNotFoundError(f"no adapter in {folder}: adapter_model.safetensors is missing")
        try:
            result = set_peft_model_state_dict(self.model, load_file(file, device=str(self.device)))
        except RuntimeError as e:
            raise ValueError(f"{file} does not fit this model: {str(e).splitlines()[-1].strip()}") from None
        if result.unexpected_keys:
            raise ValueError(f"{file} does not fit this model: unexpected {result.unexpected_keys[0]}")


def load_policy(
    model: str | os.PathLike = TINY_QWEN,
    *,
    adapter: str | os.PathLike | None = None,
    quantize: bool = True,
    lora: bool = True,
    lora_r: int = 16,
    lora_alpha: int = 32,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
) -> Policy:
    """Load a model from a folder or the hub, in NF4, with fresh or saved LoRA adapters.

    Args:
        model: a folder, or a name on the Hugging Face hub such as "Qwen/Qwen2.5-1.5B-Instruct".
        adapter: a folder in PEFT's format whose weights the LoRA starts from (None: LoRA starts at 0).
        quantize: load the linear layers in 4-bit NF4 with double quantisation; False keeps ``dtype``.
        lora: attach LoRA to all linear layers; False gives the bare model, not trainable.
        lora_r, lora_alpha: rank and scale of LoRA; ignored when ``adapter`` brings its own.
        device: "cpu", "cuda", or "auto" for a GPU when there is one.
        dtype: of computation: "float32", "bfloat16", "float16", or "auto": fp32 on a CPU, bf16 on a GPU
            that has it in hardware, else fp16.
        seed: of the LoRA initialisation.

    Raises:
        FileNotFoundError: the folder does not exist or lacks a file; says which.
        ValueError: a parameter that cannot be.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    _quiet_bitsandbytes()
    name = str(model)
    check_model_folder(name)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    compute = compute_dtype(device) if dtype == "auto" else _dtype(dtype)
    kwargs = {"dtype": compute, "device_map": {"": device}}
    if quantize:
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute)
    tokenizer = AutoTokenizer.from_pretrained(name)
    with _no_progress_bar():
        net = AutoModelForCausalLM.from_pretrained(name, **kwargs)
    net.requires_grad_(False)
    if lora:
        net = attach_lora(net, adapter=adapter, r=lora_r, alpha=lora_alpha, seed=seed)
    elif adapter:
        raise ValueError("adapter is given, but lora=False: nothing to load it into")
    return Policy(net, tokenizer, prompt_of(name))


def attach_lora(net, *, adapter=None, r: int = 16, alpha: int = 32, seed: int = 0):
    """Wrap a frozen model in LoRA on all linear layers (not the output layer), weights in fp32, no dropout."""
    from peft import LoraConfig, PeftModel, get_peft_model

    if adapter is not None:
        if not (Path(adapter) / "adapter_config.json").is_file():
            raise FileNotFoundError(f"no adapter in {adapter}: adapter_config.json is missing")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            net = PeftModel.from_pretrained(net, str(adapter), is_trainable=True)
    else:
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by an old name
            torch.manual_seed(seed)
            net = get_peft_model(net, LoraConfig(
                r=r, lora_alpha=alpha, lora_dropout=0.0, bias="none", target_modules="all-linear",
                task_type="CAUSAL_LM"))
    for p in net.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    return net


def check_model_folder(name: str) -> None:
    """Complain about a model folder that is missing or half-written, before any slow import or load.

    A name that could be a hub repository (``owner/name``, and no such folder here) passes.
    """
    folder = Path(name)
    if not folder.is_dir():
        looks_local = name.startswith((".", "/", "data/", "runs/")) or name.count("/") != 1
        if looks_local:
            raise FileNotFoundError(
                f"no model folder at {name!r}. The tiny Qwen ships in {TINY_QWEN!r} (run from the repository's "
                "root), or is made by: python -m searchr1_lib.warmstart")
        return
    files = {p.name for p in folder.iterdir()}
    missing = [f for f in ("config.json", "tokenizer_config.json") if f not in files]
    if not files & {"model.safetensors", "model.safetensors.index.json"}:
        missing.append("model.safetensors")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        missing += sorted(shards - files)
    if missing:
        raise FileNotFoundError(f"the model folder {name!r} is incomplete: {', '.join(missing)} missing. "
                                "Copy it again, or make it again")


def prompt_of(name: str) -> str:
    """The prompt a model was taught with: ``search_r1.json`` in its folder names it, else the full one."""
    file = Path(name) / "search_r1.json"
    if not file.is_file():
        return protocol.PROMPT
    chosen = json.loads(file.read_text(encoding="utf-8")).get("prompt")
    if chosen not in protocol.PROMPTS:
        raise ValueError(f"{file}: unknown prompt {chosen!r}, known: {', '.join(protocol.PROMPTS)}")
    return protocol.PROMPTS[chosen]


def compute_dtype(device: str) -> torch.dtype:
    """fp32 on a CPU; bf16 on a GPU that computes it in hardware (Ampere and later); else fp16, as on a T4."""
    if not str(device).startswith("cuda"):
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability()[0] >= 8 else torch.float16


def token_bytes(tokenizer, vocab_size: int) -> list[bytes]:
    """The bytes that each token id stands for, (V,); special tokens and unused ids give none.

    Byte-level BPE writes each byte as a printable character; this undoes it, so that text and tokens
    correspond exactly, also where a token is a part of a character.
    """
    special = set(tokenizer.all_special_ids)
    tokens = tokenizer.convert_ids_to_tokens(list(range(min(vocab_size, len(tokenizer)))))
    if "Ġ" in "".join(t or "" for t in tokens):  # byte-level
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        byte = {c: b for b, c in bytes_to_unicode().items()}
        table = [bytes(byte[c] for c in t) if t and all(c in byte for c in t) else (t or "").encode() for t in tokens]
    else:
        table = [tokenizer.decode([i]).encode() for i in range(len(tokens))]
    table = [b"" if i in special else b for i, b in enumerate(table)]
    return table + [b""] * (vocab_size - len(table))


def _stop_ids(tokenizer, model) -> set[int]:
    """Token ids that end the model's message."""
    ids = {tokenizer.eos_token_id}
    generation = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids |= set(generation) if isinstance(generation, (list, tuple)) else {generation}
    return ids - {None}


def _dropout(model) -> list[str]:
    found = [f"{n} (p={m.p})" for n, m in model.named_modules() if isinstance(m, torch.nn.Dropout) and m.p > 0]
    config = getattr(model, "config", None)
    if getattr(config, "attention_dropout", 0.0):
        found.append("attention_dropout")
    return found[:3]


def _dtype(name: str) -> torch.dtype:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ValueError(f"dtype {name!r}: choose auto, {', '.join(known)}")
    return known[name]


def _quiet_bitsandbytes() -> None:
    """Bitsandbytes recommends an optional package with a warning at import; it is not needed here."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    from transformers.utils import logging as hf

    shown = hf.is_progress_bar_enabled()
    hf.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf.enable_progress_bar()
