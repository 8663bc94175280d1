"""The layers of an older tiny Qwen under the embedding of another tokenizer, trained by the recipe of the warm start.

    git worktree add /tmp/former 37f576e
    python experiments/graft.py /tmp/former/data/tiny_qwen --out runs/grafted
    searchr1 warmstart --start runs/grafted --out runs/tiny_qwen

So the weights that ship began: their recipe.json says which.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from searchr1_lib.study.warmstart import Recipe, make_tokenizer, new_model, save, train
from searchr1_lib.worlds.almanac import build_world


def graft(old, old_tokenizer, recipe, tokenizer):
    """A model of the recipe's shape with the layers of the old one.

    A token that both know keeps its row; another's is the mean of its pieces' rows and noise of half their spread.
    """
    model, rows = new_model(recipe, tokenizer), old.get_input_embeddings().weight.detach()
    with torch.no_grad():
        new, noise = model.get_input_embeddings().weight, 0.5 * rows.std()
        for token, number in tokenizer.get_vocab().items():
            known = old_tokenizer.convert_tokens_to_ids(token)
            if known is not None:
                new[number] = rows[known]
            else:
                pieces = old_tokenizer.encode(tokenizer.decode([number]), add_special_tokens=False)
                new[number] = rows[pieces].mean(0) + noise * torch.randn(rows.shape[1])
    layers = {name: weight for name, weight in old.state_dict().items() if "layers" in name or "norm" in name}
    model.load_state_dict(layers, strict=False)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    recipe = Recipe()
    tokenizer = make_tokenizer(recipe, build_world(0).fresh_names)
    old, old_tokenizer = AutoModelForCausalLM.from_pretrained(args.old), AutoTokenizer.from_pretrained(args.old)
    save(args.out, graft(old, old_tokenizer, recipe, tokenizer), tokenizer, recipe, [])
    model, tokenizer, log = train(recipe, start=args.out)
    save(args.out, model, tokenizer, recipe, log)


if __name__ == "__main__":
    main()
