"""The site: how pages are laid out for it. `make site` builds it with mkdocs, which the tests do not have."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
stage = runpy.run_path(str(ROOT / "docs" / "stage.py"))
linked = stage["linked"]


@pytest.mark.parametrize(
    ("link", "home", "suffix", "expected"),
    [
        ("notebooks/09_credit.ipynb", ".", "", "notebooks/09_credit.ipynb"),
        ("../README.md#the-notebooks", "notebooks", ".html", "../index.html#the-notebooks"),
        ("../docs/glossary.md#policy", "notebooks", ".html", "../docs/glossary.html#policy"),
        ("09_credit.ipynb", "notebooks", ".html", "09_credit.html"),
        ("docs/result.png", ".", "", "docs/result.png"),
        ("searchr1_lib/worlds/optimum.py", ".", "", "{repository}/blob/main/searchr1_lib/worlds/optimum.py"),
        ("https://example.org/a.md", "notebooks", ".html", "https://example.org/a.md"),
        ("#here", "docs", "", "#here"),
    ],
)
def test_links_lead_to_where_the_page_is(link, home, suffix, expected):
    home = Path() if home == "." else Path(home)
    assert linked(f"[x]({link})", home, suffix) == f"[x]({expected.format(repository=stage['REPOSITORY'])})"


def test_every_local_link_of_readme_and_docs_has_a_target():
    for file in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for path in re.findall(r"\]\(([^)#\s]+)", file.read_text(encoding="utf-8")):
            assert "://" in path or (file.parent / path).exists(), f"{file.name}: {path}"
