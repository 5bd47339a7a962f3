"A study of somebody else, outside the package: written by `new`, run, killed, rendered, stale where it has changed."

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from homes import SMOKE, cli, env_for, kill_tree, new_home, one_line, went

NAME = "slide"
RUN = ("run", NAME, *SMOKE, "--cores", 1)


def until(what, seconds=120):
    "Wait for something to be true."
    end = time.time() + seconds
    while not what():
        assert time.time() < end, "it did not happen"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A home, and beside it a study that `new` has written: (home, folder of the study, environment that names it)."
    tmp = tmp_path_factory.mktemp("study")
    home = new_home(tmp / "home")
    p = went(cli(home, "new", tmp / NAME))
    assert f"export PROMPTNB_PLUGINS={tmp / NAME}" in p.stdout
    return home, tmp / NAME, dict(PROMPTNB_PLUGINS=str(tmp / NAME))


def killed_in_training(home, env):
    "Start `run`, and kill -9 every process of it once the policy is being trained."
    script = str(Path(sys.executable).with_name("promptnb"))
    run = subprocess.Popen(
        [script, *map(str, RUN)], cwd=home, env=env_for(home, **env), stdout=subprocess.DEVNULL, start_new_session=True
    )
    until(lambda: list((home / "data" / "runs" / "policies").glob(f"{NAME}*/metrics.jsonl")))
    kill_tree(run)


@pytest.fixture(scope="module")
def finished(home):
    "The study, collected, run, killed in the middle, run again."
    home, folder, env = home
    went(cli(home, "collect", "--family", NAME, *SMOKE, **env))
    killed_in_training(home, env)
    assert not list((home / "data" / "results" / NAME).glob("*nudged*"))
    went(cli(home, *RUN, **env))
    return home, folder, env


def records(home):
    "{run: record} of the study's two rows."
    found = {p.name: json.loads(p.read_text()) for p in (home / "data" / "results" / NAME).glob("smoke.*.json")}
    return {name: r for name, r in found.items() if f".{NAME}." in name and "pretrain" not in name}


def test_a_study_goes_from_data_to_a_table_and_survives_kill_9(finished):
    home, folder, env = finished
    assert {r["status"] for r in records(home).values()} == {"ok"} and len(records(home)) == 2
    assert [f":{NAME}.{m}" in r["code"]["modules"] for r in records(home).values() for m in ("world",)] == [True] * 2
    assert "3/3 runs" in cli(home, "status", NAME, *SMOKE, **env).stdout
    p = went(cli(home, "render", NAME, *SMOKE, **env))
    assert "Prompt-DT, nudged" in p.stdout
    assert (home / "figures" / "yours" / NAME / "smoke" / "table1.csv").exists()


def test_what_its_world_is_decides_whether_a_result_is_stale(finished):
    home, folder, env = finished
    world, text = folder / "world.py", (folder / "world.py").read_text()
    world.write_text(text.replace("position, speed = self.state", "position, speed = self.state  # a remark"))
    assert "3/3 runs" in cli(home, "status", NAME, *SMOKE, **env).stdout
    try:
        world.write_text(text.replace("0.8 * speed", "0.7 * speed"))
        assert "0/3 runs, 2 stale" in cli(home, "status", NAME, *SMOKE, **env).stdout
    finally:
        world.write_text(text)


def test_a_tuner_of_a_study_belongs_to_its_record_alone(finished):
    home, folder, env = finished
    asks = {name: f":{NAME}.tuner" in r["code"]["modules"] for name, r in records(home).items()}
    assert asks == {f"smoke.{NAME}.prompted.s0.json": False, f"smoke.{NAME}.nudged.s0.json": True}


def test_without_its_name_nobody_knows_it(home):
    home, folder, env = home
    one_line(cli(home, *RUN), "unknown paper", NAME)
    assert NAME in cli(home, "list", **env).stdout


@pytest.mark.parametrize(
    "text, says",
    [
        (None, "there is no file"),
        ("import nowhere_to_be_found", "No module named 'nowhere_to_be_found'"),
        ("def f(:", "SyntaxError"),
        ("from promptnb import recipes\nrecipes.add(1)", "AttributeError"),
    ],
)
def test_a_plugin_that_breaks_is_one_line_and_nothing_is_planned_without_it(home, tmp_path, text, says):
    file = tmp_path / "broken_study.py"
    if text is not None:
        file.write_text(text)
    one_line(cli(home[0], "list", PROMPTNB_PLUGINS=str(file)), str(file), says)


def test_a_folder_whose_name_no_module_can_have_is_named(home, tmp_path):
    (tmp_path / "my.study").mkdir()
    (tmp_path / "my.study" / "__init__.py").touch()
    one_line(cli(home[0], "list", PROMPTNB_PLUGINS=str(tmp_path / "my.study")), "'my.study' cannot be a module's name")


def test_a_plugin_that_breaks_leaves_the_library_usable(tmp_path):
    (tmp_path / "broken_study.py").write_text("1 / 0")
    env = dict(os.environ, PROMPTNB_PLUGINS=str(tmp_path / "broken_study.py"))
    code = "import promptnb.recipes as rc; print(len(rc.PAPERS))"
    p = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert p.stdout.strip() == "6" and "ZeroDivisionError" in p.stderr and "Traceback" not in p.stderr


@pytest.mark.parametrize("name, says", [("json", "installed"), ("My-Study", "small letters"), (NAME, "there already")])
def test_new_refuses_a_name_that_would_not_work(home, name, says):
    one_line(cli(home[0], "new", home[1].parent / name), says)


def test_several_plugins_and_relative_paths(home, tmp_path):
    for name in ("first_study", "second_study"):
        went(cli(home[0], "new", tmp_path / name))
    relative = os.path.relpath(tmp_path / "second_study", home[0])
    p = went(cli(home[0], "list", PROMPTNB_PLUGINS=f"{tmp_path / 'first_study'}{os.pathsep}{relative}"))
    assert "first_study: " in p.stdout and "second_study: " in p.stdout
