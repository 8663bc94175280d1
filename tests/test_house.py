"""The library as a house: how big it is, and which way its arrows run."""

import ast
import subprocess
import sys

import pytest
from code_lines import HOME, code_lines, files, functions, in_core, total

ROOT = HOME.parent
#: Code lines at most, see code_lines.py. The core should come down to 3,200 and the library to 8,000: what they have
#: now must not grow.
CORE, LIBRARY, FUNCTION = 4175, 12650, 60
#: A module imports from its own level and from those before it.
LEVELS = (
    {"records", "files", "data"},
    {"metrics"},
    {"environment"},
    {"search", "rewards", "worlds"},
    {"training"},
    {"study"},
    {"engines"},
    {"suite"},
)
#: They name the public names and run the command: from anywhere.
ENTRANCES = {"__init__", "__main__"}
SOURCES = {name: path.read_text(encoding="utf-8") for name, path in files().items()}


def level(room: str) -> int:
    return next(number for number, rooms in enumerate(LEVELS) if room in rooms)


def imports(name: str, source: str) -> set[str]:
    """What a file imports of the library, anywhere in it, as dotted names without the library's own."""
    package = ["searchr1_lib", *name.split("/")[:-1]]
    taken = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            taken |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            home = ".".join([*base, *filter(None, [node.module])])
            taken |= {f"{home}.{alias.name}" for alias in node.names}
    return {dotted.partition(".")[2] for dotted in taken if dotted.startswith("searchr1_lib.")}


def rooms(name: str) -> set[str]:
    """Which rooms a file imports from; names of the package itself, such as ``__version__``, are none."""
    known = set().union(*LEVELS)
    return {dotted.split(".")[0] for dotted in imports(name, SOURCES[name])} & known


def test_code_lines_leave_out_what_is_no_code():
    source = 'def f():\n    """Docstring\n\n    goes on."""\n\n    # why\n    return """a\n    b"""  # text\n'
    assert code_lines(source) == {1, 7, 8} and functions(source) == {"f (line 1)": 3}


def test_the_core_stays_small():
    lines = total(filter(in_core, files()))
    assert lines <= CORE


def test_the_library_stays_small():
    lines = total(files())
    assert lines <= LIBRARY


def test_no_function_is_long():
    sizes = {f"{name}: {function}": size for name in SOURCES for function, size in functions(SOURCES[name]).items()}
    assert {function: size for function, size in sizes.items() if size > FUNCTION} == {}


def test_every_kind_of_import_is_read():
    source = "from .. import data, __version__\nimport searchr1_lib.study.plots\nfrom .base import Reward\nimport os\n"
    later = "def f():\n    from searchr1_lib.suite import runs\n    from ..search.http import JsonClient"
    assert imports("rewards/judge", source + later) == {
        "data",
        "__version__",
        "study.plots",
        "rewards.base.Reward",
        "suite.runs",
        "search.http.JsonClient",
    }
    assert imports("files", "from .records import Question") == {"records.Question"}


@pytest.mark.parametrize("name", sorted(SOURCES.keys() - ENTRANCES))
def test_arrows_run_downward(name):
    room = name.split("/")[0]
    wrong = {other for other in rooms(name) if level(other) > level(room)}
    assert not wrong, f"searchr1_lib/{name}.py imports {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("name", sorted(filter(in_core, SOURCES)))
def test_the_core_is_enough(name):
    assert not rooms(name) & {"worlds", "study", "engines", "suite"}


@pytest.mark.parametrize(
    "module", ["searchr1_lib", "searchr1_lib.suite", "searchr1_lib.suite.cli", "searchr1_lib.records"]
)
def test_import_loads_nothing_heavy(module):
    code = (
        f"import sys, {module}\n"
        "heavy = {'torch', 'transformers', 'faiss', 'numpy', 'papermill', 'yaml'} & set(sys.modules)\n"
        "sys.exit(f'loaded {sorted(heavy)}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_there_is_one_command():
    """``searchr1 COMMAND``; the modules behind it are no commands of their own."""
    files = [path for folder in ("docs", "experiments") for path in (ROOT / folder).rglob("*.*")]
    texts = [ROOT / "Makefile", *ROOT.glob("*.md"), *(path for path in files if path.suffix in (".md", ".yaml"))]
    stale = [path for path in texts if "-m searchr1_lib." in path.read_text(encoding="utf-8")]
    assert [path.relative_to(ROOT).as_posix() for path in stale] == []
