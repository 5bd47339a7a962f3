"The site: every notebook has its place, the command line's page is its help, what is broken fails the build."

import importlib.util
import shutil
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


def built(source, site, builder="html"):
    "Sphinx on the folder of pages, as the Makefile calls it."
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", str(ROOT / "workflow" / "docs")]
    command += ["-d", str(site.parent / "doctrees"), "-b", builder, str(source), str(site)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.long
def test_the_site_builds_and_a_broken_link_or_a_missing_docstring_fails_it(source, tmp_path):
    pytest.importorskip("sphinx", reason="pip install promptnb[docs]")
    p = built(source, tmp_path / "site")
    assert p.returncode == 0, p.stderr[-3000:]
    assert (tmp_path / "site" / "searchindex.js").exists()
    coverage = built(source, tmp_path / "coverage", "coverage")
    assert coverage.returncode == 0, coverage.stderr[-3000:]
    broken = shutil.copytree(source, tmp_path / "broken")
    (broken / "cli.md").write_text((broken / "cli.md").read_text() + "\n[nowhere](nowhere.ipynb)\n")
    p = built(broken, tmp_path / "site2")
    assert p.returncode != 0 and "nowhere.ipynb" in p.stderr
