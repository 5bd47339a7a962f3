"""Environment variables at random: a command does what it does without them, or names the one that is wrong.

By hand, more of them: `PNB_FUZZ=20000 PNB_SEED=7 python -m pytest tests/test_environment.py`.
"""

import io
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from homes import PAPER, ROOT, env_for, new_home

from promptnb import cli as command
from promptnb import core, tasks
from promptnb.experiments import forecast, notebook, run

COUNT, SEED = int(os.environ.get("PNB_FUZZ", 120)), int(os.environ.get("PNB_SEED", 0))

ODD = [
    "",
    " ",
    "0",
    "-1",
    "1_0",
    "abc",
    "٣",
    "é",
    "a b",
    "'",
    '"',
    "$HOME",
    "{x}",
    "%s",
    "\\",
    "x" * 300,
    "\udcff",
    "1e9",
]
FOLDERS = [
    "~",
    "~/x",
    "~nobody/x",
    "sets",
    "./sets/",
    "../sets",
    "/nothing",
    "/dev/null",
    "/dev/null/x",
    "{tmp}",
    "{tmp}/a b",
]
PROXIES = ["http://127.0.0.1:9", "socks5://127.0.0.1:9", ":::", "127.0.0.1", "http://u:p@[::1"]
LOCALES = ["C", "POSIX", "C.UTF-8", "de_DE@euro", "xx", "en_US.ISO-8859-1"]
VARIABLES = {  # of each, what people set, beside what nobody should
    "PROMPTNB_HOME": FOLDERS,
    "MINARI_DATASETS_PATH": FOLDERS,
    "PROMPTNB_DQN_REPLAY": FOLDERS,
    "JUPYTER_PATH": FOLDERS,
    "JUPYTER_DATA_DIR": FOLDERS,
    "IPYTHONDIR": FOLDERS,
    "XDG_CACHE_HOME": FOLDERS,
    "TMPDIR": FOLDERS,
    "HOME": FOLDERS,
    "MPLCONFIGDIR": FOLDERS,
    "MUJOCO_GL": ["egl", "EGL", "osmesa", "glfw", "on", "off", "cgl"],
    "PYOPENGL_PLATFORM": ["egl", "osmesa", "glx"],
    "MUJOCO_EGL_DEVICE_ID": ["0", "1"],
    "OMP_NUM_THREADS": ["1", "4", "4,2"],
    "MKL_NUM_THREADS": ["1", "4"],
    "SLURM_CPUS_PER_TASK": ["1", "2", "64"],
    "SLURM_CPUS_ON_NODE": ["1", "2"],
    "NSLOTS": ["1", "undefined"],
    "COLUMNS": ["1", "80", "0"],
    "LINES": ["1", "0"],
    "NO_COLOR": ["1"],
    "FORCE_COLOR": ["1"],
    "TERM": ["dumb", "xterm"],
    "LANG": LOCALES,
    "LC_ALL": LOCALES,
    "TZ": ["UTC", "Mars/Base"],
    "HTTP_PROXY": PROXIES,
    "HTTPS_PROXY": PROXIES,
    "ALL_PROXY": PROXIES,
    "NO_PROXY": ["*", "127.0.0.1", "::1"],
    "HF_ENDPOINT": ["https://127.0.0.1:9", "hub", "file:///"],
    "MINARI_REMOTE": ["hf://x", "gs://x"],
    "MPLBACKEND": ["Agg", "TkAgg", "module://nothing"],
    "SNAKEMAKE_PROFILE": ["slurm", "/nothing"],
    "CUDA_VISIBLE_DEVICES": ["0", "-1", "7"],
    "GIT_DIR": FOLDERS,
    "PATH": ["/nothing", ":"],
}
INTERPRETER = {  # what Python itself reads, before any of our code
    "PYTHONIOENCODING": ["ascii", "latin-1", "utf-8"],
    "PYTHONUTF8": ["0", "1"],
    "PYTHONCOERCECLOCALE": ["0"],
    "PYTHONOPTIMIZE": ["1", "2"],
    "PYTHONWARNINGS": ["error", "ignore", "default"],
    "PYTHONHASHSEED": ["0", "7"],
    "PYTHONDONTWRITEBYTECODE": ["1"],
    "PYTHONSTARTUP": ["/nothing"],
    "PYTHONNOUSERSITE": ["1"],
    "PYTHONUNBUFFERED": ["1"],
}


def drawn(rng, tmp, known, odd):
    "One to four variables, each with a value that people set, or at times with an odd one. None: unset."
    chosen = {}
    for name in rng.sample(sorted(known), rng.randint(1, 4)):
        value = rng.choice(known[name] if rng.random() < 0.7 or not odd else [*ODD, None])
        chosen[name] = value and value.replace("{tmp}", str(tmp))
    return chosen


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return new_home(tmp_path_factory.mktemp("environment") / "home")


def put(monkeypatch, chosen):
    "Set the variables, and forget what was read of them before."
    for name, value in chosen.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(tempfile, "tempdir", None)


def refused_by_name(said, chosen):
    "One line that names one of the variables."
    line = said.strip()
    return line.startswith("promptnb: ") and "\n" not in line and any(name in line for name in chosen)


def promised(chosen):
    "What the functions that read these variables must give, whatever they hold."
    given = chosen.get("MINARI_DATASETS_PATH") or ""
    where = os.path.abspath(os.path.expanduser(given)) if given.strip() else str(core.data_dir() / "minari")
    assert str(core.minari_dir()) == where
    assert bool(tasks.gl_backend()) == (tasks.gl_backend() in tasks.GL)
    trouble = tasks.gl_trouble()
    assert "\n" not in trouble and (tasks.gl_backend() or trouble)
    assert 1 <= forecast.cores_here() <= len(os.sched_getaffinity(0))
    assert core.server_answers() is False or chosen.get("MINARI_REMOTE")
    assert os.path.isdir(notebook.socket_folder()) and len(notebook.socket_folder()) <= 60
    assert set(run.provenance()["commit"]) <= set("0123456789abcdef")
    assert isinstance(command.cache_folder(), bool)


def test_variables_at_random(home, tmp_path, monkeypatch, capsys):
    "Each draw: `list` prints what it prints without them, or a line names one; what reads them keeps its promises."
    rng = random.Random(SEED)
    monkeypatch.setenv("PROMPTNB_HOME", str(home))
    monkeypatch.chdir(tmp_path)
    assert command.main(["list"]) == 0
    usual = capsys.readouterr().out
    refusals = 0
    for i in range(COUNT):
        chosen = drawn(rng, tmp_path, VARIABLES, odd=True)
        with monkeypatch.context() as m:
            put(m, chosen)
            status = command.main(["list"])
            said = capsys.readouterr()
            if status:
                refusals += 1
                assert status == 2 and not said.out and refused_by_name(said.err, chosen), (i, chosen, said.err)
            else:
                assert said.out == usual, (i, chosen)
                promised(chosen)
                promised_environment(m)
    assert 0 < refusals < COUNT / 2, "the draw tries too little"


def promised_environment(monkeypatch):
    "What jobs get: one thread each, pictures without a screen, no profile but the one that was asked for."
    seen = []
    monkeypatch.setattr(
        command.subprocess, "run", lambda *a, env, **k: seen.append(env) or subprocess.CompletedProcess(a, 0)
    )
    monkeypatch.setattr(command, "stop_descendants", lambda owner: None)
    command.owned(["true"])
    (env,) = seen
    assert env["OMP_NUM_THREADS"] == env["MKL_NUM_THREADS"] == "1" and "SNAKEMAKE_PROFILE" not in env
    assert Path(env["PROMPTNB_HOME"]).is_absolute() and "~" not in env.get("MINARI_DATASETS_PATH", "")[:1]


def in_a_process(home, cwd, chosen, *args):
    "A command in a process of its own, which has these variables."
    env = {**env_for(home), "PYTHONPATH": str(ROOT), **{k: v for k, v in chosen.items() if v is not None}}
    for name in (k for k, v in chosen.items() if v is None):
        env.pop(name, None)
    run = [sys.executable, "-m", "promptnb.cli", *args]
    return subprocess.run(run, cwd=cwd, env=env, capture_output=True, timeout=120)


def test_the_interpreters_variables_at_random(home, tmp_path):
    "In processes of their own. A sign that the encoding lacks is printed by its code; no other line changes."
    rng = random.Random(SEED)
    usual = in_a_process(home, tmp_path, {}, "status", PAPER, "--scale", "smoke").stdout
    assert usual
    for i in range(max(3, COUNT // 40)):
        chosen = drawn(rng, tmp_path, INTERPRETER, odd=False)
        p = in_a_process(home, tmp_path, chosen, "status", PAPER, "--scale", "smoke")
        assert p.returncode == 0 and b"Traceback" not in p.stderr, (i, chosen, p.stderr[-500:])
        assert p.stdout == usual, (i, chosen)


@pytest.mark.parametrize("encoding, shown", [("ascii", b"\\xb7 \\u2026"), ("latin-1", b"\xb7 \\u2026"), ("utf-8", b"")])
def test_signs_that_an_encoding_lacks(encoding, shown, home, monkeypatch):
    page = io.BytesIO()
    monkeypatch.setenv("PROMPTNB_HOME", str(home))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(page, encoding=encoding))
    monkeypatch.setitem(command.COMMANDS, "list", (lambda a: print("· …", flush=True), None, "signs"))
    assert command.main(["list"]) == 0
    assert page.getvalue() == (shown or "· …".encode()) + b"\n"


@pytest.mark.parametrize("home_is", ["/dev/null", "/nothing/here", ""])
def test_snakemake_without_a_home(home_is, monkeypatch, home):
    "It makes a folder for what it keeps before anything else; where there is no home it gets one of the workbook."
    monkeypatch.setenv("PROMPTNB_HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", f"{home_is or '/dev/null'}/cache")
    monkeypatch.setattr(command.os, "makedirs", no_folder)
    seen = []
    monkeypatch.setattr(
        command.subprocess, "run", lambda *a, env, **k: seen.append(env) or subprocess.CompletedProcess(a, 0)
    )
    command.owned(["true"])
    assert seen[0]["XDG_CACHE_HOME"] == str(core.runs_dir() / "cache")


def no_folder(*a, **k):
    raise NotADirectoryError(20, "Not a directory")


def test_provenance_without_git_and_under_a_hook(monkeypatch):
    usual = run.provenance()["commit"]
    monkeypatch.setenv("GIT_DIR", "/nothing")
    assert run.provenance()["commit"] == usual
    monkeypatch.setenv("PATH", "/nothing")
    assert run.provenance()["commit"] == ""
