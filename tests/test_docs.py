"""The documentation: links lead somewhere, code runs and prints what it says."""

import contextlib
import io
import json
import re
from pathlib import Path
from unittest import mock

import pytest
import yaml
from helpers.installed import CHECKOUT

from sb3_vpg.estimators import ESTIMATORS

DOCS = sorted((CHECKOUT / "docs").rglob("*.md"))
NOTEBOOKS = sorted((CHECKOUT / "docs" / "course").glob("*.ipynb"))
PAGES = [CHECKOUT / "README.md", CHECKOUT / "CHANGELOG.md", CHECKOUT / "CONTRIBUTING.md", *DOCS, *NOTEBOOKS]
FENCE = re.compile(r"^(`{3,})([^\n`]*)\n(.*?)^\1$", re.MULTILINE | re.DOTALL)
PYTHON = re.compile(r"^```python\n(.*?)^```$(?:\n+```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)
#: A number and its interval
ESTIMATE = re.compile(r"-?[\d.]+ \[-?[\d.]+, -?[\d.]+\]")
# Commands and scripts, run by test_tuning.py and test_torchrun.py
RUN_ELSEWHERE = {CHECKOUT / "docs" / "tuning.md", CHECKOUT / "docs" / "distributed.md"}


def name_of(page: Path) -> str:
    return page.relative_to(CHECKOUT).as_posix()


def text_of(page: Path) -> str:
    """The text of a page; of a notebook, the text of its Markdown cells."""
    if page.suffix != ".ipynb":
        return page.read_text()
    cells = json.loads(page.read_text())["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def links_in(page: Path) -> list[str]:
    """Targets of links and images that are not elsewhere on the web."""
    prose = re.sub(r"`[^`\n]+`", "", FENCE.sub("", text_of(page)))
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", prose) if not re.match(r"https?:", link)]


def anchors_in(page: Path) -> set[str]:
    """As GitHub makes them, and MyST."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_headings_that_exist(page: Path):
    for link in links_in(page):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_in(target), link


def test_links_are_found():
    links = {name_of(page): links_in(page) for page in PAGES}
    assert "docs/performance.md#until-it-is-solved" in links["README.md"]
    assert "swingup.gif" in links["docs/swingup.md"]
    assert "until-it-is-solved" in anchors_in(CHECKOUT / "docs" / "performance.md")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_tests_that_a_page_names_exist(page: Path):
    files = {path.relative_to(CHECKOUT).as_posix(): path.read_text() for path in (CHECKOUT / "tests").rglob("test_*.py")}
    # As in `test_faults.py::test_an_exception_in_a_step_...`, or with the folder, or without the file
    for folder, name, test, more in re.findall(r"`(tests/(?:\w+/)*)?(\w+\.py)?(?:::)?(test_\w+)?(\.\.\.)?`", text_of(page)):
        if test or name.startswith("test_"):
            where = [text for file, text in files.items() if file.endswith(f"{folder}{name}" if folder else f"/{name}")]
            assert where or not name, f"{folder}{name}"
            definition = f"def {test}" if more else f"def {test}("
            assert not test or any(definition in text for text in where or files.values()), f"{folder}{name}::{test}"


@pytest.mark.parametrize("code", [code for code, _ in PYTHON.findall(PAGES[0].read_text())])
def test_the_code_in_the_readme_compiles(code: str):
    compile(code, "README.md", "exec")


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in DOCS if PYTHON.search(page.read_text()) and page not in RUN_ELSEWHERE], ids=name_of
)
def test_the_code_of_a_page_runs_and_prints_what_it_says(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # A page may save a model
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    # A page may add an estimator
    with mock.patch.dict(ESTIMATORS):
        for block in PYTHON.finditer(text := page.read_text()):
            # Errors name the line of the page
            code = "\n" * text[: block.start(1)].count("\n") + block[1]
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(compile(code, page, "exec"), namespace)
            assert output.getvalue() == (block[2] or "")


def test_the_estimates_that_notebooks_quote_are_those_of_the_results():
    quoted = {estimate for page in NOTEBOOKS for estimate in ESTIMATE.findall(text_of(page))}
    assert quoted
    assert quoted <= set(ESTIMATE.findall((CHECKOUT / "docs" / "results.md").read_text()))


def test_the_citation_has_the_version_of_the_package():
    version = re.search(r'^version = "(.+?)(\.dev\d+)?"$', (CHECKOUT / "pyproject.toml").read_text(), re.MULTILINE)
    assert yaml.safe_load((CHECKOUT / "CITATION.cff").read_text())["version"] == version[1]
