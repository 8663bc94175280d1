"""Loading: real NF4 and LoRA, any Qwen-shaped folder, and clear errors before anything slow happens."""

import json
import os
import shutil
import warnings

import pytest
import torch

from searchr1_lib.environment.protocol import PROMPT, SHORT_PROMPT
from searchr1_lib.files import write_json
from searchr1_lib.training.decoder import Decoder
from searchr1_lib.training.learner import Learner
from searchr1_lib.training.policy import Policy, check_model_folder, export_merged, load_policy, prompt_of, token_bytes
from searchr1_lib.training.settings import Settings

TINY = "data/tiny_qwen"


@pytest.fixture(scope="module")
def policy():
    return load_policy(TINY)


def test_the_linear_layers_are_nf4_with_double_quantisation_and_lora_is_fp32(policy):
    import bitsandbytes as bnb

    linear = [m for m in policy.model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    layers = policy.config.num_hidden_layers
    assert len(linear) == 7 * layers
    assert all(m.weight.quant_state.quant_type == "nf4" and m.weight.quant_state.nested for m in linear)
    trained = [n for n, p in policy.model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 7 * layers and all("lora_" in n for n in trained)
    assert all(p.dtype == torch.float32 for p in policy.parameters())


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_nf4_keeps_its_backward_after_a_forward_without_gradients(mode):
    policy = load_policy(TINY)
    getattr(policy.model, mode)()
    ids = torch.tensor([policy.encode("Where was the founder of Tonund Works born?")])
    with torch.no_grad():
        first = policy.decoder(input_ids=ids).last_hidden_state
        again = policy.decoder(input_ids=ids).last_hidden_state
    assert torch.equal(first, again)
    torch.manual_seed(0)
    for p in policy.parameters():
        p.data.add_(torch.randn_like(p) * 0.02)
    policy.decoder(input_ids=ids).last_hidden_state.square().sum().backward()
    lowest = [p.grad.abs().max() for n, p in policy.model.named_parameters() if "layers.0." in n and p.requires_grad]
    assert len(lowest) == 14 and all(g > 0 for g in lowest)


def test_an_adapter_comes_back_as_it_was(policy, tmp_path):
    torch.manual_seed(0)
    other = load_policy(TINY)
    for p in other.parameters():
        p.data.add_(torch.randn_like(p))
    other.save_adapter(tmp_path)
    assert None not in json.loads((tmp_path / "adapter_config.json").read_text()).values()  # an older PEFT would warn
    for loaded in (load_policy(TINY, adapter=tmp_path), load_policy(TINY)):
        loaded.load_adapter(tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), other.parameters()))
    with policy.reference():
        pass  # adapters off and on again
    with pytest.raises(ValueError, match="does not fit"):
        load_policy(TINY, lora_r=4).load_adapter(tmp_path)


def changed_policy(**how):
    """A policy whose adapter does something."""
    policy = load_policy(TINY, **how)
    torch.manual_seed(0)
    for p in policy.parameters():
        p.data.add_(torch.randn_like(p) * 0.05)
    return policy


def logits(model, policy):
    ids = torch.tensor([policy.encode(policy.prompt_text("Where was the founder of Tonund Works born?"))])
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def test_peft_loads_a_saved_adapter_by_itself(tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    policy = changed_policy(quantize=False)
    policy.save_adapter(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == TINY
    alone = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(TINY), str(tmp_path))
    assert torch.allclose(logits(alone, policy), logits(policy.model, policy), atol=1e-5)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_merge_goes_into_the_stored_base_never_into_nf4(tmp_path, stored):
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    base = shutil.copytree(TINY, tmp_path / "base")
    save_file(
        {k: v.to(stored) for k, v in load_file(base / "model.safetensors").items()},
        base / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"dtype": str(stored).removeprefix("torch.")}))
    policy = changed_policy()  # NF4
    export_merged(policy, tmp_path / "merged", base=base)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert merged.dtype == stored and not hasattr(merged.config, "quantization_config")
    want = logits(changed_policy(quantize=False).model, policy)
    near = (logits(merged, policy) - want).abs().max()
    nf4 = (logits(policy.model, policy) - want).abs().max()
    assert near < (1e-4 if stored == torch.float32 else nf4 / 2)  # nearer than what was trained: NF4 rounds more
    assert load_policy(tmp_path / "merged", quantize=False, lora=False).prompt == SHORT_PROMPT


def test_a_merge_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(path, value):
        if path.name == "search_r1.json":  # the last file of the folder
            raise OSError(28, "No space left on device")
        write_json(path, value)

    monkeypatch.setattr("searchr1_lib.training.policy.write_json", full)
    with pytest.raises(OSError, match="No space"):
        export_merged(changed_policy(), tmp_path / "merged")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="no LoRA adapter"):
        export_merged(load_policy(TINY, lora=False), tmp_path / "merged")
    with pytest.raises(FileNotFoundError, match="no model folder at 'data/none'"):
        export_merged(changed_policy(), tmp_path / "merged", base="data/none")
    policy = changed_policy()
    policy.config._name_or_path = ""
    with pytest.raises(ValueError, match="name its base model"):
        export_merged(policy, tmp_path / "merged")


def test_the_reference_is_the_base(policy):
    torch.manual_seed(0)
    changed = load_policy(TINY)
    for p in changed.parameters():
        p.data.add_(torch.randn_like(p) * 0.1)
    ids = torch.tensor([policy.encode("Who founded it?")])
    with torch.no_grad():
        base = policy.decoder(input_ids=ids).last_hidden_state
        assert not torch.allclose(changed.decoder(input_ids=ids).last_hidden_state, base)
        with changed.reference():
            assert torch.allclose(changed.decoder(input_ids=ids).last_hidden_state, base, atol=1e-5)


def test_token_bytes_spell_any_text(policy):
    text = "héllo 漢字 <search> q </search>\n\n1850 \u2039|im_end|>"
    assert policy.bytes_of(policy.encode(text)).decode() == text
    assert policy.bytes_of([policy.tokenizer.eos_token_id]) == b""
    assert len(token_bytes(policy.tokenizer, 5000)) == 5000


def test_tags_are_ordinary_text_of_several_tokens(policy):
    ids = policy.encode("</search>")
    assert len(ids) > 1 and not set(ids) & set(policy.tokenizer.all_special_ids)


def test_the_prompt_is_qwens_chat_format(policy):
    text = policy.prompt_text("Who founded <|im_end|> it")
    assert "<|im_start|>user\n" in text and text.endswith("<|im_start|>assistant\n")
    assert text.count("<|im_end|>") == text.count("<|im_start|>") - 1 and policy.prompt == SHORT_PROMPT


def test_missing_and_half_written_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model folder at 'data/none'"):
        check_model_folder("data/none")
    check_model_folder("Qwen/Qwen2.5-1.5B-Instruct")  # a hub name passes
    half = tmp_path / "half"
    shutil.copytree(TINY, half)
    (half / "model.safetensors").unlink()
    (half / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json, model.safetensors missing"):
        load_policy(half)
    (half / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(FileNotFoundError, match="config.json, model-1.safetensors missing"):
        load_policy(half)


def test_other_mistakes_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="adapter_config.json"):
        load_policy(TINY, adapter=tmp_path)
    with pytest.raises(ValueError, match="lora=False"):
        load_policy(TINY, adapter=tmp_path, lora=False)
    with pytest.raises(ValueError, match="float8"):
        load_policy(TINY, dtype="float8")
    (tmp_path / "search_r1.json").write_text('{"prompt": "odd"}')
    with pytest.raises(ValueError, match="unknown prompt 'odd'"):
        prompt_of(str(tmp_path))
    (tmp_path / "search_r1.json").write_text('{"prompt": "My own: {question}"}')
    assert prompt_of(str(tmp_path)) == "My own: {question}"
    assert prompt_of("Qwen/x") == PROMPT


def test_dropout_is_refused():
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(TINY), LoraConfig(lora_dropout=0.1, target_modules="all-linear")
    )
    with pytest.raises(ValueError, match="dropout"):
        Policy(model, AutoTokenizer.from_pretrained(TINY))


# -- every kind of adapter is followed exactly, or refused by name


def adapted(config, *, quantize=False, where=None):
    """A tiny Qwen under an adapter of PEFT's that does something."""
    from peft import get_peft_model

    model = load_policy(TINY, quantize=quantize, lora=False).model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(model, config)
    torch.manual_seed(0)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn_like(p) * 0.05)
    if where:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save_pretrained(str(where), save_embedding_layers=False)
    return model


EXACT = {
    "lora": dict(target_modules="all-linear"),
    "dora": dict(target_modules="all-linear", use_dora=True),
    "rslora": dict(target_modules="all-linear", use_rslora=True),
    "patterns": dict(target_modules="all-linear", rank_pattern={"q_proj": 3}, alpha_pattern={"v_proj": 40}),
    "subset": dict(target_modules=["q_proj", "down_proj"], layers_to_transform=[0, 2]),
    "a norm beside it": dict(target_modules=["q_proj"], modules_to_save=["norm", "input_layernorm"]),
    "dropout": dict(target_modules="all-linear", lora_dropout=0.5),
}


@pytest.mark.parametrize("quantize", [False, True], ids=["fp32", "nf4"])
@pytest.mark.parametrize("kind", EXACT)
def test_an_adapter_is_sampled_from_as_peft_computes_it(tmp_path, kind, quantize):
    from peft import LoraConfig

    model = adapted(LoraConfig(**EXACT[kind]), quantize=quantize, where=tmp_path).eval()  # without dropout
    policy = load_policy(TINY, adapter=tmp_path, quantize=quantize)
    row = policy.encode(policy.prompt_text("Where was the founder of Tonund Works born?"))
    with Decoder(policy, generator=torch.Generator().manual_seed(0)) as decoder:
        first = decoder.write([row], [], [4])[0]
        row += first.ids + policy.encode(" and then")
        then = decoder.write([row], [], [4])[0]
    start, row = len(row), row + then.ids
    with torch.no_grad():
        want = model(input_ids=torch.tensor([row])).logits.float().log_softmax(-1)[0]
    got = [want[start - 1 + i, token].item() for i, token in enumerate(then.ids)]
    assert then.logprobs == pytest.approx(got, abs=1e-4)
    with policy.reference():
        base = logits(policy.model, policy)
    assert (logits(policy.model, policy) - base).abs().max() > 0.1


def kinds_that_are_refused():
    import peft

    lora = lambda **how: peft.LoraConfig(**{"target_modules": ["q_proj"]} | how)
    return {
        "output layer": lora(target_modules=["q_proj", "lm_head"]),
        "embeddings": lora(target_modules=["q_proj", "embed_tokens"]),
        "embeddings or": lora(modules_to_save=["embed_tokens"]),
        "or the output": lora(modules_to_save=["lm_head"]),
        "trainable_token_indices": lora(trainable_token_indices=[1, 2]),
        "bias='all'": lora(bias="all"),
        "bias='lora_only'": lora(bias="lora_only"),
        "lora_bias": lora(lora_bias=True),
        "layer_replication": lora(layer_replication=[[0, 2], [1, 3]]),
        "target_parameters": lora(target_parameters=["k_proj.weight"]),
        "alora_invocation_tokens": lora(alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM"),
        "LOHA": peft.LoHaConfig(target_modules=["q_proj"]),
        "LOKR": peft.LoKrConfig(target_modules=["q_proj"]),
        "IA3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "VERA": peft.VeraConfig(target_modules=["q_proj"]),
        "ADALORA": peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10),
        "OFT": peft.OFTConfig(target_modules=["q_proj"], oft_block_size=8, r=0),
        "PREFIX_TUNING": peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
        "PROMPT_TUNING": peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
        "P_TUNING": peft.PromptEncoderConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
        "TRAINABLE_TOKENS": peft.TrainableTokensConfig(token_indices=[1]),
        "LN_TUNING": peft.LNTuningConfig(task_type="CAUSAL_LM"),
    }


def test_what_a_rollout_cannot_follow_is_refused_by_name(policy, tmp_path):
    for name, config in kinds_that_are_refused().items():
        where = tmp_path / name
        with pytest.raises(ValueError, match=name):
            Policy(adapted(config, where=where), policy.tokenizer)
        with pytest.raises(ValueError, match=name):
            load_policy(TINY, quantize=False, adapter=where)


def test_one_adapter_at_a_time_and_not_a_merged_one(policy):
    from peft import LoraConfig, get_peft_model

    model = adapted(LoraConfig(target_modules=["q_proj"]))
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"]))
    Policy(model, policy.tokenizer)  # the other one is off
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="default, other"):
        Policy(model, policy.tokenizer)
    named = get_peft_model(load_policy(TINY, lora=False).model, LoraConfig(target_modules=["q_proj"]), "mine")
    with pytest.raises(ValueError, match="mine"):
        Policy(named, policy.tokenizer)
    merged = adapted(LoraConfig(target_modules=["q_proj"]))
    merged.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        Policy(merged, policy.tokenizer)


def test_dropout_is_refused_only_where_something_is_trained(policy, tmp_path):
    from peft import LoraConfig, PeftModel

    adapted(LoraConfig(lora_dropout=0.5, target_modules="all-linear"), where=tmp_path)
    frozen = PeftModel.from_pretrained(load_policy(TINY, lora=False).model, str(tmp_path))
    loaded = Policy(frozen, policy.tokenizer), load_policy(TINY, adapter=tmp_path)
    for one in loaded:
        assert torch.equal(logits(one.model, policy), logits(one.model, policy))
    with pytest.raises(ValueError, match="lora_dropout"):
        Learner(loaded[1], Settings())


def test_what_the_learner_changes_is_what_an_adapter_holds(policy):
    one = load_policy(TINY, quantize=False)
    Learner(one, Settings())
    one.model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="model.norm.weight"):
        Learner(one, Settings())
    whole = Policy(load_policy(TINY, quantize=False, lora=False).model.requires_grad_(True), policy.tokenizer)
    with pytest.raises(ValueError, match="adapter"):
        Learner(whole, Settings())


def test_a_broken_adapter_is_named(tmp_path, policy):
    from safetensors.torch import load_file, save_file

    def spoilt(name, change):
        folder = tmp_path / name
        policy.save_adapter(folder)
        change(folder)
        return folder

    weights, config = "adapter_model.safetensors", "adapter_config.json"
    half = lambda f: save_file(dict(list(load_file(f / weights).items())[::2]), f / weights)
    for name, change, error, message in (
        ("none", lambda f: (f / weights).unlink(), FileNotFoundError, "none: adapter_model.safetensors is missing"),
        ("empty", lambda f: (f / weights).write_bytes(b""), ValueError, "empty/adapter_model.safetensors is broken"),
        ("cut", lambda f: os.truncate(f / weights, 5000), ValueError, "cut/adapter_model.safetensors is broken"),
        ("half", half, ValueError, "half/adapter_model.safetensors does not fit this model: .*lora_"),
        ("letters", lambda f: (f / config).write_text("{"), ValueError, "letters/adapter_config.json"),
        ("list", lambda f: (f / config).write_text("[]"), ValueError, "list cannot be put"),
        ("kind", lambda f: (f / config).write_text('{"peft_type": "NEW"}'), ValueError, "kind cannot be put .*NEW"),
        ("odd", lambda f: (f / config).write_text('{"peft_type": "LORA", "r": "x"}'), ValueError, "odd cannot be put"),
    ):
        with pytest.raises(error, match=message):
            load_policy(TINY, adapter=spoilt(name, change))


@pytest.mark.parametrize(
    "wrong",
    [
        dict(lora_r=0),
        dict(lora_r=True),
        dict(lora_r=2.5),
        dict(lora_alpha=0),
        dict(lora_alpha=float("nan")),
        dict(seed=None),
        dict(seed=-1),
        dict(seed=2**70),
        dict(dtype="float8"),
    ],
)
def test_numbers_are_checked_before_anything_is_loaded(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        load_policy("data/none", **wrong)


def test_a_tokenizer_that_loses_text_is_refused(policy):
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {"<unk>": 0, "\u2581": 1} | {chr(i + 32): i for i in range(2, 2304)}
    pieces = Tokenizer(models.BPE(letters, [], unk_token="<unk>"))
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    small = Tokenizer.from_str(policy.tokenizer.backend_tokenizer.to_str())
    small.normalizer = normalizers.Sequence([small.normalizer, normalizers.Lowercase(), normalizers.Strip()])
    for backend, end in ((pieces, "<unk>"), (small, "<|endoftext|>")):
        lossy = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end)
        with pytest.raises(ValueError, match="does not give text back"):
            Policy(load_policy(TINY, lora=False).model, lossy)
