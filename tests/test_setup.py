"""The set-up agrees with itself: pyproject.toml, constraints.txt, environment.yml, profiles."""

import ast
import functools
import json
import operator
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import searchr1_lib
from searchr1_lib import suite

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CONDA_NAMES = {"torch": "pytorch"}  # where conda-forge has another name than PyPI


def split(requirement: str) -> tuple[str, str]:
    """("torch", ">=2.8,<3") from "torch>=2.8,<3"."""
    name, bounds = re.fullmatch(r"([A-Za-z0-9_.-]+?)\s*([<>=!~].*)?", requirement).groups()
    return name.lower().replace("_", "-"), bounds or ""


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(split(line) for line in lines if line and not line.startswith("#"))


def test_environment_yml_is_in_step_with_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert environment["channels"] == ["conda-forge", "nodefaults"]
    conda = dict(split(line) for line in environment["dependencies"] if isinstance(line, str))
    (pip,) = (entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert pip[-1] == "-e ."
    found = {**conda, **dict(split(line) for line in pip[:-1])}
    assert found.pop("python") and found.pop("pip") == ""
    wanted = dict(split(line) for line in PROJECT["dependencies"])
    assert found == {CONDA_NAMES.get(name, name): bounds for name, bounds in wanted.items()}


def test_constraints_pin_every_direct_dependency_within_its_range():
    from packaging.specifiers import SpecifierSet

    direct = PROJECT["dependencies"] + functools.reduce(operator.iadd, PROJECT["optional-dependencies"].values(), [])
    found = pins()
    for name, bounds in map(split, direct):
        assert name in found, f"{name} is not pinned"
        assert found[name].removeprefix("==") in SpecifierSet(bounds), name
    assert found["torch"] == "==2.13.0"


def test_constraints_are_exact_and_free_of_places():
    for name, pin in pins().items():
        assert re.fullmatch(r"==[0-9][0-9a-z.]*", pin), f"{name}{pin}"


def test_the_lower_bounds_have_what_is_used():
    from packaging.specifiers import SpecifierSet

    assert "3.10" not in SpecifierSet(PROJECT["requires-python"])  # no tomllib
    bounds = dict(split(line) for line in PROJECT["dependencies"])
    assert "5.2.0" not in SpecifierSet(bounds["sentence-transformers"])  # no get_embedding_dimension


def test_dependencies_are_ranges_not_pins():
    assert not [d for d in PROJECT["dependencies"] if "==" in d]


def test_settings_are_checked_without_torch():
    code = "import sys, searchr1_lib.suite.sweep as s; s.load_profile('cpu'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("name", searchr1_lib.__all__)
def test_public_name_resolves_to_what_bears_it(name):
    assert getattr(searchr1_lib, name).__name__ == name
    assert name in dir(searchr1_lib)


def test_unknown_public_name():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = searchr1_lib.nonsense


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks" / "profiles").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_profile_holds_only_what_differs_from_the_defaults(path):
    usual, values = suite.Profile(), yaml.safe_load(path.read_text(encoding="utf-8"))
    assert suite.load_profile(path.stem).profile == path.stem
    assert not [name for name, value in values.items() if getattr(usual, name) == value]


def test_every_parameter_says_what_it_is():
    assert not [name for name, field in suite.Profile.model_fields.items() if not field.description]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_parameters_cell_holds_profile_run_and_few_names_of_the_schema(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    (cell,) = (cell for cell in cells if "parameters" in cell["metadata"].get("tags", []))
    lines = ast.parse("".join(cell["source"])).body
    names = [ast.unparse(getattr(line, "target", None) or line.targets[0]) for line in lines]
    values = [ast.literal_eval(line.value) for line in lines]
    assert names[:2] == ["profile", "run"] and values == ["auto", ""] + [None] * (len(names) - 2)
    assert set(names) <= set(suite.Profile.model_fields) and 4 <= len(cell["source"]) <= 7


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_formula_has_lost_its_backslash(path):
    """A backslash that was taken for an escape leaves a control character, or an n-abla on a line of its own."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    assert not re.search(r"[\x00-\x08\x0b-\x1f]|^(abla|eq|rac|ext|heta|imes|au)\b", text, re.MULTILINE)
