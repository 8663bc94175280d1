"""A model and its tokenizer, ready to sample and to train: the tiny Qwen or any Qwen2 or Qwen3, NF4 and LoRA.

Base and instruct models go the same way, as in Search-R1: one user message, in the tokenizer's chat template when it
has one (Qwen's base tokenizers have it too).

The base weights are 4-bit NormalFloat with double quantisation (Dettmers et al. 2023, "QLoRA", arXiv
2305.14314) and stay frozen; the LoRA matrices (Hu et al. 2021, arXiv 2106.09685) are trained in fp32.
"""

from __future__ import annotations

import copy
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import torch

from ..environment import protocol
from ..environment.limits import Count, Positive, check
from ..files import read_json, whole_folder, write_json
from ..records import ENVIRONMENT, Trajectory
from ..search.encoders import quiet
from .settings import Seed

TINY_QWEN = "data/tiny_qwen"
#: In a model's folder, names or holds the prompt that the model was taught with.
PROMPT_FILE = "search_r1.json"
#: Qwen ends a message with the first and a text with the second; a base or an instruct model may write either.
QWEN_ENDS = ("<|im_end|>", "<|endoftext|>")
#: Hidden size from which bf16 pays on a CPU that computes it; a small model gains a fifth, and loses digits.
_LARGE = 512
#: Text that a tokenizer has to give back: blanks, lines, letters of many bytes (composed, as Qwen wants them), tags.
_PROBE = (
    "  a  b\n\n\t1850 é 漢字 ไทย 🙂 <think> x </think>\n<search>y</search> <information>(z)</information>\r\n <answer> "
)
#: What of a LoRA's settings may differ from PEFT's defaults: with these a rollout computes what PEFT's forward does.
#: (With a ``bias`` the reference would not be the base; invoked, routed and replicated adapters are no plain layers.)
_LORA = set(
    "task_type auto_mapping peft_version base_model_name_or_path revision inference_mode r lora_alpha lora_dropout "
    "target_modules exclude_modules layers_to_transform layers_pattern rank_pattern alpha_pattern modules_to_save "
    "use_rslora use_dora init_lora_weights loftq_config eva_config corda_config lora_ga_config".split()
)


class Policy:
    """A causal language model with its tokenizer and prompt.

    Args:
        model: a transformers causal LM, plain or wrapped by PEFT. It is put in training mode and stays
            there: without dropout that changes nothing, and bitsandbytes would otherwise repack NF4
            weights on some CPUs into a layout that has no backward pass.
        tokenizer: its fast tokenizer.
        prompt: template of the user message, with ``{question}``.
        thinking: what a chat template with a thinking mode is told (Qwen3's ``enable_thinking``). False closes an
            empty ``<think>`` in the prompt: what the model then writes between these tags is what our own prompt asks
            for, and short. True leaves it to its native thoughts, which a turn of 500 tokens rarely holds.
        authors: names of the model's LoRA adapters where several write in turns, see ``load_policy``.

    Attributes:
        authors: who writes, ("policy",) where it is one.

    Raises:
        ValueError: model and tokenizer do not belong together; the tokenizer has lost its chat template, or does not
            give back the text that it encoded; the model uses dropout where something is trained (recorded and
            recomputed log-probabilities would differ), experts, layers without a key-value cache, or an adapter that
            a rollout could not follow exactly.
    """

    def __init__(
        self, model, tokenizer, prompt: str = protocol.PROMPT, *, thinking: bool = False, authors: Sequence[str] = ()
    ):
        if not any(p.requires_grad for p in model.parameters()):
            _without_dropout(model)
        self.model, self.tokenizer, self.prompt, self.thinking = model.train(), tokenizer, prompt, thinking
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False  # no repacking, whatever mode somebody puts it in
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.decoder, self.lm_head, self.config = base.get_decoder(), base.get_output_embeddings(), base.config
        self.stop_ids = _stop_ids(tokenizer, base)
        self.authors = tuple(authors) or self.authors
        self.pad_id = tokenizer.pad_token_id or 0  # fills tensors; masks say what is padding, never this id
        if problem := next(_problems(self), None):
            raise ValueError(problem)
        self.token_bytes = token_bytes(tokenizer, self.config.vocab_size)
        if (back := self.decode(self.encode(_PROBE))) != _PROBE:
            lossy = f"the tokenizer does not give text back: {_PROBE!r} becomes {back!r}"
            raise ValueError(f"{lossy}; take a byte-level one")
        if authors:
            for layer in (m for m in model.modules() if hasattr(m, "lora_A")):
                layer.forward = _gated_forward(layer, self)

    #: The authors of what it writes.
    authors: tuple[str, ...] = ("policy",)
    #: The place among them of who reads each token of a forward pass, (B, N); before the first one it is the first's.
    readers: torch.Tensor | int = 0
    #: Whose one author this is, see ``alone``.
    team: Policy | None = None
    #: What samples in the model's place, called as ``Decoder`` is made (``engines.served``); None: the model itself.
    sampler = None

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    def prompt_text(self, question: str) -> str:
        """The whole prompt of a question, in the words that the policy was taught with."""
        return self.chat(protocol.build_prompt(question, self.prompt))

    def chat(self, user: str) -> str:
        """The whole prompt for a user message, in the tokenizer's chat template when it has one.

        A ``<think>`` that the template opens for the model (as Qwen3's thinking-only models have it) is taken
        back: the model writes it itself, so that the tag is sampled, recorded and stands there once.
        """
        if not self.tokenizer.chat_template:
            return user
        message = {"role": "user", "content": user}
        how = {"add_generation_prompt": True, "enable_thinking": self.thinking}
        return re.sub(r"<think>\s*\Z", "", self.tokenizer.apply_chat_template([message], tokenize=False, **how))

    def measure(self, text: str) -> int:
        """The length of a text in tokens."""
        return len(self.encode(text))

    def encode(self, text: str, *, split_special_tokens: bool = False) -> list[int]:
        """Token ids of a text, nothing added; a lone surrogate, which has no bytes, becomes "?".

        ``split_special_tokens`` takes special tokens in it for plain text.
        """
        how = {"add_special_tokens": False, "split_special_tokens": split_special_tokens}
        return self.tokenizer.encode(text.encode("utf-8", "replace").decode(), **how)

    def decode(self, ids: list[int]) -> str:
        """The text of token ids; special tokens give nothing, broken characters give U+FFFD."""
        return self.bytes_of(ids).decode("utf-8", "replace")

    def token_text(self, i: int) -> str:
        """A token as it is shown: its text, or the name of one that ends a message."""
        ends = i in self.stop_ids
        return self.tokenizer.convert_ids_to_tokens(i) if ends else self.token_bytes[i].decode("utf-8", "replace")

    def bytes_of(self, ids: list[int]) -> bytes:
        """The exact bytes of token ids; special tokens give none."""
        return b"".join(self.token_bytes[i] for i in ids)

    def parameters(self, author: str | None = None) -> list[torch.nn.Parameter]:
        """What training may change, or the part of it that is the adapter of one of several authors."""
        mine = lambda name: author is None or len(self.authors) == 1 or name.split(".")[-2] == author
        return [p for name, p in self.model.named_parameters() if p.requires_grad and mine(name)]

    def hidden(self, ids: torch.Tensor, readers: torch.Tensor, **how) -> torch.Tensor:
        """The last hidden states (B, N, H) of token ids (B, N), each read by the adapter of its reader.

        A token is read by the author of the token *after* it, and by the first author where that one is the
        environment's. So what an author writes is drawn from a state that its own adapter made, from its first token
        on; and who reads a token is known when the next one is to be written, which is when the token enters the cache.
        It is encoded once, with a cache as without, whoever looks back at it. Prompt and passages are read by the first
        author, because it decides what to do about them.

        Args:
            readers: (B, N), places among ``authors``, see ``readers_of``; of no effect where there is one.
            **how: for the model, such as a cache.
        """
        gate = self.team or self
        gate.readers = readers + gate.places[self.authors[0]]
        states = self.decoder(ids, **how).last_hidden_state
        if not states.requires_grad:  # with gradient checkpointing a backward pass needs them again
            gate.readers = 0
        return states

    def alone(self, author: str) -> Policy:
        """One of several authors as a policy that writes and reads all of an episode: the same weights, not a copy.

        Raises:
            ValueError: there is no such author.
        """
        if author not in self.authors:
            raise ValueError(f"{author!r} is no author of this policy; {', '.join(self.authors)} are")
        one = copy.copy(self)
        one.authors, one.team = (author,), self
        return one

    @property
    def places(self) -> dict[str, int]:
        """The place of each author among ``authors``."""
        return {author: place for place, author in enumerate(self.authors)}

    def readers_of(self, t: Trajectory) -> list[int]:
        """Who reads each token of prompt and completion but the last one, (L - 1,), see ``hidden``; what no author's
        token follows is read by who wrote first.
        """
        place, authors = self.places, t.authors or [ENVIRONMENT] * len(t.mask)
        first = next((place[author] for author in authors if author in place), 0)
        return [first] * (len(t.prompt_ids) - 1) + [place.get(author, first) for author in authors]

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Within it the model is the frozen base: the adapters are off (the reference policy of GRPO)."""
        if not hasattr(self.model, "disable_adapter"):
            raise ValueError("a reference policy needs LoRA adapters to switch off; load the policy with lora=True")
        frozen = [p for p in self.model.parameters() if not p.requires_grad]
        with self.model.disable_adapter():
            yield
        for p in frozen:  # PEFT switches every adapter on to be trained, also that of an author who is not
            p.requires_grad_(False)

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Within it the model samples fast: layers of fp32 or 4 bits are one dense matrix, and nothing is recomputed.

        In fp32 the LoRA matrices are merged in as well: the same function, rounding apart. In 16 bits they are too
        fine to be added to the base weights and stay beside them. The layers stay as they are where the dense weights
        would take more than a quarter of the GPU's memory, or of the memory that is free.
        """
        # within the rollout of an agent that asks, an agent that is asked may sample with the same weights
        layers = [m for m in _layers_to_unpack(self.model) if "forward" not in vars(m)]
        gpu = self.device.type == "cuda"
        card = torch.cuda.get_device_properties(self.device).total_memory if gpu else 0
        room = (card or free_memory(self.device)) // 4
        if sum(m.in_features * m.out_features * _computes_in(m).itemsize for m in layers) > room:
            layers = []
        checkpointed = [m for m in self.model.modules() if getattr(m, "gradient_checkpointing", False)]
        try:
            for module in checkpointed:  # it would switch the cache off
                module.gradient_checkpointing = False
            for layer in layers:
                layer.forward = _dense_forward(layer)
            yield
        finally:
            for module in checkpointed:
                module.gradient_checkpointing = True
            for layer in layers:
                layer.__dict__.pop("forward", None)

    def save_adapter(self, folder: str | os.PathLike) -> None:
        """Write the LoRA adapter in PEFT's format (safetensors), without the settings that nobody set; of several
        authors each into a folder of its name.

        PEFT writes every field it knows, most as null, and an older PEFT warns of the fields that it does not know.
        """
        self.model.save_pretrained(str(folder), save_embedding_layers=False)  # "auto" would ask the hub
        for place in self._adapters(folder).values():
            file = place / "adapter_config.json"
            write_json(file, {name: value for name, value in read_json(file).items() if value is not None})

    def _adapters(self, folder: str | os.PathLike) -> dict[str, Path]:
        """PEFT's names of the adapters, and where each is saved."""
        several = {author: Path(folder) / author for author in self.authors}
        return several if len(several) > 1 else {"default": Path(folder)}

    def load_adapter(self, folder: str | os.PathLike) -> None:
        """Put a saved adapter's weights into this policy's adapter, or those of several authors into each.

        Raises:
            FileNotFoundError: no adapter there.
            ValueError: it is broken, or belongs to another model or another LoRA shape.
        """
        for name, place in self._adapters(folder).items():
            _load_weights(self.model, place, name)


def load_policy(
    model: str | os.PathLike = TINY_QWEN,
    *,
    adapter: str | os.PathLike | None = None,
    adapters: Sequence[str] | Mapping[str, str | os.PathLike | None] = (),
    quantize: bool = True,
    lora: bool = True,
    lora_r: int = 16,
    lora_alpha: int = 32,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    prompt: str | None = None,
    thinking: bool = False,
) -> Policy:
    """Load a model from a folder or the hub, in NF4, with fresh or saved LoRA adapters.

    Args:
        model: a folder, or a name on the Hugging Face hub such as "Qwen/Qwen2.5-1.5B-Instruct".
        adapter: a folder in PEFT's format whose weights the LoRA starts from (None: LoRA starts at 0).
        adapters: names of two or more adapters on this one model, for a policy of several authors that write in turns:
            ("reason", "search"), or a dict of names and folders to start from. One that bears a tag's name writes what
            follows the tag, up to the next tag, such as a query after ``<search>``; the first one all else, the tag
            that decides included. The switch comes after the token in which a tag ends: what else this token holds is
            by who wrote the tag. As M-GRPO's and Dr. MAS's agents (arXiv 2511.13288, 2602.08847) they act in one
            episode, but on one base and one cache.
        quantize: load the linear layers in 4-bit NF4 with double quantisation; False keeps ``dtype``.
        lora: attach LoRA to all linear layers; False gives the bare model, not trainable.
        lora_r, lora_alpha: rank and scale of LoRA; ignored when ``adapter`` brings its own.
        device: "cpu", "cuda", or "auto" for a GPU when there is one.
        dtype: of computation: "float32", "bfloat16", "float16", or "auto", see ``compute_dtype``.
        seed: of the LoRA initialisation.
        prompt: template of the user message, with ``{question}``; None takes the one the model was taught with
            (see ``prompt_of``).
        thinking: see ``Policy``.

    Raises:
        FileNotFoundError: the folder does not exist or lacks a file, or the hub does not give the model; says which.
        ValueError: a parameter that cannot be, an unknown architecture, a model that does not fit into memory, or what
            ``Policy`` refuses.
    """
    from transformers import BitsAndBytesConfig

    authors = dict(adapters if isinstance(adapters, Mapping) else dict.fromkeys(adapters))
    if adapters and (len(authors) < max(2, len(adapters)) or ENVIRONMENT in authors or adapter or not lora):
        raise ValueError(f"adapters={adapters!r} must be two names or more, without adapter= and with lora=True")
    numbers = {"lora_r": (lora_r, Count), "lora_alpha": (lora_alpha, Positive), "seed": (seed, Seed)}
    check(**numbers, dtype=(dtype, Literal["auto", "float32", "bfloat16", "float16"]))
    name = str(model)
    check_model_folder(name)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device

    def how(config) -> dict:
        compute = compute_dtype(device, config.hidden_size) if dtype == "auto" else getattr(torch, dtype)
        check_memory(name, 2 if quantize else compute.itemsize)
        kwargs = {"dtype": compute, "device_map": {"": device}}
        if quantize:
            nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
            kwargs["quantization_config"] = BitsAndBytesConfig(**nf4, bnb_4bit_compute_dtype=compute)
        return kwargs

    net, tokenizer = _pretrained(name, how)
    net.requires_grad_(False)
    if lora:
        for author, folder in (authors or {"default": adapter}).items():
            net = attach_lora(net, adapter=folder, r=lora_r, alpha=lora_alpha, seed=seed, name=author)
    elif adapter:
        raise ValueError("adapter is given, but lora=False: nothing to load it into")
    return Policy(net, tokenizer, prompt or prompt_of(name), thinking=thinking, authors=tuple(authors))


def export_merged(policy: Policy, folder: str | os.PathLike, *, base: str | os.PathLike | None = None) -> Path:
    """Write a model of its own: the policy's LoRA merged into the base weights, in the precision they are stored in.

    The base is loaded again, unquantised, on the CPU (two bytes a weight for a 16-bit model): merging into NF4 would
    round the adapter away. The folder then holds all that ``AutoModelForCausalLM`` and ``load_policy`` need; it is
    there whole or not at all.

    Args:
        policy: with LoRA adapters, quantised or not.
        folder: a new folder.
        base: where the base model is, a folder or a name on the hub; None where the policy's was loaded from.

    Returns:
        the folder.

    Raises:
        FileExistsError: there is such a folder.
        FileNotFoundError: the base is not where it was.
        ValueError: the policy has no adapter or several, the base is quantised itself, or nobody knows the base.
    """
    folder, base = Path(folder), str(base or policy.config._name_or_path)
    if folder.exists():
        raise FileExistsError(f"{folder} exists: name a new folder for the merged model")
    if not hasattr(policy.model, "disable_adapter"):
        raise ValueError("nothing to merge: the policy has no LoRA adapter")
    if len(policy.authors) > 1:
        raise ValueError(f"no one model is {' and '.join(policy.authors)}: load the policy with adapter= one of them")
    if not base:
        raise ValueError("this model does not say where it was loaded from: name its base model in base=")
    check_model_folder(base)
    net, tokenizer = _pretrained(base, lambda config: {"dtype": "auto"})
    if getattr(net, "is_quantized", False):
        raise ValueError(f"{base} is stored quantised: name the 16-bit model it was made from in base=")
    with whole_folder(folder) as unfinished:
        policy.save_adapter(unfinished / "adapter")
        net = attach_lora(net, adapter=unfinished / "adapter").merge_and_unload(safe_merge=True)
        shutil.rmtree(unfinished / "adapter")
        with quiet():
            net.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        write_json(unfinished / PROMPT_FILE, {"prompt": policy.prompt})  # in full: others than us read it too
    return folder


def _pretrained(name: str, kwargs_of: Callable[[Any], dict]):
    """Model and tokenizer as transformers loads them: no foreign code, no pickled weights.

    Args:
        kwargs_of: of a configuration, the arguments that its model is loaded with.
    """
    import transformers

    own = {"trust_remote_code": False}
    first_line = lambda error: (str(error).strip() or type(error).__name__).splitlines()[0]
    try:
        config = transformers.AutoConfig.from_pretrained(name, **own)
        if type(config) not in transformers.AutoModelForCausalLM._model_mapping:
            raise ValueError(f"a {config.model_type} is no causal language model")
        kwargs = kwargs_of(config)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **own)
        with quiet():
            how = {"use_safetensors": True, **own, **kwargs}
            return transformers.AutoModelForCausalLM.from_pretrained(name, **how), tokenizer
    except ValueError as e:
        why = f"transformers {transformers.__version__} cannot load this model ({first_line(e)})"
        raise ValueError(f"{name}: {why}. Qwen2 and Qwen3 models are what is tested") from None
    except OSError as e:
        if Path(name).is_dir():
            raise
        todo = "Check the name, the network and HF_HUB_OFFLINE (a gated model needs HF_TOKEN), or give a local folder"
        raise FileNotFoundError(f"the hub does not give {name!r} ({first_line(e)}). {todo}") from None


def attach_lora(net, *, adapter=None, r: int = 16, alpha: int = 32, seed: int = 0, name: str = "default"):
    """Wrap a frozen model in LoRA, weights in fp32: a saved ``adapter``, dropout off, or a new one.

    A new one is on all linear layers (not the output layer) and has no dropout. A model that has LoRA gets one more.
    """
    from peft import LoraConfig, get_peft_model

    how = {"lora_dropout": 0.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by an old name
        torch.manual_seed(seed)
        try:
            config = LoraConfig(r=r, lora_alpha=alpha, **how) if adapter is None else _adapter_config(Path(adapter))
            if hasattr(net, "disable_adapter"):
                net.add_adapter(name, config)
                net.base_model.set_adapter(list(net.peft_config))
            else:
                net = get_peft_model(net, config, name)
            _without_dropout(net)
        except (KeyError, TypeError, ValueError) as e:
            raise ValueError(f"{adapter or 'LoRA'} cannot be put on this model: {e!s:.300}") from None
    if adapter is not None:
        _load_weights(net, adapter, name)
    for p in net.parameters():
        if p.requires_grad:
            p.data = p.data.float()  # in 16 bits an update of 1e-5 would be rounded away
    return net


def _adapter_config(folder: Path):
    """The settings of a saved adapter, for one that can be trained on."""
    from peft import PeftConfig

    file = folder / "adapter_config.json"
    if not file.is_file():
        raise FileNotFoundError(f"no adapter in {folder}: adapter_config.json is missing")
    read_json(file)["peft_type"]  # PEFT's own error would name no file
    config = PeftConfig.from_pretrained(str(folder))
    _check_kind(config)
    config.inference_mode, config.base_model_name_or_path = False, None  # None: that of the model here
    return config


def _load_weights(net, folder: str | os.PathLike, name: str) -> None:
    """Put the weights of a saved adapter into that of this name of a model, all of them or none."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = Path(folder) / "adapter_model.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"no adapter in {folder}: adapter_model.safetensors is missing")
    try:
        there = load_file(file, device=str(next(net.parameters()).device))
    except SafetensorError as e:
        raise ValueError(f"{file} is broken ({e}): copy it again") from None
    here = get_peft_model_state_dict(net, adapter_name=name, save_embedding_layers=False)
    shapes = [{name: tuple(v.shape) for name, v in weights.items()} for weights in (there, here)]
    if differ := sorted(name for name, _ in shapes[0].items() ^ shapes[1].items()):
        found, wanted = (shape.get(differ[0], "nothing") for shape in shapes)
        raise ValueError(f"{file} does not fit this model: {differ[0]} is {found}, expected {wanted}")
    set_peft_model_state_dict(net, there, adapter_name=name)


def check_model_folder(name: str) -> None:
    """Complain about a model folder that is missing or half-written, before any slow import or load.

    A name that could be a hub repository (``owner/name``, and no such folder here) passes.
    """
    folder = Path(name)
    if folder.is_file():
        gguf = "; a GGUF file cannot be trained: take the model that it was made from" * (folder.suffix == ".gguf")
        raise FileNotFoundError(f"{name} is a file, not a model's folder as Hugging Face has it{gguf}")
    if not folder.is_dir():
        if name.startswith((".", "/", "data/", "runs/")) or name.count("/") != 1:
            where = f"The tiny Qwen ships in {TINY_QWEN!r} (run from the repository's root)"
            raise FileNotFoundError(f"no model folder at {name!r}. {where}, or is made by: searchr1 warmstart")
        return
    files = {p.name for p in folder.iterdir()}
    needed = ("config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors")
    instead = {"tokenizer.json": {"vocab.json", "merges.txt"}, "model.safetensors": {"model.safetensors.index.json"}}
    missing = [name for name in needed if name not in files and not instead.get(name, {name}) <= files]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        missing += sorted(set(read_json(index)["weight_map"].values()) - files)
    if missing:
        named = f"{', '.join(missing)} missing"
        raise FileNotFoundError(f"the model folder {name!r} is incomplete: {named}. Copy it again, or make it again")


def prompt_of(name: str) -> str:
    """The prompt a model was taught with: ``search_r1.json`` in its folder names it or holds it, else the full one."""
    file = Path(name) / PROMPT_FILE
    if not file.is_file():
        return protocol.PROMPT
    prompt = read_json(file).get("prompt")
    prompt = protocol.PROMPTS.get(prompt, prompt)
    if not isinstance(prompt, str) or "{question}" not in prompt:
        known = f"{', '.join(protocol.PROMPTS)}, or a text with {{question}}"
        raise ValueError(f"{file}: unknown prompt {prompt!r}; known are {known}")
    return prompt


def check_memory(name: str, bytes_each: int) -> None:
    """Complain about a model in a folder that cannot fit into the memory that is free, before it is loaded.

    Args:
        bytes_each: that a weight takes while the model is loaded; 16-bit files are assumed.

    Raises:
        ValueError: it does not fit.
    """
    needed = sum(file.stat().st_size for file in Path(name).glob("*.safetensors")) // 2 * bytes_each
    free = free_memory(torch.device("cpu"))
    if needed > free:
        what = f"loading {name} takes some {needed / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} GiB are free"
        raise ValueError(f"{what}: choose a smaller model=, quantize=True, or close other programs")


def free_memory(device: torch.device) -> int:
    """Bytes that are free there."""
    import psutil

    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def activation_bytes(policy: Policy, tokens: int = 64) -> float:
    """What a token of a forward pass leaves for the backward pass, in bytes: measured, so it holds for any model."""
    kept: dict[int, int] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    ids = torch.zeros(1, tokens, dtype=torch.long, device=policy.device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        states = policy.hidden(ids, torch.zeros_like(ids), use_cache=False)
    for p in policy.model.parameters():
        kept.pop(p.untyped_storage().data_ptr(), None)
    del states  # until here all that is kept was alive, and no place counted for two
    return sum(kept.values()) / tokens


def compute_dtype(device: str, hidden_size: int = 0) -> torch.dtype:
    """On a CPU fp32, or bf16 for a large model where the processor multiplies it in hardware (AMX, AVX512-BF16); bf16
    on a GPU that does (Ampere and later); else fp16, as on a T4.
    """
    if not str(device).startswith("cuda"):
        return torch.bfloat16 if hidden_size >= _LARGE and multiplies_bf16() else torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability()[0] >= 8 else torch.float16


def multiplies_bf16() -> bool:
    """Whether the processor multiplies bf16 in hardware (AMX, AVX512-BF16). Elsewhere bf16 costs time."""
    can: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(can.get("amx_bf16") or can.get("avx512_bf16"))


def token_bytes(tokenizer, vocab_size: int) -> list[bytes]:
    """The bytes that each token id stands for, (V,); special tokens and unused ids give none.

    Byte-level BPE writes each byte as a printable character; this undoes it, so that text and tokens
    correspond exactly, also where a token is a part of a character.
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte = {letter: number for number, letter in bytes_to_unicode().items()}
    tokens = [t or "" for t in tokenizer.convert_ids_to_tokens(list(range(min(vocab_size, len(tokenizer)))))]
    table = [bytes(byte[c] for c in t) if set(t) <= byte.keys() else t.encode() for t in tokens]
    for i, added in tokenizer.added_tokens_decoder.items():  # stand for themselves, such as Qwen3's <think>
        table[i] = b"" if added.special else added.content.encode()
    return table + [b""] * (vocab_size - len(table))


def _gated_forward(layer, policy: Policy):
    """The forward pass of a layer with several LoRA adapters, of which each token takes that of its reader alone.

    The adapters' low-rank products are made at once, as if they were one of their ranks together, and what is not the
    reader's is set to 0 between the two factors: in 16 more numbers a token, not in another pass.
    """
    names = [author for author in policy.authors if author in layer.lora_A]
    ranks = [policy.authors.index(name) for name in names for _ in range(layer.r[name])]
    owner = torch.tensor(ranks, device=policy.device)

    def forward(x, *args, **kwargs):
        result = layer.base_layer(x)
        if layer.disable_adapters:
            return result
        down = torch.cat([layer.lora_A[name].weight for name in names])
        up = torch.cat([layer.lora_B[name].weight * layer.scaling[name] for name in names], 1)
        readers = torch.as_tensor(policy.readers, device=x.device).unsqueeze(-1)
        low = torch.nn.functional.linear(x.to(down.dtype), down) * (readers == owner)
        return result + torch.nn.functional.linear(low, up).to(result.dtype)

    return forward


def _layers_to_unpack(model) -> list[torch.nn.Module]:
    """Layers whose forward pass is a matrix product with a matrix that can be made beforehand."""
    plain = lambda m: hasattr(m, "lora_A") and not (m.merged or any(m.use_dora.values()) or m.active_adapters[1:])
    adapted = [m for m in model.modules() if plain(m) and _computes_in(m) == torch.float32]
    inner = {id(m.base_layer) for m in adapted}
    packed = (m for m in model.modules() if getattr(getattr(m, "weight", None), "quant_state", None) is not None)
    return adapted + [m for m in packed if not hasattr(m, "lora_A") and id(m) not in inner]


def _computes_in(layer) -> torch.dtype:
    base = getattr(layer, "base_layer", layer)
    return getattr(base, "compute_dtype", None) or base.weight.dtype


def _dense_forward(layer):
    """The forward pass of a linear layer as one product with a dense matrix."""
    base = getattr(layer, "base_layer", layer)
    weight, dtype = base.weight.data, _computes_in(layer)
    if getattr(base.weight, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(weight, base.weight.quant_state)
    weight = weight.to(dtype)
    for name in getattr(layer, "active_adapters", ()):
        if name in layer.lora_A and not layer.disable_adapters:
            weight = weight + layer.get_delta_weight(name).detach().to(dtype)
    bias = None if base.bias is None else base.bias.data.to(dtype)
    return lambda x: torch.nn.functional.linear(x.to(dtype), weight, bias).to(x.dtype)


def _stop_ids(tokenizer, model) -> set[int]:
    """Token ids that end the model's message: the tokenizer's, the generation config's, and Qwen's two."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = ends if isinstance(ends, (list, tuple)) else [ends]
    return {tokenizer.eos_token_id, *ends, *map(tokenizer.get_added_vocab().get, QWEN_ENDS)} - {None}


def _problems(policy: Policy) -> Iterator[str]:
    """What a rollout or a training of this model, adapter and tokenizer could not do."""
    model, config, size, stop_ids = policy.model, policy.config, len(policy.tokenizer), policy.stop_ids
    used = [f"{n} (p={m.p})" for n, m in model.named_modules() if isinstance(m, torch.nn.Dropout) and m.p > 0]
    used += ["attention_dropout"] if getattr(config, "attention_dropout", 0.0) else []
    if used:  # a token would be learnt under another policy than sampled it
        yield f"the policy must not use dropout, found {', '.join(used[:3])}: set it to 0"
    if adapters := getattr(model, "peft_config", {}):
        names = list(policy._adapters(""))
        if not hasattr(model, "disable_adapter") or list(model.active_adapters) != names:
            yield f"adapters {', '.join(adapters)}: active must be PEFT's adapter {' and '.join(names)}, and no other"
        for lora in (adapters[name] for name in names):
            _check_kind(lora)
            if len(names) > 1 and (lora.use_dora or lora.modules_to_save):
                yield "an adapter with use_dora or modules_to_save, which no token can have for itself: one author only"
        if any(hasattr(m, "active_adapters") for m in (policy.lm_head, policy.decoder.get_input_embeddings())):
            yield "the adapter changes the embeddings or the output layer; rollouts know it in other layers only"
        if any(getattr(m, "merged", False) for m in model.modules()):
            yield "the adapter is merged into the base: take it out with unmerge_adapter()"
    if size > config.vocab_size:
        yield f"the tokenizer has {size} tokens, the model only {config.vocab_size}: they do not belong together"
    if beyond := [i for i in sorted(stop_ids) if i >= size]:
        less = f"the tokenizer has only {size} tokens: they do not belong together"
        yield f"the model ends its messages with token {beyond[0]}, but {less}"
    if policy.tokenizer.eos_token == QWEN_ENDS[0] and not policy.tokenizer.chat_template:
        template = "its chat template is missing: copy chat_template.jinja (or tokenizer_config.json) from the original"
        yield f"the tokenizer ends messages with {QWEN_ENDS[0]}, so this is a chat model, but {template}"
    # bitsandbytes 0.50.2 on a processor with AVX512 scales such rows by other blocks than it quantised
    if odd := [n for n, m in model.named_modules() if hasattr(m, "support_avx512bf16_for_cpu") and m.in_features % 64]:
        yield f"{odd[0]} in NF4, its width no multiple of 64: some CPUs unpack that wrongly; take quantize=False"
    if getattr(config, "num_experts", 0) or getattr(config, "num_local_experts", 0):
        yield "a mixture of experts: NF4 and LoRA reach the experts of no such model here; take a dense one"
    if other := sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}):
        cached = "a key-value cache in every layer, as Qwen2 and Qwen3 models have it"
        yield f"the model has layers of type {', '.join(other)}; rollouts need {cached}"


def _check_kind(config) -> None:
    """Raise ValueError for another kind of adapter than those that a rollout follows exactly."""
    if config.peft_type != "LORA":
        raise ValueError(f"an adapter of the kind {config.peft_type.value}: rollouts know LoRA, also rsLoRA and DoRA")
    default = type(config)()
    known = {f.name for f in fields(config)} - _LORA
    if odd := [f"{n}={getattr(config, n)!r}" for n in sorted(known) if getattr(config, n) != getattr(default, n)]:
        raise ValueError(f"a LoRA with {', '.join(odd)}, which rollouts do not know")


def _without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model
