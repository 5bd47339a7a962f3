"""The pages of the site, gathered in one folder: the notebooks, the files they link to, the command line, the library.

python workflow/docs/pages.py _docs/source
"""

import contextlib
import importlib
import io
import json
import pkgutil
import re
import shutil
import sys
from pathlib import Path

import promptnb
from promptnb import cli, recipes

ROOT = Path(__file__).resolve().parents[2]
GUIDES = "own own_tuner your_data own_lm cost clusters faults benchmarks explore"  # of these, those that are there
HIDDEN = ("_modidx", "__init__")


def write(path, text):
    "Write a page."
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def tree(caption, names):
    "A table of contents."
    return "\n".join(["```{toctree}", f":caption: {caption}", ":maxdepth: 1", "", *names, "```", ""])


def front(source):
    "The first page: the contents of the site."
    nbs = sorted(p.stem for p in (source / "nbs").glob("*.ipynb"))
    papers = [f"nbs/papers/{slug}" for slug in ("index", *recipes.PAPERS)]
    guides = [f"nbs/{name}" for name in GUIDES.split() if name in nbs]
    library = [f"nbs/{name}" for name in nbs if re.match(r"\d\d", name)]
    parts = [("Start", ["nbs/index"]), ("The five papers, and a grid", papers), ("Guides", guides)]
    parts += [("The library", library), ("Reference", ["cli", "api"])]
    return "# promptnb\n\n" + "\n".join(tree(caption, names) for caption, names in parts)


def help_of(*words):
    "What `promptnb ... --help` prints, 100 characters wide."
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        cli.parser().parse_args([*words, "--help"])
    return out.getvalue().rstrip()


def command_line():
    "The page of the command line, made of its help."
    shown = {name: help for name, (_, _, help) in cli.COMMANDS.items() if help}
    lines = ["# Command line", "", "```text", help_of(), "```", ""]
    for name, help in shown.items():
        lines += [f"## promptnb {name}", "", f"{help[0].upper()}{help[1:]}.", "", "```text", help_of(name), "```", ""]
    return "\n".join(lines)


def modules():
    "The modules of the library, in order of their names."
    found = [m.name for m in pkgutil.walk_packages(promptnb.__path__, "promptnb.")]
    return sorted(name for name in found if name.rpartition(".")[2] not in HIDDEN)


def reference(name, first):
    "The reference of one module: what is said first, then its docstrings."
    lines = [f"# {name}", "", first, "", "```{eval-rst}", f".. automodule:: {name}", "   :members:"]
    return "\n".join([*lines, "   :member-order: bysource", "```", ""])


def module_page(name):
    "The page of a module of the library, which begins as its notebook does."
    first = (importlib.import_module(name).__doc__ or "").strip()
    return reference(name, re.sub(r"\]\((\w[^):]*\.ipynb)", r"](../nbs/\1", first))


def tag(path, hidden):
    "Let a notebook's page leave out its cells marked `#| hide` and, if `hidden`, the code of the others."
    nb = json.loads(path.read_text())
    for cell in nb["cells"]:
        if cell["cell_type"] == "code":
            left_out = ["remove-cell"] if "".join(cell["source"]).startswith("#| hide") else ["remove-input"] * hidden
            cell["metadata"].setdefault("tags", []).extend(left_out)
    path.write_text(json.dumps(nb))


def gather(source):
    "Fill the folder."
    shutil.rmtree(source, ignore_errors=True)
    for name in ("nbs", "figures", "tests"):
        left = shutil.ignore_patterns(".ipynb_checkpoints", "yours", "__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=left)
    for path in (source / "nbs").rglob("*.ipynb"):
        tag(path, hidden=path.name == "index.ipynb")  # the first page shows what its code says, as README.md does
    write(source / "index.md", front(source))
    write(source / "cli.md", command_line())
    for name in modules():
        write(source / "api" / f"{name}.md", module_page(name))
    write(source / "api.md", "# Library\n\nFrom the docstrings.\n\n" + tree("Modules", [f"api/{m}" for m in modules()]))


if __name__ == "__main__":
    gather(Path(sys.argv[1]))
