"What the project promises about its own files. Each check takes a root and names what is wrong; each is also shown a broken copy."

import ast
import configparser
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
MB = 2**20

# ---- helpers


def py(code, cwd):
    "Run Python code in a fresh process and return what it prints; a failure shows what it said."
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}  # nbdev exports nothing under it
    p = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert p.returncode == 0, p.stdout[-2000:] + p.stderr[-4000:]
    return p.stdout


def copied(root, new, *names):
    "Copy files and folders to the folder `new`, without caches."
    for n in names:
        if (root / n).is_dir():
            shutil.copytree(root / n, new / n, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
        elif (root / n).exists():
            shutil.copy(root / n, new / n)
    return Path(new)


def settings(root):
    c = configparser.ConfigParser(delimiters=["="])
    c.read(root / "settings.ini", encoding="utf-8")
    return c["DEFAULT"]


def rel(root, pattern):
    return {str(p.relative_to(root)) for p in root.rglob(pattern) if ".ipynb_checkpoints" not in p.parts}


def tracked(root):
    return [
        root / f
        for f in subprocess.check_output(["git", "ls-files", "-z"], cwd=root, text=True).split("\0")
        if f and (root / f).is_file()
    ]


def notebooks(root):
    return {n: json.loads((root / "nbs" / n).read_text(encoding="utf-8")) for n in sorted(rel(root / "nbs", "*.ipynb"))}


def papers(root):
    return {n: nb for n, nb in notebooks(root).items() if n.startswith("papers/")}


def code(nb):
    return ["".join(c["source"]) for c in nb["cells"] if c["cell_type"] == "code"]


def modules(root):
    return {
        f: (root / f).read_text(encoding="utf-8")
        for f in sorted("promptnb/" + m for m in rel(root / "promptnb", "*.py"))
    }


def imports(source, package=()):
    "(line, dotted name, inside a function?) of every import; relative ones are resolved against `package`."
    tree = ast.parse(source)
    inside = {
        id(n)
        for f in ast.walk(tree)
        if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for n in ast.walk(f)
    }
    for n in ast.walk(tree):
        if isinstance(n, ast.Import):
            names = [a.name for a in n.names]
        elif isinstance(n, ast.ImportFrom):
            base = list(package[: len(package) - n.level + 1]) if n.level else []
            names = [".".join([*base, *filter(None, [n.module]), a.name]) for a in n.names]
        elif (
            isinstance(n, ast.Call)
            and ast.unparse(n.func).endswith(("import_module", "__import__"))
            and n.args
            and isinstance(n.args[0], ast.Constant)
        ):
            names = [n.args[0].value]
        else:
            continue
        for name in names:
            yield n.lineno, name, id(n) in inside


# ---- who may import whom: {module: (ours that it may import, others that it never may, others not at module level)}

LAYERS = {
    "__init__": ("", "torch gymnasium", ""),
    "_modidx": ("", "torch gymnasium", ""),
    "core": ("", "", "torch gymnasium"),
    "tasks": ("core", "", "torch"),  # Atari's behaviour policies are networks: torch inside functions only
    "data": ("core tasks", "", ""),
    "experts": ("core tasks data", "", ""),
    "collect": ("core tasks data experts", "", ""),
    "models": ("core", "gymnasium minari", ""),
    "train": ("core", "gymnasium", ""),
    "evaluate": ("core tasks", "", ""),
    "tuners": ("core models train", "gymnasium minari", ""),
    "llm": ("core", "gymnasium", ""),
    "online": ("core tasks", "", ""),
    "recipes": ("", "everything", ""),
    "results": (
        "core recipes scores contexts guidance",
        "torch gymnasium",
        "",
    ),  # scores, contexts, guidance: inside the functions that make an exhibit
    "scores": ("core recipes results", "torch gymnasium", ""),
    "contexts": ("core recipes results scores", "torch gymnasium", ""),
    "guidance": ("core recipes results scores", "torch gymnasium", ""),
    "jobs": ("core tasks data experts models train evaluate tuners recipes offline stages", "", ""),
    "offline": ("core tasks data experts models train evaluate recipes jobs", "", ""),
    "stages": ("core tasks llm online train recipes jobs", "", ""),
    "run": (
        "core tasks data experts collect models train evaluate tuners llm online recipes results jobs offline stages",
        "",
        "",
    ),
}


def layers(root):
    "Modules import only what the table above lets them."
    out = []
    for f, source in modules(root).items():
        parts = f.removesuffix(".py").split("/")
        me = parts[1]
        if me not in LAYERS:
            out.append(f"{f}: no such module in the table of layers")
            continue
        may, never, late = map(str.split, LAYERS[me])
        for line, name, inside in imports(source, parts[:-1]):
            top, sub = (name.split(".") + [""])[:2]
            if top == "promptnb":
                bad = sub in LAYERS and sub not in (me, *may)
            else:
                bad = (
                    top in never
                    or (top in late and not inside)
                    or (never == ["everything"] and top not in sys.stdlib_module_names)
                )
            if bad:
                out.append(f"{f}:{line} imports {name}")
    return out


# ---- the other checks


def present(root):
    "What the README, the Makefile and the workflow name is there."
    need = "README.md LICENSE Makefile environment.yml workflow/Snakefile nbs/index.ipynb nbs/papers/run.ipynb nbs/papers/prompt_tuning_dt.ipynb"
    return [f"{f} is missing" for f in need.split() if not (root / f).exists()]


def readme(root):
    "README.md is nbs/index.ipynb."
    new = subprocess.run(
        ["make", "-s", "readme-text", f"BIN={Path(sys.executable).parent}", "READY="],
        cwd=root,
        capture_output=True,
        text=True,
    ).stdout
    return (
        []
        if new and (root / "README.md").exists() and new == (root / "README.md").read_text()
        else ["README.md is not nbs/index.ipynb: run make readme"]
    )


def pins(root):
    "environment.yml pins what settings.ini requires, in the same order."
    s, deps = settings(root), yaml.safe_load((root / "environment.yml").read_text())["dependencies"]
    pip, want = next(d["pip"] for d in deps if isinstance(d, dict)), [*s["requirements"].split(), "-e ."]
    out = [] if f"python={s['min_python']}" in deps else [f"environment.yml: python is not {s['min_python']}"]
    return (
        out
        + [f"environment.yml: {a} there, {b} in settings.ini" for a, b in zip(pip + [None] * len(want), want) if a != b]
        + [f"environment.yml: {a} is too much" for a in pip[len(want) :]]
    )


def sync(root):
    "The modules are what the notebooks export, byte for byte."
    with tempfile.TemporaryDirectory() as tmp:
        new = copied(root, Path(tmp), "settings.ini", "setup.py", "nbs")
        py("from nbdev.doclinks import nbdev_export; nbdev_export()", new)
        a, b = modules(root), modules(new)
    return [f"{f} is not what the notebooks export: run nbdev_export" for f in sorted({*a, *b}) if a.get(f) != b.get(f)]


def clean(root):
    "Notebooks are as nbdev_clean writes them; outputs may stay."
    with tempfile.TemporaryDirectory() as tmp:
        new = copied(root, Path(tmp), "settings.ini", "nbs")
        py("from nbdev.clean import nbdev_clean; nbdev_clean()", new)
        return [
            f"nbs/{n} is not clean: run nbdev_clean"
            for n in notebooks(root)
            if (root / "nbs" / n).read_bytes() != (new / "nbs" / n).read_bytes()
        ]


def tags(root):
    "Paper notebooks and the benchmarks, and no others, have one cell tagged `parameters`."
    n = {
        f: sum("parameters" in c["metadata"].get("tags", []) for c in nb["cells"]) for f, nb in notebooks(root).items()
    }
    return [
        f"nbs/{f} has {k} cells tagged parameters"
        for f, k in n.items()
        if k != (f.startswith("papers/") or f == "benchmarks.ipynb")
    ]


def render_only(root):
    "Paper notebooks define nothing and import only recipes, results, scores, contexts and what draws them."
    ok, out = sys.stdlib_module_names | {"pandas", "matplotlib", "IPython"}, []
    for f, nb in papers(root).items():
        if f == "papers/run.ipynb":
            continue
        source = "\n".join(re.sub(r"^[%!]", "#", s, flags=re.M) for s in code(nb))
        out += [
            f"nbs/{f} defines something: {m[0].strip()}"
            for m in re.finditer(r"^[ \t]*(async +)?(def|class) .*", source, re.M)
        ]
        out += [
            f"nbs/{f} imports {n}"
            for _, n, _ in imports(source)
            if n.split(".")[0] not in ok
            and not re.match(r"promptnb\.(recipes|results|scores|contexts|guidance)(\.|$)", n)
        ]
    return out


def sizes(root):
    "No file over 2 MB, no notebook over 90 cells."
    big = [
        f"{p.relative_to(root)} has {p.stat().st_size / MB:.1f} MB"
        for p in {*tracked(root), *(root / "nbs").rglob("*.ipynb")}
        if p.stat().st_size > 2 * MB
    ]
    return big + [f"nbs/{f} has {len(nb['cells'])} cells" for f, nb in notebooks(root).items() if len(nb["cells"]) > 90]


def asserted(root):
    "fastcore's expect_fail is a context manager: called with a function, it asserts nothing (test_fail does)."
    return [
        f"nbs/{f} calls expect_fail with a function"
        for f, nb in notebooks(root).items()
        for s in code(nb)
        if "expect_fail(lambda" in s
    ]


def lengths(root):
    "No function over 50 lines."
    return [
        f"{f}: {n.name} has {k} lines"
        for f, source in modules(root).items()
        for n in ast.walk(ast.parse(source))
        if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)) and (k := n.end_lineno - n.lineno + 1) > 50
    ]


def wheel(root):
    "The wheel holds every module."
    with tempfile.TemporaryDirectory() as tmp:
        new = copied(root, Path(tmp), "settings.ini", "setup.py", "promptnb")
        py(
            "import subprocess, sys; subprocess.run([sys.executable, *'-m pip wheel -q --no-deps --no-build-isolation -w dist .'.split()], check=True)",
            new,
        )
        held = set(zipfile.ZipFile(next((new / "dist").glob("*.whl"))).namelist())
    return [f"{f} is not in the wheel" for f in modules(root) if f not in held]


def elsewhere(root):
    "No committed file names a folder of the machine it was written on."
    at = re.compile(rb"/(work|root)(?=/)")
    return [
        f"{p.relative_to(root)} names {m[0].decode()}/"
        for p in tracked(root)
        if b"\0" not in (data := p.read_bytes()) and (m := at.search(data))
    ]


# ---- damage: how a copy is broken, and what the check must then say


def put(root, file, text):
    "Append to a file, new or not."
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    with open(root / file, "a") as f:
        f.write(text)


def nb(root, name, *sources, **metadata):
    "Write a notebook of code cells that share their metadata."
    cells = [
        dict(cell_type="code", id=f"c{i}", metadata=metadata, outputs=[], execution_count=None, source=[s])
        for i, s in enumerate(sources)
    ]
    put(
        root,
        f"nbs/{name}.ipynb",
        json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5), sort_keys=True, indent=1) + "\n",
    )


DAMAGE = [
    (
        layers,
        lambda r: put(r, "promptnb/train.py", "\ndef f(): from .models import dt\n"),
        "imports promptnb.models.dt",
    ),
    (layers, lambda r: put(r, "promptnb/other.py", ""), "promptnb/other.py: no such module"),
    (present, lambda r: shutil.rmtree(r / "nbs"), "nbs/papers/run.ipynb is missing"),
    (pins, lambda r: put(r, "environment.yml", '      - "leftpad"\n'), "leftpad is too much"),
    (
        pins,
        lambda r: (
            put(r, "settings.ini", "\n[x]\n")
            or (r / "settings.ini").write_text((r / "settings.ini").read_text().replace("nbdev==", "nbdev>"))
        ),
        "in settings.ini",
    ),
    (sync, lambda r: put(r, "promptnb/core.py", "\nstale = 1\n"), "promptnb/core.py is not"),
    (sync, lambda r: (r / "promptnb/core.py").unlink(), "promptnb/core.py is not"),
    (sync, lambda r: put(r, "promptnb/extra.py", ""), "promptnb/extra.py is not"),
    (clean, lambda r: nb(r, "98_x", "1", scrolled=True), "nbs/98_x.ipynb is not clean"),
    (tags, lambda r: nb(r, "98_x", "seed = 0", tags=["parameters"]), "nbs/98_x.ipynb has 1"),
    (tags, lambda r: nb(r, "papers/x", "seed = 0"), "nbs/papers/x.ipynb has 0"),
    (tags, lambda r: nb(r, "papers/x", "seed = 0", "scale = ''", tags=["parameters"]), "nbs/papers/x.ipynb has 2"),
    (render_only, lambda r: nb(r, "papers/x", "%time\ndef f(): pass"), "defines something: def f()"),
    (render_only, lambda r: nb(r, "papers/x", "class A: pass"), "defines something: class A"),
    (render_only, lambda r: nb(r, "papers/x", "from promptnb import results, run"), "imports promptnb.run"),
    (render_only, lambda r: nb(r, "papers/x", "import torch.nn as nn"), "imports torch.nn"),
    (sizes, lambda r: put(r, "figures/x.svg", "x" * (2 * MB + 1)), "figures/x.svg has 2.0 MB"),
    (sizes, lambda r: nb(r, "98_x", *["1"] * 91), "nbs/98_x.ipynb has 91 cells"),
    (lengths, lambda r: put(r, "promptnb/core.py", "\ndef f():\n" + "    1\n" * 50), "f has 51 lines"),
    (asserted, lambda r: nb(r, "98_x", "expect_fail(" + "lambda: 1 / 0)"), "nbs/98_x.ipynb calls expect_fail"),
    (wheel, lambda r: put(r, "promptnb/nowhere/a.py", ""), "promptnb/nowhere/a.py is not"),
    (elsewhere, lambda r: put(r, "a.txt", "see " + "/".join(["", "root", "x"])), "a.txt names"),
]
CHECKS = dict.fromkeys(d[0] for d in DAMAGE)


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_holds(check):
    assert not (wrong := check(ROOT)), "\n".join(["", *wrong])


@pytest.mark.parametrize(
    "check, damage, says", DAMAGE, ids=lambda x: x.__name__.replace("<lambda>", "") if callable(x) else ""
)
def test_can_fail(check, damage, says, tmp_path):
    root = copied(ROOT, tmp_path, "settings.ini", "setup.py", "environment.yml", "nbs", "promptnb")
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
        ("data", "from importlib import import_module; import_module('promptnb.run')", False),
        ("tasks/control", "from .. import tasks", True),
        ("tasks/control", "from ..data import load", False),
        ("tasks/control", "import torch", False),
        ("tasks/control", "def f():\n    import torch", True),
        ("tasks/__init__", "from . import control", True),
        ("tasks/__init__", "from ..core import Row", True),
        ("tasks/__init__", "from .. import run", False),
        ("tuners/ranking", "from .core import Tuner", True),
        ("tuners/ranking", "from ..evaluate import rollout", False),
        ("core", "import torch.nn", False),
        ("core", "def f():\n    from torch import nn", True),
        ("core", "class A:\n    import torch", False),
        ("recipes", "import dataclasses", True),
        ("recipes", "import numpy as np", False),
        ("recipes", "from .core import Row", False),
        ("run", "from . import llm, online, results", True),
    ],
)
def test_layers_see_every_form(module, source, ok, tmp_path):
    put(tmp_path, f"promptnb/{module}.py", source)
    assert (not layers(tmp_path)) == ok


# ---- start-up


def loaded(module):
    "Seconds that `import module` takes in a fresh process, and all that it brings along."
    seconds, *names = py(
        f"import sys, time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t, *sys.modules)",
        ROOT,
    ).split()
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
        (".results", "torch gymnasium"),
    ],
)
def test_import_brings_nothing_heavy(module, never):
    assert not loaded("promptnb" + module)[1] & set(never.split())
