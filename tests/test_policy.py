"""Loading: real NF4 and LoRA, any Qwen-shaped folder, and clear errors before anything slow happens."""

import json
import shutil

import pytest
import torch

from searchr1_lib.environment.protocol import PROMPT, SHORT_PROMPT
from searchr1_lib.files import write_json
from searchr1_lib.training.policy import Policy, check_model_folder, export_merged, load_policy, prompt_of, token_bytes

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
    ids = torch.tensor([policy.encode("Where was Sito Junick born?")])
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
    ids = torch.tensor([policy.encode(policy.prompt_text("Where was Sito Junick born?"))])
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
    assert text.startswith("<|im_start|>system\nYou are Qwen") and text.endswith("<|im_start|>assistant\n")
    assert text.count("<|im_end|>") == 2 and policy.prompt == SHORT_PROMPT


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
