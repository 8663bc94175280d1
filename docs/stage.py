"""Lays out README, docs, notebooks and a page for each module for mkdocs: `make site`, which then builds .site/html."""

import re
import shutil
from pathlib import Path

import nbformat
import yaml

ROOT = Path(__file__).resolve().parents[1]
STAGED = ROOT / ".site" / "src"
REPOSITORY = re.search(r'Repository = "(.+?)"', (ROOT / "pyproject.toml").read_text())[1]


def linked(text: str, home: Path, suffix: str) -> str:
    """A page's links as they are on the site: README is its index, code stands in the repository.

    Args:
        home: the folder of the page. suffix: what pages end with where mkdocs does not follow links, in notebooks.
    """

    def there(match: re.Match) -> str:
        path, anchor = match[1], match[2] or ""
        target = (ROOT / home / path).resolve()
        if "://" in path or not target.exists():
            return match[0]
        inside = target.relative_to(ROOT)
        if inside == Path("README.md"):
            inside, path = Path("index.md"), str(Path(*[".."] * len(home.parts), "index.md"))
        if inside.suffix in (".md", ".ipynb") and len(inside.parts) <= 2 and inside.name != "CONTRIBUTING.md":
            path = re.sub(r"\.(md|ipynb)$", suffix, path) if suffix else path
        elif inside.suffix not in (".png", ".svg"):
            path = f"{REPOSITORY}/blob/main/{inside.as_posix()}"
        return f"]({path}{anchor})"

    return re.sub(r"\]\(([^)#\s]+)(#[^)\s]*)?\)", there, text)


def stage() -> None:
    shutil.rmtree(STAGED, ignore_errors=True)
    for folder in ("docs", "notebooks", "api"):
        (STAGED / folder).mkdir(parents=True)
    (STAGED / "index.md").write_text(linked((ROOT / "README.md").read_text(), Path(), ""))
    for file in (ROOT / "docs").iterdir():
        if file.suffix == ".md":
            (STAGED / "docs" / file.name).write_text(linked(file.read_text(), Path("docs"), ""))
        elif file.suffix in (".png", ".svg", ".css"):
            shutil.copy(file, STAGED / "docs")
    for file in sorted((ROOT / "notebooks").glob("*.ipynb")):
        nb = nbformat.read(file, 4)
        for cell in nb.cells:
            if cell.cell_type == "markdown":
                cell.source = linked(cell.source, Path("notebooks"), ".html")
        nb.metadata.pop("widgets", None)  # their static HTML stands beside them
        for output in (output for cell in nb.cells if cell.cell_type == "code" for output in cell.outputs):
            if len(data := output.get("data", {})) > 1:
                data.pop("application/vnd.jupyter.widget-view+json", None)
        nbformat.write(nb, STAGED / "notebooks" / file.name)
    rooms: dict[str, list] = {}
    for file in sorted((ROOT / "searchr1_lib").rglob("*.py")):
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        if not file.stem.startswith("_"):
            (STAGED / "api" / f"{name}.md").write_text(f"# {name}\n\n::: {name}\n")
            rooms.setdefault(name.split(".")[1], []).append(f"api/{name}.md")
    library = [pages[0] if len(pages) == 1 else {room: pages} for room, pages in rooms.items()]
    nav = [
        {"Search-R1 for everyone": "index.md"},
        {"Notebooks": [f"notebooks/{file.name}" for file in sorted((STAGED / "notebooks").iterdir())]},
        {"Docs": [f"docs/{file.name}" for file in sorted((STAGED / "docs").glob("*.md"))]},
        {"Library": library},
    ]
    config = yaml.safe_load((ROOT / "docs" / "mkdocs.yml").read_text())
    (ROOT / ".site" / "mkdocs.yml").write_text(yaml.safe_dump(config | {"nav": nav}, sort_keys=False))


if __name__ == "__main__":
    stage()
