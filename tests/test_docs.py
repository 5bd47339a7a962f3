"The site: every notebook has its place, the command line's page is its help, what is broken fails the build."

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from promptnb import cli, recipes

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def pages():
    "workflow/docs/pages.py as a module."
    spec = importlib.util.spec_from_file_location("pages", ROOT / "workflow" / "docs" / "pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def source(pages, tmp_path_factory):
    "The folder of pages, gathered."
    folder = tmp_path_factory.mktemp("docs") / "source"
    pages.gather(folder)
    return folder


def test_every_notebook_is_in_the_contents_but_the_templates(source):
    front = (source / "index.md").read_text()
    left = {p.stem for p in (ROOT / "nbs").glob("*.ipynb") if f"nbs/{p.stem}\n" not in front}
    assert not left
    assert all(f"nbs/papers/{slug}\n" in front for slug in recipes.PAPERS)


def test_the_command_lines_page_has_every_command_and_no_hidden_one(source):
    page = (source / "cli.md").read_text()
    shown = {name for name, (_, _, help) in cli.COMMANDS.items() if help}
    assert {line.split()[-1] for line in page.splitlines() if line.startswith("## promptnb ")} == shown
    assert "--scale" in page and "promptnb job" not in page


def test_every_module_has_a_page(source, pages):
    assert len(pages.modules()) > 40
    assert {p.stem for p in (source / "api").glob("*.md")} == set(pages.modules())


def test_the_first_page_shows_no_code_and_no_page_a_hidden_cell(source):
    def tags(name):
        cells = [c for c in json.loads((source / "nbs" / name).read_text())["cells"] if c["cell_type"] == "code"]
        return {"".join(c["source"]).partition("\n")[0]: c["metadata"].get("tags", []) for c in cells}

    assert all("remove-input" in t for t in tags("index.ipynb").values())
    of_a_guide = tags("own_lm.ipynb")
    assert "remove-cell" in of_a_guide.pop("#| hide") and not any(of_a_guide.values())


def sphinx(folder, builder="html", path=""):
    "Sphinx as the Makefile calls it, on folder/source into folder/<builder>. path: more modules to import."
    (line,) = re.findall(r"^SITE := \S+ (.*)$", (ROOT / "Makefile").read_text(), re.M)
    command = [sys.executable, *line.replace("_docs", str(folder)).split(), "-b", builder, str(folder / builder)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(path), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.fixture
def page(pages, tmp_path):
    "page(text): a site of one page, of this text, and of the reference of a module `bare`. Returns its folder."
    pytest.importorskip("sphinx", reason="pip install promptnb[docs]")

    def made(text, module='"A module."\n'):
        pages.write(tmp_path / "modules" / "bare.py", module)
        pages.write(tmp_path / "source" / "index.md", f"# A page\n\n{text}\n\n{pages.tree('Modules', ['bare'])}")
        pages.write(tmp_path / "source" / "bare.md", pages.reference("bare", "A module."))
        return tmp_path

    return made


def test_a_page_without_a_fault_is_built(page):
    folder = page("A [link](bare.md) and `code`.")
    for builder in ("html", "coverage"):
        p = sphinx(folder, builder, folder / "modules")
        assert p.returncode == 0, p.stderr[-3000:]
    assert (folder / "html" / "searchindex.js").exists()


@pytest.mark.parametrize("link", ["nowhere.ipynb", "nowhere.md", "bare.md#no-such-heading"])
def test_a_broken_link_fails_the_build(page, link):
    folder = page(f"A [link]({link}).")
    p = sphinx(folder, path=folder / "modules")
    assert p.returncode != 0 and link.rpartition("#")[2] in p.stderr, p.stderr[-3000:]


def test_a_missing_docstring_fails_the_build(page):
    folder = page("Text.", '"A module."\n\n\ndef speechless():\n    return 1\n')
    assert sphinx(folder, path=folder / "modules").returncode == 0
    p = sphinx(folder, "coverage", folder / "modules")
    assert p.returncode != 0 and "speechless" in p.stderr, p.stderr[-3000:]


@pytest.mark.long
def test_the_whole_site_builds(source):
    pytest.importorskip("sphinx", reason="pip install promptnb[docs]")
    for builder in ("html", "coverage"):
        p = sphinx(source.parent, builder)
        assert p.returncode == 0, p.stderr[-3000:]
    assert (source.parent / "html" / "searchindex.js").exists()
