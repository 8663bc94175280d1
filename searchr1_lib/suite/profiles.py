"""Profiles: every parameter of every notebook, with its default, type, range and meaning, in one place.

A profile is a file ``notebooks/profiles/NAME.yaml`` with what differs from the defaults here. A notebook's parameters
cell holds ``profile``, ``run`` and the few names that its reader changes; ``parameters``, in the cell after it, takes
the rest from the profile, and any other name from papermill. An explicit value, typed into the cell or injected by
papermill, beats the profile. So a notebook opened by hand, one under papermill and one under nbmake agree.
"""

from __future__ import annotations

import ast
import os
import re
import sys
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, model_validator

from .. import suite
from ..environment.limits import Amount, Count, Whole
from ..training.settings import Settings

#: Which of the parameters below change only what a reader is shown: they may differ within a run.
SHOWN = ("query", "others", "runs")


class Profile(Settings, use_attribute_docstrings=True):
    """All parameters of the notebooks: those of a training (``Settings``) and these. The defaults are for a CPU.

    Raises:
        ValueError: as ``Settings``, or a reward that cannot be built.
    """

    profile: str = "auto"
    """smoke, cpu, t4, gpu, or auto: what suits this machine"""
    run: str = ""
    """name of the folder under runs/ (or under SEARCHR1_RUNS); "": the profile's name"""
    model: str = "data/tiny_qwen"
    """folder of the model, or its name on the hub"""
    data: str = "data/almanac"
    """folder with passages.jsonl and train, validation and test.jsonl"""
    reward: str | dict[str, Any] | list = "Discounted"
    """any reward of the library, as ``rewards.build`` reads it, such as SearchR1Reward or {OTC: {c: 3}}"""
    search_cost: Amount = 0.3
    """price of a search: the share of a right answer's reward that it takes, or what it takes off; for each reward with
    an argument ``price`` or ``cost``"""
    eval_questions: Count = 120
    """of the test split, before and after training"""
    loop_steps: Count = 5
    """steps of 05's plain loop, and of the ``Trainer`` that it is held against"""
    collapse_steps: Whole = 8
    """steps that 05 trains at five times the learning rate, to show a collapse; 0: none"""
    query: str = ""
    """01: a query of your own to begin with; "": one of the questions"""
    encoder: str = "sentence-transformers/all-MiniLM-L6-v2"
    """of 01's dense index and the semantic reward in 03 and A4, any sentence-transformers name; "": 03 goes without"""
    dense_passages: Count = 1000
    """passages on which 01 compares the engines; each is encoded"""
    ann_vectors: int = Field(20000, ge=100)
    """vectors on which A2 compares Flat, HNSW and IVF-PQ"""
    near_duplicates: Whole = 0
    """passages about namesakes that 01 adds to the corpus for every entity of the almanac"""
    demo_model: str = "data/tiny_qwen"
    """what 00 shows before training"""
    demo_adapter: str = "data/tiny_qwen_grpo"
    """what training added to it (LoRA, in PEFT's format); "": 00 trains it first"""
    demo_steps: Count = 12
    """steps of each training in 00"""
    demo_learning_rate: float = Field(1.5e-3, gt=0, lt=1)
    """of these trainings"""
    demo_questions: Count = 120
    """of the test split, in each exam of 00"""
    tiny_model: str = "data/tiny_qwen"
    """the small model, whatever the profile: A4 trains it on rewards that are hacked, A1 examines it"""
    hack_steps: Whole = 8
    """steps that A4 trains on each of these rewards; 0: none"""
    judge_url: str = ""
    """03, 12: OpenAI-compatible endpoint of a judge, as http://127.0.0.1:8000/v1; "": none"""
    judge_model: str = ""
    """its model's name"""
    others: str = ""
    """06: pattern of further runs beside this one, drawn as seeds; "": what `make seeds` left"""
    noise_questions: Count = 128
    """questions whose gradients A6 compares"""
    microscope_questions: Count = 12
    """questions that 09 puts under the microscope, each in three groups"""
    feedback_questions: Count = 240
    """questions whose rollouts are compared in 12"""
    runs: str = ""
    """08: any further runs, a pattern of their folders, such as runs/my-*"""
    almanac: str = "data/almanac"
    """folder of the almanac, whatever the profile: for A1"""
    warm_steps: Count = 24
    """steps of the warm start that A1 tries out"""
    warm_questions: Count = 100
    """of each kind and level, on which A1 examines the tiny Qwen"""

    @model_validator(mode="before")
    @classmethod
    def _schedule(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Where nobody says: exploration in the first third of the steps, and in the others a falling rate."""
        steps = values.get("steps", cls.model_fields["steps"].default)
        thirds = {"explore_steps": steps // 3, "decay_steps": 2 * steps // 3} if isinstance(steps, int) else {}
        return thirds | values

    @model_validator(mode="after")
    def _buildable(self):
        self.make_reward()
        return self

    @property
    def values(self) -> dict[str, Any]:
        """All parameters but the names of the profile and of the run."""
        return self.model_dump(exclude={"profile", "run"})

    @property
    def run_dir(self) -> Path:
        """The run's folder, relative to the repository's root, so that no output shows a path of one machine."""
        return folder_of(self.run or self.profile)

    def settings(self, **others: Any) -> Settings:
        """The part that a ``Trainer`` takes, with other values where given."""
        return Settings(**{name: getattr(self, name) for name in Settings.model_fields} | others)

    def make_reward(self):
        """The reward of this profile; where none is given, its ``price`` or ``cost`` is ``search_cost``."""
        from ..rewards import build

        return build(self.reward, price=self.search_cost, cost=self.search_cost)


class Yaml(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as people write it, and a name that stands twice is an error."""

    def construct_mapping(self, node, deep=False):
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if key.value in lines:
                twice = f"{key.value!r} stands in line {lines[key.value]} already"
                raise yaml.MarkedYAMLError(problem=twice, problem_mark=key.start_mark)
            lines[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


Yaml.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?e[-+]?\d+$", re.I), "-+0123456789")


def read_yaml(path: Path) -> tuple[Any, yaml.Node | None]:
    """A YAML file's value, and its root, which knows the lines.

    Raises:
        ValueError: the file cannot be read or is not YAML; names it, and the line.
    """
    try:
        loader = Yaml(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        return loader.construct_document(node) if node else None, node
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"{shown(path)} cannot be read: {e}") from None
    except (yaml.YAMLError, RecursionError) as e:
        mark, what = getattr(e, "problem_mark", None), getattr(e, "problem", None) or e
        raise ValueError(f"{shown(path)}, line {mark.line + 1 if mark else 1}: not YAML: {what}") from None


def load_profile(name: str, **given: Any) -> Profile:
    """A profile, with other values where ``given``, all checked.

    Raises:
        ValueError: there is no such profile (names the known ones); its file holds no lines 'name: value'; a name
            that no notebook knows, or a value that cannot be; names the file or the parameter.
    """
    path = suite.ROOT / "notebooks" / "profiles" / f"{name}.yaml"
    if name not in (known := sorted(p.stem for p in path.parent.glob("*.yaml"))):
        choices = f"choose auto or one of {', '.join(known)}, or write {shown(path)}"
        raise ValueError(f"profile = {name!r} is unknown: {choices}")
    values = read_yaml(path)[0] or {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{shown(path)} must hold lines 'name: value'")
    try:
        Profile(**values)
    except ValueError as e:
        raise ValueError(f"{shown(path)}: {e}") from None
    return Profile(**values | given | {"profile": name})


def resolve_profile(name: str = "auto") -> tuple[str, str]:
    """The profile that a name stands for, and why, in words.

    "auto" is the environment variable SEARCHR1_PROFILE if set; else "gpu" with a CUDA device of at least 40 GB
    (10^9 bytes), "t4" with a smaller one, and "cpu" without any. Any other name stands for itself.
    """
    if name != "auto":
        return name, "chosen here"
    if chosen := os.environ.get("SEARCHR1_PROFILE"):
        return chosen, "chosen by SEARCHR1_PROFILE"
    import torch

    if not torch.cuda.is_available():
        return "cpu", "no CUDA device found"
    device = torch.cuda.get_device_properties(0)
    memory = device.total_memory / 1e9
    return ("gpu" if memory >= 40 else "t4"), f"{device.name} with {memory:.0f} GB found"


def read_given(pairs: list[str]) -> dict[str, Any]:
    """Read ``name=value`` texts as YAML; a text stays as it is where the parameter is one.

    Raises:
        ValueError: not of that form, or a name that is written otherwise. ``load_profile`` checks the rest.
    """
    given = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"-p {pair}: write it as name=value")
        if name in ("profile", "run"):
            raise ValueError(f"-p {pair}: write it as --{name} {text}")
        field = Profile.model_fields.get(name)
        try:
            given[name] = text if field and field.annotation is str else yaml.load(text, Yaml)
        except yaml.YAMLError:
            raise ValueError(f"-p {pair}: the value is not YAML") from None
    return given


def shown(path: Path) -> str:
    """A path as messages give it: within the repository relative to its root."""
    return os.path.relpath(path, suite.ROOT) if path.is_absolute() and path.is_relative_to(suite.ROOT) else str(path)


def folder_of(run: str) -> Path:
    """The folder of a run, relative to the repository's root."""
    if not re.fullmatch(r"\w[\w.-]*", run):
        raise ValueError(f"run = {run!r} must be a plain folder name: letters, digits, '_', '-', '.'")
    return Path(os.environ.get("SEARCHR1_RUNS", "runs")) / run


def parameters(profile: str, run: str = "", **cell: Any) -> Profile:
    """Settle a notebook's parameters; called in the cell after the parameters cell.

        p = suite.parameters(profile, run, steps=steps)
        p.profile, p.run_dir, p.steps, p.learning_rate, p.settings(), p.limits(), p.make_reward()

    Changes into the repository's root, so that paths agree wherever the kernel was started; makes the run's folder
    and its manifest, or takes the parameters of the run that stands there; prints the profile, why it was chosen, and
    the values that matter here: those of the cell, and what differs from the profile.

    Args:
        profile: a profile's name or "auto", see ``resolve_profile``.
        run: the name of the run's folder under ``runs/`` (or under SEARCHR1_RUNS); "" is the profile's name.
        cell: every other name of the parameters cell with its value, None for "as the run or else the profile says".
            Names that papermill injected need not be among them.

    Raises:
        ValueError: an unknown profile or name, a value that cannot be, or the folder of another run (``open_run``).
    """
    from .runs import open_run

    os.chdir(suite.ROOT)
    name, why = resolve_profile(profile)
    plain = load_profile(name).values
    explicit = {key: value for key, value in cell.items() if value is not None} | _injected()
    p = open_run(folder_of(run or name), name, explicit, working=True)
    print(f"profile {name} ({why}); the run's folder is {p.run_dir}")
    for key in {**cell, **explicit, **{k: v for k, v in p.values.items() if v != plain[k]}}:
        value, usual = p.values[key], plain[key]
        print(f"  {key:<24} {value!r}" + (f"  (the profile says {usual!r})" if value != usual else ""))
    print(f"  all else: notebooks/profiles/{name}.yaml, and where that is silent searchr1_lib/suite/profiles.py")
    return p


def _injected() -> dict[str, Any]:
    """What papermill set in this kernel (its cell opens with "# Parameters"); nothing outside of a kernel."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    space = shell.user_ns if shell else {}
    trees = [ast.parse(source) for source in space.get("In", []) if source.startswith("# Parameters\n")]
    targets = [t for tree in trees for node in tree.body if isinstance(node, ast.Assign) for t in node.targets]
    names = map(ast.unparse, targets)
    return {name: space[name] for name in names if name not in ("profile", "run")}
