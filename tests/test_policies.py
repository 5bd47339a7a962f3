"Policies that ship: packed once, taken in place of training, refused where they are not what was trained."

import json
import shutil
from dataclasses import replace

import pytest
import torch
from homes import DATA, FAMILY, PAPER, SMOKE, TUNE, cli, finished_home, new_home, one_line, paths, runs, went
from safetensors.torch import load_file

from promptnb import recipes as rc
from promptnb import train
from promptnb.core import sha256_file
from promptnb.experiments import forecast, multitask, policies

PACK = ("policies", "pack", PAPER, *SMOKE)
KEPT = "data/policies"


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    "A home whose smoke policies are packed."
    home = new_home(tmp_path_factory.mktemp("packed") / "home", "data/results", "data/runs", "data/minari")
    went(cli(home, *PACK))
    return home


@pytest.fixture(scope="module")
def taken(packed, tmp_path_factory):
    "A home with data and packed policies, in which one recipe was run: (home, its run, its record)."
    home = new_home(tmp_path_factory.mktemp("taken") / "home", *DATA)
    shutil.copytree(packed / KEPT, home / KEPT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROMPTNB_HOME", str(home))
        run = next(r for r in runs(TUNE) if r.recipe.tune.tuner == "none" and r.recipe.pretrain.name == "prompt-dt")
        multitask.tune(run)
    return home, run


def records(home):
    "{run id: record} of the pre-trainings, then of the rest."
    found = [json.loads(path.read_text()) for path in paths(home).values()]
    trained = {r["run_id"]: r for r in found if ".pretrain." in r["run_id"]}
    return trained, {r["run_id"]: r for r in found if r["run_id"] not in trained}


def test_what_is_packed_is_the_policy_in_half_the_bytes(packed):
    trained, _ = records(finished_home())
    files = sorted((packed / KEPT).glob("*.safetensors"))
    assert len(files) == len(trained) > 1
    for file in files:
        card = json.loads(file.with_suffix(".json").read_text())
        record = trained[card["run_id"]]
        assert card["weights"] == sha256_file(file) and card["rows"] == record["rows"]
        whole, half = load_file(packed / record["folder"] / "policy" / "model.safetensors"), load_file(file)
        assert whole.keys() == half.keys() and half["mean"].dtype == torch.float32
        assert all(torch.allclose(whole[k], half[k].float(), rtol=1e-3, atol=1e-6) for k in whole)


def test_a_run_takes_it_trains_nothing_and_says_so(taken):
    home, run = taken
    trained, tuned = records(home)
    (policy,) = trained.values()
    assert policy["shipped"]["seconds"] > 0 and policy["seconds"] == 0
    assert tuned[run.id]["shipped"] is True and tuned[run.id]["status"] == "ok"
    assert not list((home / "data/runs/policies").glob("*/step-*"))
    theirs, _ = records(finished_home())
    assert policy["rows"] == theirs[policy["run_id"]]["rows"]


def test_a_preparation_is_of_one_policy_on_one_machine(taken, monkeypatch):
    home, run = taken
    monkeypatch.setenv("PROMPTNB_HOME", str(home))
    diffuser = rc.resolve(rc.RECIPES[f"prompt_diffuser/{FAMILY}/diffuser"], "smoke")
    run = replace(run, recipe=replace(diffuser, paper=PAPER, pretrain=run.recipe.pretrain))

    def folder():
        return multitask.prepared_folder(run, multitask.recipe_tuner(run))

    before, record = folder(), multitask.policy_record(run)
    assert folder() == before and record["weights"]
    with monkeypatch.context() as patch:
        patch.setattr(train, "where", lambda device: dict(torch="99"))
        assert folder() != before
    monkeypatch.setattr(multitask, "policy_record", lambda run: dict(record, weights="another"))
    assert folder() != before


def test_retrain_makes_it_here_and_what_stood_on_it_anew(taken, tmp_path, monkeypatch):
    home, run = taken
    monkeypatch.setenv("PROMPTNB_HOME", str(home))
    assert run.finished and run.pretraining().finished
    monkeypatch.setenv("PROMPTNB_RETRAIN", "1")
    assert not run.finished and not run.pretraining().finished
    multitask.tune(run)
    trained, tuned = records(home)
    assert not any(r.get("shipped") for r in (*trained.values(), *tuned.values()))
    _, whole = records(finished_home())
    assert tuned[run.id]["rows"] == whole[run.id]["rows"]
    assert run.finished


def test_a_policy_of_another_recipe_seed_or_world_is_not_taken(packed, monkeypatch):
    monkeypatch.setenv("PROMPTNB_HOME", str(packed))
    run = next(run for run in runs() if run.policy)
    assert policies.shipped_card(run)
    card = policies.packed_path(run).with_suffix(".json")
    assert policies.shipped_card(replace(run, seed=1)) is None
    longer = replace(run.recipe, pretrain=replace(run.recipe.pretrain, steps=21))
    assert policies.shipped_card(replace(run, recipe=longer)) is None
    read = policies.read_sealed
    monkeypatch.setattr(
        policies, "read_sealed", lambda p, n: {**read(p, n), "facts": "other"} if p == card else read(p, n)
    )
    assert policies.shipped_card(run) is None


def test_a_damaged_one_is_named_and_nothing_is_done_with_it(packed, tmp_path, monkeypatch, refused):
    home = new_home(tmp_path / "home", *DATA)
    shutil.copytree(packed / KEPT, home / KEPT)
    monkeypatch.setenv("PROMPTNB_HOME", str(home))
    run = next(run for run in runs() if run.policy)
    file = policies.packed_path(run)
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    refused(multitask.pretrain, run, says=(file.name, "is damaged", "git checkout"))
    assert not run.path.exists()


def test_packing_what_ships_leaves_its_card(taken):
    "A policy that was taken was trained by somebody else, and its card says so."
    home, _ = taken
    before = {path.name: path.read_bytes() for path in (home / KEPT).iterdir()}
    went(cli(home, *PACK))
    assert {path.name: path.read_bytes() for path in (home / KEPT).iterdir()} == before


def test_pack_says_what_is_missing(tmp_path):
    home = new_home(tmp_path / "home")
    one_line(cli(home, *PACK), "no policy of", PAPER, "promptnb run")
    one_line(cli(home, "policies", "pack", "promt_tuning_dt"), "did you mean", PAPER)


def test_a_record_without_weights_does_not_stop_the_others(packed, tmp_path):
    "Records may come without the policies, as those do that `records unpack` lays down."
    home = new_home(tmp_path / "home", "data/results", "data/runs", "data/minari")
    trained, _ = records(home)
    first, *others = trained.values()
    shutil.rmtree(home / first["folder"])
    said = went(cli(home, *PACK))
    assert "not packed: 1 run whose weights are not here" in said.stdout
    assert len([*(home / KEPT).glob("*.safetensors")]) == len(others) > 0
    for record in others:
        shutil.rmtree(home / record["folder"])
    one_line(cli(home, *PACK), "no policy of", "was trained here", "--retrain")


def test_a_file_that_is_too_large_does_not_ship(packed, monkeypatch, refused):
    monkeypatch.setenv("PROMPTNB_HOME", str(packed))
    monkeypatch.setattr(policies, "LIMIT", 1000)
    refused(policies.pack, next(run for run in runs() if run.policy), says=("MB are too many",))


def test_a_forecast_counts_seconds_for_it(packed, monkeypatch):
    monkeypatch.setenv("PROMPTNB_HOME", str(packed))
    run = next(run for run in runs() if run.policy)
    assert forecast.run_seconds(run) == (forecast.UNPACKING, "taken from a policy that ships")
