"What the project promises of its own files. Each check names what is wrong in a root, and is shown a broken copy too."

import ast
import base64
import configparser
import json
import os
import re
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

import nbformat
import pytest
import yaml
from counts import write_counts

ROOT = Path(__file__).resolve().parent.parent
MB = 2**20
HIDDEN = (".ipynb_checkpoints", "__pycache__")

# ---- helpers


def run_python(code, cwd):
    "Run Python code in a fresh process and return what it prints; a failure shows what it said."
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}  # nbdev exports nothing under it
    p = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert p.returncode == 0, p.stdout[-2000:] + p.stderr[-4000:]
    return p.stdout


def ruff(*args, cwd):
    "What ruff says of a folder, a line each."
    p = subprocess.run([sys.executable, "-m", "ruff", *args], cwd=cwd, capture_output=True, text=True)
    return p.stdout.splitlines() if p.returncode else []


def copied(root, new, *names):
    "Copy files and folders to the folder `new`, without caches."
    for name in names:
        if (root / name).is_dir():
            shutil.copytree(root / name, new / name, ignore=shutil.ignore_patterns(*HIDDEN))
        elif (root / name).exists():
            shutil.copy(root / name, new / name)
    return Path(new)


def settings(root):
    "The section of settings.ini."
    c = configparser.ConfigParser(delimiters=["="])
    c.read(root / "settings.ini", encoding="utf-8")
    return c["DEFAULT"]


def relative(root, pattern):
    "Paths below the root, as text."
    return {str(p.relative_to(root)) for p in root.rglob(pattern) if not {*HIDDEN} & {*p.parts}}


def tracked(root):
    "The files that git tracks."
    files = subprocess.check_output(["git", "ls-files", "-z"], cwd=root, text=True).split("\0")
    return [root / f for f in files if f and (root / f).is_file()]


def notebooks(root):
    "{name: notebook} of all of nbs."
    return {n: json.loads((root / "nbs" / n).read_text("utf-8")) for n in sorted(relative(root / "nbs", "*.ipynb"))}


def papers(root):
    "The papers' notebooks among them."
    return {n: nb for n, nb in notebooks(root).items() if n.startswith("papers/")}


def code_cells(nb):
    "Sources of the code cells."
    return ["".join(c["source"]) for c in nb["cells"] if c["cell_type"] == "code"]


def modules(root):
    "{path: source} of the package, without nbdev's index."
    files = sorted("promptnb/" + m for m in relative(root / "promptnb", "*.py"))
    return {f: (root / f).read_text("utf-8") for f in files if not f.endswith("_modidx.py")}


def functions(source):
    "All function definitions of a module."
    return [n for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]


def length(node):
    "Lines of a definition."
    return node.end_lineno - node.lineno + 1


def called_import(node):
    "The name in importlib.import_module('name') or __import__('name')."
    if not isinstance(node, ast.Call) or not ast.unparse(node.func).endswith(("import_module", "__import__")):
        return []
    return [a.value for a in node.args[:1] if isinstance(a, ast.Constant)]


def is_lazy(node):
    "What stands here is not run at import: a function, or `if TYPE_CHECKING`."
    if isinstance(node, ast.If):
        return ast.unparse(node.test) == "TYPE_CHECKING"
    return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))


def imports(source, package=()):
    "(line, dotted name, inside a function?) of every import; relative ones are resolved against `package`."
    tree = ast.parse(source)
    inside = {id(n) for f in ast.walk(tree) if is_lazy(f) for n in ast.walk(f)}
    for n in ast.walk(tree):
        if isinstance(n, ast.Import):
            names = [a.name for a in n.names]
        elif isinstance(n, ast.ImportFrom):
            base = list(package[: len(package) - n.level + 1]) if n.level else []
            names = [".".join([*base, *filter(None, [n.module]), a.name]) for a in n.names]
        else:
            names = called_import(n)
        for name in names:
            yield n.lineno, name, id(n) in inside


# ---- who may import whom: the table of the design

# module: (ours that it may import, others that it never may, others not at module level)
EVERYTHING_OURS = "core plugins tasks data experts collect models captured train evaluate tuners llm online recipes"
LAYERS = {
    "__init__": ("bare plugins", "torch gymnasium", ""),
    "__main__": ("cli", "", ""),
    "bare": ("", "torch gymnasium", ""),
    "core": ("", "", "torch gymnasium"),
    "plugins": ("core", "torch gymnasium", ""),
    "tasks": ("core", "", "torch"),  # Atari's behaviour policies are networks: torch inside functions only
    "data": ("core tasks", "", ""),
    "experts": ("core tasks data", "", ""),
    "collect": ("core tasks data experts", "", ""),
    "models": ("core", "gymnasium minari", ""),
    "captured": ("core", "gymnasium", ""),
    "train": ("core captured", "gymnasium", ""),
    "evaluate": ("core tasks captured", "", ""),
    "predict": ("core tasks evaluate", "", ""),
    "tuners": ("core models train", "gymnasium minari", ""),
    "llm": ("core", "gymnasium", ""),
    "online": ("core tasks captured", "", ""),
    "recipes": ("", "everything", ""),
    "experiments": (EVERYTHING_OURS, "matplotlib", ""),
    # tasks: for the facts of a family, of which a result is stale when they change
    "report": ("core recipes tasks", "torch gymnasium", ""),
    "cli": (EVERYTHING_OURS + " experiments report", "", ""),
    "explore": (EVERYTHING_OURS + " evaluate experiments report", "", ""),
}
DRAWS = "promptnb/experiments/film.py"  # the one module of its wing that may


def forbidden(file, name, inside):
    "Does the table forbid this module this import?"
    module = file.removesuffix(".py").split("/")[1]
    may, never, late = map(str.split, LAYERS[module])
    top, ours = (name.split(".") + [""])[:2]
    if top == "promptnb":
        return ours in LAYERS and ours not in (module, *may)
    if file == DRAWS and top == "matplotlib":
        return False
    if never == ["everything"]:
        return top not in sys.stdlib_module_names
    return top in never or (top in late and not inside)


def layers(root):
    "Modules import only what the table above lets them."
    wrong = []
    for file, source in modules(root).items():
        parts = file.removesuffix(".py").split("/")
        if parts[1] not in LAYERS:
            wrong.append(f"{file}: no such module in the table of layers")
            continue
        wrong += [
            f"{file}:{line} imports {name}"
            for line, name, inside in imports(source, parts[:-1])
            if forbidden(file, name, inside)
        ]
    return wrong


def import_graph(root):
    "{module: modules of ours that it imports}, lazy imports included."
    sources = {f.removesuffix(".py").removesuffix("/__init__").replace("/", "."): f for f in modules(root)}
    graph = {}
    for module, file in sources.items():
        package = file.removesuffix(".py").split("/")[:-1]
        found = set()
        for _, name, _ in imports((root / file).read_text("utf-8"), package):
            while name and name not in sources:  # a name in a module, or a module
                name = name.rpartition(".")[0]
            # the bare package is `from promptnb import x` of something that is not a module
            found |= {name} - {"", module, "promptnb"}
        graph[module] = found
    return graph


def circles(root):
    "No module imports itself by way of others, lazy imports included."
    graph, done, path = import_graph(root), set(), []

    def visit(module):
        if module in path:
            return [" -> ".join([*path[path.index(module) :], module])]
        if module in done:
            return []
        path.append(module)
        wrong = [w for other in sorted(graph[module]) for w in visit(other)]
        path.pop()
        done.add(module)
        return wrong

    return [w for module in graph for w in visit(module)]


# ---- how code reads


def formatted(root):
    "ruff has nothing to format."
    return [w for w in ruff("format", "--check", ".", cwd=root) if "-->" in w]


def linted(root):
    "ruff has nothing to say: lines of at most 120 characters, no semicolons, no bound lambdas, no unused names."
    return ruff("check", "--output-format", "concise", ".", cwd=root)


def semicolons(root):
    "No cell ends in a semicolon, which ruff lets pass: what is not to be shown is assigned."
    cells = [(f, s) for f, nb in notebooks(root).items() for s in code_cells(nb)]
    return [f"nbs/{f} has a cell that ends in a semicolon" for f, s in cells if s.rstrip().endswith(";")]


def lengths(root):
    "Functions of the package: none over 60 lines, nine of ten at most 25, half of them at most 8."
    found = [(length(n), f, n.name) for f, source in modules(root).items() for n in functions(source)]
    wrong = [f"{f}: {name} has {k} lines" for k, f, name in found if k > 60]
    counts = sorted(k for k, _, _ in found)
    median, tenth = statistics.median(counts), counts[int(0.9 * len(counts))]
    return wrong + [f"functions have a median of {median} lines and a p90 of {tenth}"] * (median > 8 or tenth > 25)


def definitions(cell):
    "How many things an export cell defines; None for one of imports alone."
    body = ast.parse(cell).body
    if all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in body):
        return None
    return max(1, sum(isinstance(n, (ast.FunctionDef, ast.ClassDef)) for n in body))  # constants count as one


def one_definition(root):
    "An export cell defines one thing."
    cells = [(f, s) for f, nb in notebooks(root).items() for s in code_cells(nb) if s.startswith("#| export")]
    counts = [(f, s.splitlines()[1], definitions(s)) for f, s in cells]
    return [f"nbs/{f}: a cell defines {n} things: {first}" for f, first, n in counts if n and n > 1]


def what_it_extends(n):
    "The class that a function is patched into, as its first parameter is annotated; None without @patch."
    patched = any(ast.unparse(d).partition("(")[0] == "patch" for d in n.decorator_list)
    return ast.unparse((n.args.posonlyargs + n.args.args)[0].annotation) if patched else None


def one_meaning(root):
    "No function or class of a module is defined twice: the first would be dead, and a first test would never run."
    wrong, sources = [], dict(modules(root))
    sources |= {f"tests/{p.name}": p.read_text() for p in sorted((root / "tests").glob("*.py"))}
    for f, source in sources.items():
        named = [n for n in ast.parse(source).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
        counts = Counter((what_it_extends(n), n.name) for n in named)
        wrong += [f"{f} defines {name} {k} times" for (_, name), k in counts.items() if k > 1]
    return wrong


def public(source):
    "Public classes, functions and methods of a module."
    for n in ast.parse(source).body:
        members = n.body if isinstance(n, ast.ClassDef) else []
        for m in [n, *members]:
            if isinstance(m, (ast.FunctionDef, ast.ClassDef)) and not m.name.startswith("_"):
                yield m


def docstrings(root):
    "Nine of ten public functions and classes say what they are."
    found = [(f, n.name, bool(ast.get_docstring(n))) for f, s in modules(root).items() for n in public(s)]
    share = sum(has for _, _, has in found) / len(found)
    return [f"{f}: {name} has no docstring" for f, name, has in found if not has] if share < 0.9 else []


def asserted(root):
    "fastcore's expect_fail is a context manager: called with a function, it asserts nothing (test_fail does)."
    cells = [(f, s) for f, nb in notebooks(root).items() for s in code_cells(nb)]
    return [f"nbs/{f} calls expect_fail with a function" for f, s in cells if "expect_fail(lambda" in s]


# ---- what belongs together


def present(root):
    "What the README, the Makefile and the workflow name is there."
    need = "README.md LICENSE Makefile environment.yml workflow/Snakefile nbs/index.ipynb nbs/papers/run.ipynb"
    return [f"{f} is missing" for f in [*need.split(), "nbs/papers/prompt_tuning_dt.ipynb"] if not (root / f).exists()]


def readme(root):
    "README.md is nbs/index.ipynb."
    make = ["make", "-s", "readme-text", f"BIN={Path(sys.executable).parent}", "READY="]
    new = subprocess.run(make, cwd=root, capture_output=True, text=True).stdout
    same = new and (root / "README.md").exists() and new == (root / "README.md").read_text()
    return [] if same else ["README.md is not nbs/index.ipynb: run make readme"]


def links(root):
    "Every relative link of the README leads somewhere."
    found = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", (root / "README.md").read_text())
    return [f"README.md links to {f}, which is not there" for f in found if not (root / f).exists()]


def pins(root):
    "environment.yml pins what settings.ini requires, in the same order."
    s = settings(root)
    deps = yaml.safe_load((root / "environment.yml").read_text())["dependencies"]
    have = next(d["pip"] for d in deps if isinstance(d, dict))
    want = [*s["requirements"].split(), "-e ."]
    wrong = [] if f"python={s['min_python']}" in deps else [f"environment.yml: python is not {s['min_python']}"]
    pairs = zip(have + [None] * len(want), want)
    wrong += [f"environment.yml: {a} there, {b} in settings.ini" for a, b in pairs if a != b]
    return wrong + [f"environment.yml: {a} is too much" for a in have[len(want) :]]


def sync(root):
    "The modules are what the notebooks export, formatted."
    with tempfile.TemporaryDirectory() as tmp:
        new = copied(root, Path(tmp), "settings.ini", "setup.py", "ruff.toml", "nbs")
        run_python("from nbdev.doclinks import nbdev_export; nbdev_export()", new)
        ruff("format", "-q", "promptnb", cwd=new)
        a, b = modules(root), modules(new)
    return [f"{f} is not what the notebooks export: run make fix" for f in sorted({*a, *b}) if a.get(f) != b.get(f)]


def clean(root):
    "Notebooks are as `make fix` leaves them: as nbdev_clean writes them, with the counts of a run from top to bottom."
    with tempfile.TemporaryDirectory() as tmp:
        new = copied(root, Path(tmp), "settings.ini", "nbs")
        run_python("from nbdev.clean import nbdev_clean; nbdev_clean()", new)
        write_counts(new / "nbs")
        files = [n for n in notebooks(root) if (root / "nbs" / n).read_bytes() != (new / "nbs" / n).read_bytes()]
    return [f"nbs/{n} is not clean: run make fix" for n in files]


def unchanged_by_opening(root):
    "A notebook that is valid, and that Jupyter saves as it stands."
    wrong = []
    for f in notebooks(root):
        text = (root / "nbs" / f).read_text("utf-8")
        nb = nbformat.reads(text, 4)
        if nbformat.writes(nb) + "\n" != text or not nbformat.validator.isvalid(nb):
            wrong.append(f"nbs/{f} is not as Jupyter saves it")
    return wrong


WIDEST = 1040  # pixels of a picture: what a cell of JupyterLab has for it in a window of 1,280
STRAY = {  # what is in an output by accident
    "a warning": r"\w+Warning: ",
    "a traceback": r"Traceback \(most recent call last\)",
    "a progress bar": r"\d%\|.*\||\d(it/s|s/it)\b|\r",
    "a path of one machine": r"(?<![\w.~-])/(tmp|root|home|work|Users|private|var/folders)/\w",
}


def texts(output):
    "All text of an output of a cell."
    data = output.get("data", {})
    parts = [output.get("text", ""), *(data.get(f"text/{kind}", "") for kind in ("plain", "html", "markdown"))]
    return "\n".join("".join(part) for part in [*parts, output.get("traceback", [])])


def readable(root):
    "Outputs as committed fit the page, and hold nothing that is there by accident."
    wrong = []
    outputs = [
        (f"nbs/{f}, cell {c['id']}", output)
        for f, nb in notebooks(root).items()
        for c in nb["cells"]
        for output in c.get("outputs", ())
    ]
    for where, output in outputs:
        wrong += [f"{where} shows {what}" for what, how in STRAY.items() if re.search(how, texts(output))]
        wrong += [f"{where} is an error"] * (output["output_type"] == "error")
        png = base64.b64decode("".join(output.get("data", {}).get("image/png", "")))
        shown = output.get("metadata", {}).get("image/png", {}).get("width")
        width = shown or (struct.unpack(">I", png[16:20])[0] if png else 0)
        wrong += [f"{where} has a picture of {width} pixels, more than {WIDEST}"] * (width > WIDEST)
    return wrong


def tags(root):
    "Paper notebooks and the benchmarks, and no others, have one cell tagged `parameters`."
    wrong = []
    for f, nb in notebooks(root).items():
        n = sum("parameters" in c["metadata"].get("tags", []) for c in nb["cells"])
        if n != (f.startswith("papers/") or f == "benchmarks.ipynb"):
            wrong.append(f"nbs/{f} has {n} cells tagged parameters")
    return wrong


def render_only(root):
    "The papers' pages define nothing and import only recipes, report and what shows them."
    others = sys.stdlib_module_names | {"pandas", "matplotlib", "IPython"}
    wrong = []
    for f, nb in papers(root).items():
        if f == "papers/run.ipynb":
            continue
        source = "\n".join(re.sub(r"^[%!]", "#", s, flags=re.M) for s in code_cells(nb))
        defined = re.finditer(r"^[ \t]*(async +)?(def|class) .*", source, re.M)
        wrong += [f"nbs/{f} defines something: {m[0].strip()}" for m in defined]
        names = [n for _, n, _ in imports(source) if n.split(".")[0] not in others]
        wrong += [f"nbs/{f} imports {n}" for n in names if not re.match(r"promptnb\.(recipes|report)(\.|$)", n)]
    return wrong


def sizes(root):
    "No file over 2 MB, no notebook over 150 cells."
    files = {*tracked(root), *(root / "nbs").rglob("*.ipynb")}
    big = [(p.relative_to(root), p.stat().st_size / MB) for p in files]
    wrong = [f"{name} has {size:.1f} MB" for name, size in big if size > 2]
    return wrong + [f"nbs/{f} has {len(n['cells'])} cells" for f, n in notebooks(root).items() if len(n["cells"]) > 150]


def wheel(root):
    "The wheel holds every module."
    build = "import subprocess, sys; subprocess.run([sys.executable, *'-m pip wheel -q --no-deps"
    build += " --no-build-isolation -w dist .'.split()], check=True)"
    with tempfile.TemporaryDirectory() as tmp:
        new = copied(root, Path(tmp), "settings.ini", "setup.py", "promptnb")
        run_python(build, new)
        held = set(zipfile.ZipFile(next((new / "dist").glob("*.whl"))).namelist())
    return [f"{f} is not in the wheel" for f in modules(root) if f not in held]


def elsewhere(root):
    "No committed file names a folder of the machine it was written on."
    at = re.compile(rb"/(work|root)(?=/)")
    wrong = []
    for p in tracked(root):
        data = p.read_bytes()
        found = b"\0" not in data and at.search(data)
        if found:
            wrong.append(f"{p.relative_to(root)} names {found[0].decode()}/")
    return wrong


# ---- damage: how a copy is broken, and what the check must then say


def put(root, file, text):
    "Append to a file, new or not."
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    with open(root / file, "a") as f:
        f.write(text)


def put_notebook(root, name, *sources, **metadata):
    "Write a notebook of code cells that share their metadata."
    common = dict(cell_type="code", metadata=metadata, outputs=[], execution_count=None)
    cells = [dict(common, id=f"c{i}", source=[s]) for i, s in enumerate(sources)]
    nb = dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)
    put(root, f"nbs/{name}.ipynb", json.dumps(nb, sort_keys=True, indent=1) + "\n")


def put_output(root, **output):
    "Write a notebook of one cell with this output: text of a stream, where nothing else is said."
    output = dict(dict(output_type="stream", name="stdout"), **output)
    cell = dict(cell_type="code", id="c0", metadata={}, source=["1"], execution_count=1, outputs=[output])
    nb = dict(cells=[cell], metadata={}, nbformat=4, nbformat_minor=5)
    put(root, "nbs/98_x.ipynb", json.dumps(nb, sort_keys=True, indent=1) + "\n")


def put_picture(root, width):
    "A notebook with the beginning of a picture, which says how wide it is."
    png = base64.b64encode(b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", width, 9)).decode()
    put_output(root, output_type="display_data", metadata={}, data={"image/png": png})


def replace(root, file, old, new):
    "Replace text in a file, which must hold it."
    text = (root / file).read_text()
    assert old in text
    (root / file).write_text(text.replace(old, new))


def only_tiny_functions(root):
    "A package whose functions are all of 9 lines."
    shutil.rmtree(root / "promptnb")
    put(root, "promptnb/core.py", "def f():\n" + "    1\n" * 8)


LONG = "\ndef f():\n" + "    1\n" * 60
MANY = "#| export\n" + "def f():\n    pass\n\n\ndef g():\n    pass\n"
DAMAGE = [
    (
        layers,
        lambda r: put(r, "promptnb/train.py", "\ndef f(): from .models import dt\n"),
        "imports promptnb.models.dt",
    ),
    (layers, lambda r: put(r, "promptnb/other.py", ""), "promptnb/other.py: no such module"),
    (
        layers,
        lambda r: put(r, "promptnb/report/view.py", "\nimport promptnb.experiments.run\n"),
        "imports promptnb.exp",
    ),
    (layers, lambda r: put(r, "promptnb/experiments/run.py", "\nimport matplotlib\n"), "imports matplotlib"),
    (circles, lambda r: put(r, "promptnb/core.py", "\ndef f():\n    from . import train\n"), "core -> promptnb.train"),
    (formatted, lambda r: put(r, "promptnb/core.py", "\nx = [1,2]\n"), "promptnb/core.py"),
    (formatted, lambda r: put_notebook(r, "98_x", "x = [1,2]"), "98_x.ipynb"),
    (linted, lambda r: put(r, "promptnb/core.py", "\nimport re; f = lambda: 1\n"), "E702"),
    (linted, lambda r: put_notebook(r, "98_x", "x = 1  # " + "long " * 30), "E501"),
    (semicolons, lambda r: put_notebook(r, "98_x", "print(1);"), "nbs/98_x.ipynb has a cell that ends"),
    (lengths, lambda r: put(r, "promptnb/core.py", LONG), "f has 61 lines"),
    (lengths, only_tiny_functions, "a median of 9 lines"),
    (one_definition, lambda r: put_notebook(r, "98_x", MANY), "nbs/98_x.ipynb: a cell defines"),
    (one_meaning, lambda r: put(r, "promptnb/core.py", "\ndef f(): 1\n" * 2), "promptnb/core.py defines f 2 times"),
    (one_meaning, lambda r: put(r, "tests/test_x.py", "\ndef test(): 1\n" * 2), "tests/test_x.py defines test 2 times"),
    (
        docstrings,
        lambda r: put(r, "promptnb/core.py", "".join(f"\ndef f{i}(): 1\n" for i in range(900))),
        "f0 has no doc",
    ),
    (
        asserted,
        lambda r: put_notebook(r, "98_x", "expect_fail(" + "lambda: 1 / 0)"),
        "nbs/98_x.ipynb calls expect_fail",
    ),
    (present, lambda r: shutil.rmtree(r / "nbs"), "nbs/papers/run.ipynb is missing"),
    (links, lambda r: put(r, "README.md", "\n[x](nbs/nowhere.ipynb#there)\n"), "nbs/nowhere.ipynb, which is not there"),
    (pins, lambda r: put(r, "environment.yml", '      - "leftpad"\n'), "leftpad is too much"),
    (pins, lambda r: replace(r, "settings.ini", "nbdev==", "nbdev>"), "in settings.ini"),
    (sync, lambda r: put(r, "promptnb/core.py", "\nstale = 1\n"), "promptnb/core.py is not"),
    (sync, lambda r: (r / "promptnb/core.py").unlink(), "promptnb/core.py is not"),
    (sync, lambda r: put(r, "promptnb/extra.py", ""), "promptnb/extra.py is not"),
    (clean, lambda r: put_notebook(r, "98_x", "1", scrolled=True), "nbs/98_x.ipynb is not clean"),
    (clean, lambda r: replace(r, "nbs/00_core.ipynb", '"execution_count": 2,', '"execution_count": null,'), "00_core"),
    (unchanged_by_opening, lambda r: put(r, "nbs/98_x.ipynb", '{"cells": [], "metadata": {}}'), "98_x.ipynb is not"),
    (unchanged_by_opening, lambda r: put(r, "nbs/00_core.ipynb", "\n"), "00_core.ipynb is not as"),
    (readable, lambda r: put_output(r, text=["x.py:3: UserWarning: std()\n"]), "98_x.ipynb, cell c0 shows a warning"),
    (readable, lambda r: put_output(r, text=["Traceback (most recent call last):\n"]), "shows a traceback"),
    (readable, lambda r: put_output(r, text=["train:  40%|####      | 4/10\n"]), "shows a progress bar"),
    (
        readable,
        lambda r: put_output(r, text=["in " + "/".join(["", "tmp", "x9"]) + "\n"]),
        "shows a path of one machine",
    ),
    (readable, lambda r: put_output(r, output_type="error", ename="E", evalue="", traceback=[]), "is an error"),
    (readable, lambda r: put_picture(r, WIDEST + 1), "a picture of 1041 pixels"),
    (tags, lambda r: put_notebook(r, "98_x", "seed = 0", tags=["parameters"]), "nbs/98_x.ipynb has 1"),
    (tags, lambda r: put_notebook(r, "papers/x", "seed = 0"), "nbs/papers/x.ipynb has 0"),
    (tags, lambda r: put_notebook(r, "papers/x", "seed = 0", "scale = ''", tags=["parameters"]), "x.ipynb has 2"),
    (render_only, lambda r: put_notebook(r, "papers/x", "%time\ndef f(): pass"), "defines something: def f()"),
    (render_only, lambda r: put_notebook(r, "papers/x", "class A: pass"), "defines something: class A"),
    (render_only, lambda r: put_notebook(r, "papers/x", "from promptnb import report, cli"), "imports promptnb.cli"),
    (render_only, lambda r: put_notebook(r, "papers/x", "import torch.nn as nn"), "imports torch.nn"),
    (sizes, lambda r: put(r, "figures/x.svg", "x" * (2 * MB + 1)), "figures/x.svg has 2.0 MB"),
    (sizes, lambda r: put_notebook(r, "98_x", *["1"] * 151), "nbs/98_x.ipynb has 151 cells"),
    (wheel, lambda r: put(r, "promptnb/nowhere/a.py", ""), "promptnb/nowhere/a.py is not"),
    (elsewhere, lambda r: put(r, "a.txt", "see " + "/".join(["", "root", "x"])), "a.txt names"),
]
CHECKS = [*dict.fromkeys(check for check, _, _ in DAMAGE), readme]
COPIED = ("settings.ini", "setup.py", "environment.yml", "ruff.toml", "README.md", "nbs", "promptnb")


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_holds(check):
    wrong = check(ROOT)
    assert not wrong, "\n".join(["", *wrong[:50]])


@pytest.mark.fault(28)
@pytest.mark.parametrize("n", range(len(DAMAGE)), ids=lambda n: f"{DAMAGE[n][0].__name__}-{n}")
def test_can_fail(n, tmp_path):
    check, damage, says = DAMAGE[n]
    root = copied(ROOT, tmp_path, *COPIED)
    damage(root)
    subprocess.run("git init -q && git add -A", shell=True, cwd=root, check=True)
    assert any(says in w for w in check(root)), f"{check.__name__} did not see it"


@pytest.mark.parametrize(
    "module, source, ok",
    [
        ("data", "from . import tasks", True),
        ("data", "from .models.dt import Policy", False),
        ("data", "from promptnb import models", False),
        ("data", "import promptnb.tuners.core as c", False),
        ("data", "from importlib import import_module; import_module('promptnb.cli')", False),
        ("tasks/control", "from .. import tasks", True),
        ("tasks/control", "from ..data import load", False),
        ("tasks/control", "import torch", False),
        ("tasks/control", "def f():\n    import torch", True),
        ("tasks/__init__", "from . import control", True),
        ("tasks/__init__", "from ..core import Row", True),
        ("tasks/__init__", "from .. import cli", False),
        ("tuners/ranking", "from .core import Tuner", True),
        ("tuners/ranking", "from ..evaluate import rollout", False),
        ("core", "import torch.nn", False),
        ("core", "def f():\n    from torch import nn", True),
        ("core", "class A:\n    import torch", False),
        ("core", "if TYPE_CHECKING:\n    import torch", True),
        ("recipes", "import dataclasses", True),
        ("recipes", "import numpy as np", False),
        ("recipes", "from .core import Row", False),
        ("experiments/film", "import matplotlib", True),
        ("experiments/run", "from ..report import view", False),
        ("report/view", "def f():\n    from .. import experiments", False),
        ("report/view", "from ..core import Row", True),
        ("cli", "from . import experiments, report, llm, online", True),
    ],
)
def test_layers_see_every_form(module, source, ok, tmp_path):
    put(tmp_path, f"promptnb/{module}.py", source)
    assert (not layers(tmp_path)) == ok


@pytest.mark.parametrize(
    "a, b, ok",
    [
        ("from . import b", "", True),
        ("from . import b", "def f():\n    from . import a", False),
        ("from .b import f", "from promptnb.a import g", False),
        ("import promptnb.b", "import promptnb.a as a", False),
    ],
)
def test_circles_see_every_form(a, b, ok, tmp_path):
    put(tmp_path, "promptnb/a.py", a)
    put(tmp_path, "promptnb/b.py", b)
    assert (not circles(tmp_path)) == ok


def test_readme_counts_what_is_there():
    from promptnb.recipes import EXHIBITS

    unknown = sum(bool(e.unknown) for e in EXHIBITS.values())
    said = f"{len(EXHIBITS)} tables and figures of 5 papers are listed; {len(EXHIBITS) - unknown} can be run"
    assert f"{said}, and {unknown} say why they cannot" in (ROOT / "README.md").read_text()


# ---- start-up


def loaded(module):
    "Seconds that `import module` takes in a fresh process, and all that it brings along."
    code = "import sys, time; t = time.perf_counter(); import {}; print(time.perf_counter() - t, *sys.modules)"
    seconds, *names = run_python(code.format(module), ROOT).split()
    return float(seconds), set(names)


def test_import_is_quick():
    assert statistics.median(loaded("promptnb")[0] for _ in range(3)) < 0.3


@pytest.mark.parametrize(
    "module, never",
    [
        ("", "torch gymnasium"),
        (".core", "torch gymnasium"),
        (".recipes", "numpy torch gymnasium"),
        (".tasks", "torch"),
        (".report.view", "torch gymnasium"),
        (".report.exhibits", "torch gymnasium"),
    ],
)
def test_import_brings_nothing_heavy(module, never):
    assert not loaded("promptnb" + module)[1] & set(never.split())
