"""Machines as people have them: paths, kernels, cores, variables of the environment, and what is typed at them.

Whatever they hold, a command does what it does elsewhere, or says in one line what is wrong with which of them.
"""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from homes import FAMILY, PAPER, ROOT, SMOKE, TUNE, cli, env_for, fabricate, new_home, one_line, went

from promptnb import cli as command
from promptnb import core, recipes, tasks
from promptnb.experiments import forecast, plan
from promptnb.experiments.notebook import as_read, typed

# ---- an interpreter in a path that a shell would take apart, and the kernels that others have put about

ODD_PLACES = ("two words", "it's & co; $HOME", "brackets (1) {x} [y]")


@pytest.fixture(scope="module")
def finished_job(tmp_path_factory):
    "A workbook in which every run of one job has its record: the job opens its kernel, and has nothing to do."
    home = new_home(tmp_path_factory.mktemp("machine") / "home")
    fabricate(home, recipes.EXHIBITS[PAPER, "table1"], "smoke", (0,))
    return home


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    "Variables that name another python3 kernel, which dies, and start-up files, which end whatever reads them."
    folder = tmp_path_factory.mktemp("hostile")
    kernel = folder / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    dead = dict(argv=["/bin/false", "{connection_file}"], display_name="Python 3", language="python")
    (kernel / "kernel.json").write_text(json.dumps(dead))
    startup = folder / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    for file in (startup / "00.py", folder / "start.py"):
        file.write_text("import os\nos._exit(9)\n")
    return dict(
        JUPYTER_PATH=str(folder / "jupyter"),
        JUPYTER_DATA_DIR=str(folder / "jupyter"),
        IPYTHONDIR=str(folder / "ipython"),
        PYTHONSTARTUP=str(folder / "start.py"),
    )


def interpreter_in(folder):
    "A virtual environment that finds this one's packages."
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/*/site-packages")
    (site / "others.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
    return folder / "bin" / "python"


RULE = f"from promptnb.experiments import plan; print(plan.program(), 'job {TUNE} {' '.join(SMOKE)}')"


def rule_of(python, env):
    "The command of a job's rule, as the package of that interpreter writes it."
    return subprocess.run([python, "-c", RULE], env=env, capture_output=True, text=True, check=True).stdout.strip()


def in_a_shell(rule, env):
    "A rule's command, as Snakemake gives it to a shell."
    shell = ["bash", "-euo", "pipefail", "-c", rule]
    return subprocess.run(shell, cwd=env["PROMPTNB_HOME"], env=env, capture_output=True, text=True)


@pytest.mark.parametrize("place", ODD_PLACES)
def test_rule_of_an_interpreter_in_an_odd_path(place, finished_job, tmp_path, monkeypatch):
    python = tmp_path / place / "python"
    python.parent.mkdir()
    monkeypatch.setattr(sys, "executable", str(python))
    python.write_text("#!/bin/sh\necho $#: $*\n")
    python.chmod(0o755)
    p = in_a_shell(f"{plan.program()} job {TUNE}", env_for(finished_job))
    assert p.stdout == f"4: -m promptnb.cli job {TUNE}\n", p.stderr


def test_a_job_where_everything_is_in_the_way(finished_job, hostile, tmp_path):
    "It runs in its own interpreter, whose path has a space; its sockets have short paths, whatever TMPDIR is."
    python = interpreter_in(tmp_path / ODD_PLACES[1])
    (tmp_path / ("t" * 150)).mkdir()
    env = env_for(finished_job, PYTHONPATH=str(ROOT), TMPDIR=str(tmp_path / ("t" * 150)), **hostile)
    went(in_a_shell(rule_of(python, env), env))


# ---- numbers as they are typed


@pytest.mark.parametrize("text", ["1_2", "٣", "0x1", "1e1", "1.0", "0,", "0,,1", " ", "", "0 1", "one"])
def test_seeds_that_are_no_plain_numbers(text, refused):
    refused(command.seeds_of, text, says=["--seeds takes whole numbers", f"'{text}'"])


def test_seeds_that_no_library_takes(tmp_home, capsys, refused):
    refused(command.seeds_of, f"0,{2**32}", says=[f"--seeds has {2**32}", "below 4,294,967,296"])
    for args in (("--seed", str(10**20)), ("-p", f"seed={2**32}")):
        assert command.main(["job", TUNE, *args]) == 2
        assert "must be below 4,294,967,296" in capsys.readouterr().err
    for odd in ("\u00b2", "\u0663", f"{10**20}"):
        assert command.main(["job", f"{TUNE}@{odd}", *SMOKE]) == 2
        said = capsys.readouterr().err.strip()
        assert said.startswith("promptnb: ") and "seed" in said and "\n" not in said


@pytest.mark.parametrize("text, twice", [("0,0", 0), ("1,2,1", 1), ("3, 4,3", 3)])
def test_seeds_that_are_named_twice(text, twice, refused):
    refused(command.seeds_of, text, says=[f"--seeds has {twice} twice"])


NUMBERS = [
    ("run", PAPER, "--seeds", "0,0"),
    ("run", PAPER, "--seeds", "1_2"),
    ("run", PAPER, "-p", "seed=1_2"),
    ("job", TUNE, "-p", "seed=0x2"),
    ("job", TUNE, "-p", "threads=1_0"),
]


@pytest.mark.parametrize("args", NUMBERS, ids=" ".join)
def test_numbers_at_the_command_line(args, tmp_home, capsys):
    assert command.main([*args]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("promptnb: ") and "\n" not in said and args[-1].split("=")[-1].split(",")[0] in said


@pytest.mark.parametrize("args", [("run", PAPER, "--cores", "1_2"), ("job", TUNE, "--seed", "1_0")])
def test_numbers_of_options(args, capsys):
    with pytest.raises(SystemExit) as e:
        command.main([*args])
    assert e.value.code == 2 and f"'{args[-1]}'" in capsys.readouterr().err.splitlines()[-1]


def test_numbers_that_people_do_write():
    assert command.seeds_of("0, 2,10") == (0, 2, 10)
    assert [typed(x, 0) for x in ("7", " 7", "-1")] == [7, 7, -1]
    assert [typed(x, 1.0) for x in ("1e-3", ".5", "2")] == [0.001, 0.5, 2.0]
    assert [as_read(x) for x in ("1_2", "0b11", "True", "[1]")] == ["1_2", "0b11", True, [1]]


# ---- as many jobs at once as there are cores for them


@pytest.fixture
def no_allocation(monkeypatch):
    for name in forecast.ALLOCATED:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def cores(monkeypatch, no_allocation):
    "cores(n): this process is bound to n cores, and nothing else limits it."

    def bind(n):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(n)), raising=False)
        monkeypatch.setattr(forecast, "quota_here", lambda: np.inf)

    return bind


def control_groups(folder, places, **files):
    "A tree of control groups: the files below it, and the file that says which of them hold this process."
    for path, text in files.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (folder / "places").write_text(places)
    return folder, folder / "places"


V2 = "0::/pods/mine\n"
V1 = "9:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n"
QUOTAS = {
    "a container's": (1.0, "0::/\n", {"cpu.max": "100000 100000\n"}),
    "half a core": (0.5, V2, {"pods/mine/cpu.max": "50000 100000\n"}),
    "of the group above": (3.0, V2, {"pods/cpu.max": "300000 100000\n", "pods/mine/cpu.max": "max 100000\n"}),
    "the smallest": (2.0, V2, {"pods/cpu.max": "300000 100000\n", "pods/mine/cpu.max": "200000 100000\n"}),
    "none": (np.inf, V2, {"pods/mine/cpu.max": "max 100000\n"}),
    "of another group": (np.inf, V2, {"pods/other/cpu.max": "100000 100000\n"}),
    "version 1": (
        1.5,
        V1,
        {"cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "150000\n", "cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000\n"},
    ),
    "version 1, seen from within": (
        2.0,
        V1,
        {"cpu,cpuacct/cpu.cfs_quota_us": "100000\n", "cpu,cpuacct/cpu.cfs_period_us": "50000\n"},
    ),
    "version 1, none": (np.inf, V1, {"cpu,cpuacct/cpu.cfs_quota_us": "-1\n", "cpu,cpuacct/cpu.cfs_period_us": "1\n"}),
    "not to be read": (np.inf, V2, {"pods/mine/cpu.max": "?\n"}),
}


@pytest.mark.parametrize("case", QUOTAS)
def test_quota_of_a_control_group(case, tmp_path):
    grant, places, files = QUOTAS[case]
    assert forecast.quota_here(*control_groups(tmp_path, places, **files)) == grant


def test_quota_where_there_are_no_control_groups(tmp_path):
    assert forecast.quota_here(tmp_path, tmp_path / "places") == np.inf


@pytest.mark.parametrize("quota, n", [(0.5, 1), (1.0, 1), (1.5, 2), (64.0, 8)])
def test_cores_within_a_quota(quota, n, cores, monkeypatch):
    cores(8)
    monkeypatch.setattr(forecast, "quota_here", lambda: quota)
    assert forecast.cores_here() == n


ALLOCATIONS = [
    (dict(SLURM_CPUS_PER_TASK="3"), 3),
    (dict(SLURM_CPUS_PER_TASK="2", SLURM_CPUS_ON_NODE="6"), 2),
    (dict(SLURM_CPUS_ON_NODE="6"), 6),
    (dict(NSLOTS="4"), 4),
    (dict(SLURM_CPUS_PER_TASK="64"), 8),
    (dict(SLURM_CPUS_PER_TASK="0"), 1),
    (dict(SLURM_CPUS_PER_TASK=""), 8),
    (dict(SLURM_CPUS_PER_TASK="many"), 8),
]


@pytest.mark.parametrize("given, n", ALLOCATIONS, ids=str)
def test_cores_of_an_allocation(given, n, cores, monkeypatch):
    cores(8)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert forecast.cores_here() == n


def test_cores_that_are_used_and_printed(cores, monkeypatch, tmp_home, capsys):
    "A run on one core of eight asks Snakemake for one, and says so; --cores is taken as it is given."
    cores(1)
    asked = []
    monkeypatch.setattr(command, "owned", lambda words, *more: asked.append(words) or 0)
    monkeypatch.setattr(forecast.Rates, "__call__", lambda *a: 1.0)
    run = ["run", PAPER, "--exhibit", "table1", "--family", FAMILY, *SMOKE]
    assert command.main(run) == 0 and command.main([*run, "--cores", "3"]) == 0
    assert [words[words.index("--cores") + 1] for words in asked] == ["1", "3"]
    said = capsys.readouterr().out
    assert "on 1 core " in said and "on 3 cores " in said


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux binds processes to cores")
def test_cores_under_taskset(no_allocation):
    one = str(min(os.sched_getaffinity(0)))
    code = "from promptnb.experiments.forecast import cores_here; print(cores_here())"
    p = subprocess.run(["taskset", "-c", one, sys.executable, "-c", code], capture_output=True, text=True)
    assert p.stdout == "1\n", p.stderr


# ---- MUJOCO_GL, and what else decides how pictures are drawn


@pytest.fixture
def libraries(monkeypatch):
    "libraries('EGL', ...): just these are installed, and no variable says how to draw."
    for name in ("MUJOCO_GL", "PYOPENGL_PLATFORM", "MUJOCO_EGL_DEVICE_ID"):
        monkeypatch.delenv(name, raising=False)

    def install(*there):
        monkeypatch.setattr("ctypes.util.find_library", lambda name: f"lib{name}.so" if name in there else None)

    return install


DRAWS = [
    ({}, "egl"),
    (dict(MUJOCO_GL=""), "egl"),
    (dict(MUJOCO_GL=" "), "egl"),
    (dict(MUJOCO_GL="EGL"), "egl"),
    (dict(MUJOCO_GL="on"), "egl"),
    (dict(MUJOCO_GL="OSMesa"), "osmesa"),
    (dict(PYOPENGL_PLATFORM="osmesa"), "osmesa"),
]


@pytest.mark.parametrize("given, backend", DRAWS, ids=str)
def test_what_draws(given, backend, libraries, monkeypatch):
    libraries("EGL", "OSMesa")
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert tasks.gl_backend() == backend and not tasks.gl_trouble()


CANNOT_DRAW = [
    (dict(MUJOCO_GL="glfw"), ["MUJOCO_GL is 'glfw'", "egl", "unset it"]),
    (dict(MUJOCO_GL="off"), ["MUJOCO_GL is 'off'"]),
    (dict(MUJOCO_GL="elg"), ["MUJOCO_GL is 'elg'"]),
    (dict(MUJOCO_GL="osmesa"), ["MUJOCO_GL is 'osmesa'", "egl"]),
    (dict(MUJOCO_GL="egl", PYOPENGL_PLATFORM="glx"), ["PYOPENGL_PLATFORM is 'glx'"]),
    (dict(MUJOCO_EGL_DEVICE_ID="first"), ["MUJOCO_EGL_DEVICE_ID is 'first'"]),
]


@pytest.mark.parametrize("given, says", CANNOT_DRAW, ids=str)
def test_what_cannot_draw_is_named(given, says, libraries, monkeypatch, refused):
    libraries("EGL")
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    refused(tasks.film, FAMILY, 0, np.zeros((1, 6)), 0, says=says)


def test_nothing_that_draws_is_installed(libraries, monkeypatch, refused):
    libraries()
    refused(tasks.film, FAMILY, 0, np.zeros((1, 6)), 0, says=["install EGL or OSMesa"])
    monkeypatch.setenv("MUJOCO_GL", "egl")
    refused(tasks.film, FAMILY, 0, np.zeros((1, 6)), 0, says=["MUJOCO_GL is 'egl'", "install EGL or OSMesa"])


@pytest.mark.parametrize("value", ["elg", "osmesa", "glfw"])
def test_what_draws_nothing_does_not_mind(value):
    "MuJoCo would refuse to be imported."
    code = f"from promptnb import tasks; print(tasks.lock_step('{FAMILY}', [0]).reset(seed=0)[0].shape)"
    env = {**os.environ, "MUJOCO_GL": value}
    p = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert p.stdout == "(1, 20)\n", p.stderr


# ---- folders that variables name

FOLDERS = [("~/sets", "{home}/sets"), ("sets", "{cwd}/sets"), ("~/a/../sets/", "{home}/sets"), ("./s", "{cwd}/s")]


@pytest.mark.parametrize("variable", command.FOLDERS)
@pytest.mark.parametrize("given, means", FOLDERS)
def test_folder_of_a_variable(variable, given, means, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.setenv(variable, given)
    where = means.format(home=tmp_path / "me", cwd=tmp_path)
    read = dict(PROMPTNB_HOME=core.root, MINARI_DATASETS_PATH=core.minari_dir, PROMPTNB_DQN_REPLAY=replay_root)
    assert str(read[variable]()) == where


def replay_root():
    return pytest.importorskip("promptnb.tasks.atari").replay_root()


@pytest.mark.parametrize("given", ["~/sets", "sets", "../sets"])
def test_minari_reads_the_folder_that_is_meant(given, tmp_path, monkeypatch):
    "Ours and Minari's own functions agree on it, in this folder and in jobs, which run in another."
    from minari import DataCollector
    from minari.storage.datasets_root_dir import get_dataset_path

    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MINARI_DATASETS_PATH", given)
    command.settle_environment()
    env = DataCollector(gym.make("CartPole-v1", max_episode_steps=5))
    for seed in range(2):
        env.reset(seed=seed)
        while not any(env.step(env.action_space.sample())[2:4]):
            pass
    with warnings.catch_warnings(action="ignore"):
        env.create_dataset("cart/pole-v0")
    monkeypatch.chdir("/")
    assert core.minari_dataset("cart/pole-v0").total_episodes == 2
    assert Path(get_dataset_path("cart/pole-v0")).is_relative_to(tmp_path)


@pytest.mark.parametrize("given, means", [("~/sets", "sets"), ("~/a/../b", "b"), ("", ".minari/datasets")])
def test_minari_from_python_writes_to_the_folder_that_is_meant(given, means, tmp_path, monkeypatch, refused):
    from promptnb import data

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MINARI_DATASETS_PATH", given)
    refused(core.minari_dataset, "cart/pole-v0", says=["minari download"])
    monkeypatch.setenv("MINARI_DATASETS_PATH", given)
    steps = dict(observations=np.zeros((2, 2)), actions=np.zeros((2, 1)), rewards=np.zeros(2))
    data.from_arrays([steps]).to_minari("me/two-v0")
    assert (tmp_path / means / "me" / "two-v0").is_dir() and not (tmp_path / "~").exists()


def test_minari_from_python_expands_the_folder(tmp_path, monkeypatch, refused):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MINARI_DATASETS_PATH", "~/sets")
    refused(core.minari_dataset, "cart/pole-v0", says=[str(tmp_path / "sets"), "minari download"])


@pytest.mark.parametrize("variable", command.FOLDERS)
def test_a_file_where_a_folder_should_be(variable, tmp_path):
    (tmp_path / "file").write_text("")
    one_line(cli(tmp_path, "list", **{variable: str(tmp_path / "file")}), f"{variable} is", "no folder")


@pytest.mark.parametrize("variable", command.FOLDERS)
def test_a_folder_whose_name_is_too_long(variable, capsys, monkeypatch):
    monkeypatch.setenv(variable, "/tmp/" + "x" * 300)
    assert command.main(["list"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"promptnb: {variable} is /tmp/xxx") and said.endswith(": file name too long\n")


def test_a_folder_that_is_no_workbook(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PROMPTNB_HOME", str(tmp_path))
    for args in (("run", PAPER), ("status", PAPER), ("render", PAPER)):
        assert command.main([*args]) == 2
        assert "is no workbook" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


# ---- processes of Gymnasium's own

WORKERS = """
import sys
import gymnasium as gym
if __name__ == "__main__":
    import promptnb.tasks
    how, id = sys.argv[1:]
    env = gym.vector.AsyncVectorEnv([lambda: gym.make(id, task=3)] * 2, context=how)
    print(env.reset(seed=0)[0].shape)
    env.close()
"""


def workers(tmp_path, how, id):
    script = tmp_path / "workers.py"
    script.write_text(WORKERS)
    return subprocess.run([sys.executable, str(script), how, id], capture_output=True, text=True)


@pytest.mark.parametrize("how", ["spawn", "forkserver"])
def test_workers_know_an_id_that_names_its_module(how, tmp_path):
    p = workers(tmp_path, how, "promptnb.tasks:promptnb/cheetah-vel-v0")
    assert p.stdout == "(2, 20)\n" and "know" not in p.stderr, p.stderr


def test_workers_that_do_not_know_a_bare_id_are_told_of(tmp_path):
    p = workers(tmp_path, "spawn", "promptnb/cheetah-vel-v0")
    assert "ConnectionResetError" in p.stderr
    assert "workers started by spawn may not know 'promptnb/cheetah-vel-v0'" in p.stderr
    assert "gymnasium.make('promptnb.tasks:promptnb/cheetah-vel-v0'" in p.stderr


def test_forked_workers_know_bare_ids(tmp_path):
    p = workers(tmp_path, "fork", "promptnb/cheetah-vel-v0")
    assert p.stdout == "(2, 20)\n" and "know" not in p.stderr, p.stderr
