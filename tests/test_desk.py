"Desk scale: what is run there, what the runs say of the papers' claims, and the grid of all tuners."

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import test_scores
from homes import ROOT, fabricate

from promptnb import recipes as rc
from promptnb.core import PromptnbError, process_name, read_json, results_dir, runs_dir, write_json
from promptnb.experiments import job, notebook, plan
from promptnb.report import claims, exhibits, grid
from promptnb.report.view import View

PTDT = "prompt_tuning_dt"
EVERY = [e for e in rc.EXHIBITS.values() if e.recipes and not e.unknown and not e.sets and rc.run_at(e, "desk")]
SLUGS = [slug for slug in rc.PAPERS if rc.PAPER_OF[slug].published or slug == "grid"]


# ---- what is run


@pytest.mark.parametrize("paper", SLUGS)
def test_a_desk_runs_what_its_main_exhibits_show_and_nothing_else(paper):
    request = plan.Request(paper, scale="desk")
    runs = [run for task in plan.tasks_of(request, done=lambda run: False) for run in task.runs if not run.policy]
    wanted = {(r.id, seed) for r in request.recipes() for seed in rc.resolve(r, "desk").seeds}
    assert {(run.recipe.id, run.seed) for run in runs} == wanted and len(runs) == len(wanted)


@pytest.mark.parametrize("paper", SLUGS)
def test_the_recipes_of_a_job_have_the_same_seeds(paper):
    "A job is told its seeds once."
    for own in plan.Request(paper, scale="desk").jobs():
        assert len({r.seeds for r in job.job_recipes(own, "desk")}) == 1, own.id


def test_papers_share_their_policies_at_a_desk():
    "Prompt Diffuser's and the grid's are Prompt-Tuning DT's: the same digest, so the same file."
    ours = rc.resolve(rc.RECIPES[f"{PTDT}/cheetah-vel/pdt"], "desk").pretrain
    for id in ("prompt_diffuser/cheetah-vel/diffuser", "grid/cheetah-vel/prompt-dt-ranking", "cmt/cheetah-vel/pdt"):
        assert rc.resolve(rc.RECIPES[id], "desk").pretrain == ours


def test_a_rate_that_stays_leaves_old_results_valid():
    r = rc.resolve(rc.RECIPES[f"{PTDT}/cheetah-vel/pdt"], "laptop")
    assert (r.pretrain.decay_to, rc.resolve(r, "desk").pretrain.decay_to) == (1.0, 0.02)
    assert rc.digest(r) != rc.digest(replace(r, pretrain=replace(r.pretrain, decay_to=0.02)))
    old = {k: v for k, v in vars(r.pretrain).items() if k not in ("decay_to", "times")}
    assert rc.digest(rc.Pretrain(**old)) == rc.digest(r.pretrain)


def test_the_story_tunes_six_rows_alone_and_all_of_them_beside_the_table():
    alone = plan.Request(PTDT, ("story", "story_bars"), "desk")
    runs = [run for task in plan.tasks_of(alone, done=lambda run: False) for run in task.runs]
    tuned, policies = [run for run in runs if not run.policy], [run for run in runs if run.policy]
    assert (len(tuned), len(policies)) == (6 * 2 * 5, 2 * 5)
    assert {run.seed for run in runs} == set(range(5))
    together = plan.Request(PTDT, ("story", "table1"), "desk", families=("cheetah-dir",))
    assert {own.exhibit for own in together.jobs()} == {"table1"}


WHOLE = f"{PTDT}/table1/cheetah-dir/tune"
STORY = f"{WHOLE}:{','.join(rc.prompt_tuning_dt.STORY)}"


def test_a_job_can_be_asked_for_some_of_its_recipes():
    some, whole = job.find_job(STORY, "desk"), job.find_job(WHOLE, "desk")
    assert {r.key for r in job.job_recipes(some, "desk")} == set(rc.prompt_tuning_dt.STORY)
    assert (some.whole, set(some.id.split(":")[1].split(","))) == (WHOLE, set(rc.prompt_tuning_dt.STORY))
    assert job.stamp(some, 0, "desk") != job.stamp(whole, 0, "desk")
    every = ",".join(r.key for r in job.job_recipes(whole, "desk"))
    assert job.find_job(f"{WHOLE}:{every}", "desk") == whole


def test_a_misspelt_recipe_of_a_job_is_one_line():
    with pytest.raises(PromptnbError, match=f"unknown recipe of {WHOLE} 'rankng': did you mean 'ranking'"):
        job.find_job(f"{WHOLE}:pdt,rankng", "desk")


@pytest.mark.parametrize("e", EVERY, ids=lambda e: f"{e.paper}-{e.id}")
def test_an_exhibit_alone_runs_its_own_rows_and_no_others(e):
    "Also where they belong to another exhibit's job."
    request = plan.Request(e.paper, (e.id,), "desk")
    runs = [run for task in plan.tasks_of(request, done=lambda run: False) for run in task.runs]
    assert {run.recipe.id for run in runs if not run.policy} == {r.id for r in request.recipes()}
    used = {rc.resolve(r, "desk").pretrain for r in request.recipes()} - {None}
    assert {run.recipe.pretrain for run in runs if run.policy} == used


def test_what_a_killed_process_was_not_asked_for_has_not_failed(tmp_home):
    some = job.find_job(STORY, "desk")
    with notebook.holding(some, 0, "desk"):
        (folder,) = (runs_dir() / "locks").iterdir()
        asked = (folder / notebook.ASKED).read_text()
    assert not (folder / notebook.ASKED).exists()
    (folder / notebook.ASKED).write_text(asked)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (folder / ".holder").write_text(process_name(ended.pid))
    notebook.note_killed(PTDT, "desk")
    failed = {path.name.split(".")[2] for path in results_dir(PTDT).glob("*.failed.json")}
    assert failed == set(rc.prompt_tuning_dt.STORY)


def make(folder, *words):
    "What `make` would do in a folder."
    p = subprocess.run(["make", "-n", *words], cwd=folder, capture_output=True, text=True, check=True)
    return p.stdout


def test_make_reproduce_starts_from_policies_that_ship_and_says_where_none_do(tmp_path):
    for name in ("Makefile", "settings.ini", "setup.py"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    without = make(tmp_path, "reproduce")
    assert "No policies of desk scale ship yet" in without and "--scale laptop --exhibit table1" in without
    (tmp_path / "data" / "policies").mkdir(parents=True)
    for family in ("cheetah-dir", "cheetah-vel"):
        for seed in range(5):
            (tmp_path / "data" / "policies" / f"{family}.prompt-dt-0123456789.s{seed}.safetensors").touch()
    ships = make(tmp_path, "reproduce")
    assert "No policies" not in ships and ships.count("--scale desk --exhibit story --exhibit story_bars") == 3
    whole = make(tmp_path, "reproduce", "WHOLE=1", "FRESH=1")
    assert "--exhibit table1" in whole and whole.count("--retrain") == 1


# ---- claims


def level(r, seed, i):
    "Tuned prompts far above untuned ones, those of random actions far below."
    return (
        100.0 * r.key.startswith("ranking")
        - 500.0 * (r.key == "pdt-uniform")
        + np.random.default_rng((seed, i)).normal()
    )


def decisions(t):
    "{claim: its decisions}."
    return {text: set(g.decision) for text, g in t.groupby([c.text for c in t.claim])}


def test_claims_are_confirmed_refuted_or_left_open(tmp_home):
    table = exhibits.exhibit(PTDT, "table1")
    fabricate(tmp_home, table, "laptop", (0, 1, 2), level)
    found = decisions(claims.answered(PTDT, "laptop", "yours"))
    assert found["a prompt of random actions ruins the policy"] == {"confirmed"}
    assert found["tuning repairs a prompt of random actions"] == {"confirmed"}
    (online,) = [text for text in found if text.startswith("returns guide better than action errors")]
    assert found[online] == {"refuted"}
    assert found["the prompt helps Prompt-DT on the test tasks"] == {"not resolved"}
    assert found["ranking beats hill climbing, with as many queries"] == {"not tested"}


def test_the_claim_on_returns_says_how_few_updates_they_get():
    steps = {}
    for scale in ("desk", "laptop", "paper"):
        rows = [rc.resolve(rc.RECIPES[f"{PTDT}/ant-dir/{key}"], scale) for key in ("online", "ranking")]
        steps[scale] = [dict(r.tune.hyper)["steps"] for r in rows]
    assert steps == dict(desk=[10, 100], laptop=[2, 25], paper=[100, 100])
    (text,) = [c.text for c in rc.PAPER_OF[PTDT].claims if c.a.startswith("PTDT-online")]
    assert text.endswith("(updates: desk 10 to 100, laptop 2 to 25, paper as many)")


def test_one_seed_decides_nothing(tmp_home):
    fabricate(tmp_home, exhibits.exhibit(PTDT, "table1"), "laptop", (0,), level)
    assert set(claims.answered(PTDT, "laptop", "yours").decision) == {"not tested"}


def test_a_claim_says_which_of_its_runs_have_no_number(tmp_home):
    fabricate(tmp_home, exhibits.exhibit(PTDT, "table1"), "laptop", (0, 1, 2, 3), level)
    path = results_dir(PTDT) / "laptop.cheetah-vel.pdt-uniform.s3.json"
    write_json(path, dict(read_json(path), status="diverged", rows=[]))
    t = claims.answered(PTDT, "laptop", "yours")
    view = View(exhibits.exhibit(PTDT, "table1"), "laptop", seeds=(0, 1, 2, 3))
    (r,) = [x for x in claims.comparisons(view, t.claim[0]) if x["where"] == "cheetah-vel"]
    assert (r["n"], r["ended"]) == (3, "1 diverged")
    assert claims.entry(claims.decided([r]).iloc[0]).endswith("n = 3 (1 diverged)")


def test_a_policy_that_two_rows_start_from_is_paid_once(tmp_home):
    fabricate(tmp_home, exhibits.exhibit(PTDT, "table1"), "laptop", (0, 1, 2), level)
    view = View(exhibits.exhibit(PTDT, "table1"), "laptop", partial=True)
    runs = [run for run in view.good if run.recipe.key in ("pdt", "ranking") and run.recipe.family == "cheetah-vel"]
    for run in runs:
        write_json(claims.policy_file(run.recipe, "laptop", run.seed), dict(run.record, seconds=100.0))
    assert len(runs) == 6 and claims.spent(runs) == 6 * 1.0 + 3 * 100.0


def apart(r, seed, i):
    "As `level`, where every row has noise of its own."
    return level(r, seed, i) + np.random.default_rng((seed, i, *r.key.encode())).normal()


def test_seeds_by_need(tmp_home):
    "What lies far apart needs the fewest seeds; worth seeing is the published difference, where there is one."
    fabricate(tmp_home, exhibits.exhibit(PTDT, "table1"), "laptop", (0, 1, 2), apart)
    fabricate(tmp_home, exhibits.exhibit("prompt_diffuser", "table1"), "laptop", (0, 1, 2), apart)
    t, other = (claims.seeds(paper, "laptop", "yours").set_index("claim") for paper in (PTDT, "prompt_diffuser"))
    far, close = (
        t.loc["tuning repairs a prompt of random actions"],
        other.loc["a generated prompt beats Prompt-Tuning DT"],
    )
    assert set(t.n) == {3} and set(far["seeds for it"]) <= {"3", "4"}
    assert all(float(r["n seeds see"]) > float(r.spread) for _, r in t.iterrows())
    assert close.set_index("on")["worth seeing"]["cheetah-vel"] == "+4.2"  # as published, and not as fabricated
    spread = float(t.loc["tuning improves an expert prompt"].set_index("on").spread["cheetah-vel"])
    assert int(claims.needed(-1.6, dict(n=3, spread=spread), 40)) > 4


def test_one_seed_has_no_spread(tmp_home):
    fabricate(tmp_home, exhibits.exhibit(PTDT, "controls"), "laptop", (0,), apart)
    t = claims.seeds(PTDT, "laptop", "yours")
    assert set(t.n) == {1} and set(t["seeds for it"]) == set(t.spread) == set(t["n seeds see"]) == {""}


def test_the_summary_has_a_line_for_every_claim_without_any_run(tmp_home):
    for slug in SLUGS[:-1]:
        t = claims.summary(slug, "desk", "yours")
        assert {c.text for c in rc.PAPER_OF[slug].claims} == set(t.claim), slug
        assert set(t["ours, desk scale"]) == {"no runs"}
    assert claims.counts("desk", "yours").drop(columns="not tested").sum(axis=None) == 0


def test_a_claim_on_a_row_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="table1 has no row 'Soft Prmpt'"):
        rc.PAPER_OF[PTDT].claim("-", "table1", "Soft Prmpt", "Soft Prompt")


# ---- the grid


def good(r, seed, i):
    "An expert's prompt at 100, the random one at 0, tuners between: each the better the later in the alphabet."
    if r.key.endswith("-expert"):
        return 100.0
    return 0.0 if r.tune.tuner == "none" else 90.0 - ord("z") + ord(r.tune.tuner[0]) + 0.01 * seed


@pytest.fixture
def shown(tmp_home):
    "The view of a grid whose Prompt-DT rows have run."
    fabricate(tmp_home, exhibits.exhibit("grid", "prompt_dt"), "laptop", (0, 1, 2), good, spent={"tuning_seconds": 2.0})
    return View(exhibits.exhibit("grid", "grid"), "laptop", partial=True, whose="yours")


def test_a_cell_of_fewer_seeds_says_so():
    rows = [("a", 3, ""), ("b", 2, "1 diverged"), ("c", 3, "1 with failed episodes"), ("d", np.nan, "3 missing")]
    t = pd.DataFrame([dict(method=m, family="f", mean=1.0 + 0 * n, std=0.5, n=n, note=note) for m, n, note in rows])
    said = {m: text for (m, _), text in grid.cells_of(t).items()}
    assert said["a"] == "1.0 ± 0.5" and said["b"] == "1.0 ± 0.5 (n = 2; 1 diverged)"
    assert said["c"] == "1.0 ± 0.5 (1 with failed episodes)" and said["d"] == ""


def test_the_grid_has_eight_tuners_on_four_families_and_a_reason_in_every_hole(shown):
    printed, _ = grid.tuners(shown)
    families = list(shown.families)
    filled = printed[families].apply(lambda column: column.str.match(r"-?\d"))
    tuned = filled.drop(index=[f"Prompt-DT: {rc.grid.RANDOM}", f"Prompt-DT: {rc.grid.EXPERT}"])
    assert (tuned.sum(axis=1) >= 4).sum() >= 8
    assert printed[families].where(~filled).stack().dropna().str.fullmatch(r"\(.+\)").all()
    assert printed.loc["Prompt-DT: encoder, collected context", families[0]] == "(needs an encoder)"
    assert printed.loc["CMT: LoRA", families[0]] == "(missing)"


def test_the_grid_says_what_its_tuners_do_not_share():
    "The budgets of its protocol are those of its recipes; `encode` would repeat CMT's untuned row."
    budgets = {}
    for scale in ("paper", "desk", "laptop"):
        for tuner in ("diffuser", "direct", "context", "full", "ranking"):
            hyper = dict(rc.resolve(rc.RECIPES[f"grid/ant-dir/cmt-{tuner}"], scale).tune.hyper)
            budgets.setdefault(scale, {})[tuner] = hyper["steps"], hyper.get("prepare_steps", 0)
    for scale, large, small in (("paper", (400, 4000), 100), ("desk", (400, 1000), 100), ("laptop", (100, 300), 25)):
        writing = dict(diffuser=large, direct=large)
        assert budgets[scale] == writing | {tuner: (small, 0) for tuner in ("context", "full", "ranking")}
    text = rc.EXHIBITS["grid", "grid"].protocol
    assert "400 updates (laptop scale: 100) after 4,000" in text and "context vectors start at random ones" in text
    assert "encode" not in rc.grid.ROWS


@pytest.mark.parametrize("exhibit", ["table1", "table1_mw", "table3"])
def test_prompt_diffusers_tables_say_its_budget(exhibit):
    assert "400 updates (laptop scale: 100) after 4,000" in rc.EXHIBITS["prompt_diffuser", exhibit].protocol


def test_ranks_and_repair_are_those_of_the_returns(shown):
    values = grid.values_of(shown, "prompt-dt")
    ranked = grid.ranks(values)
    assert ranked.index[0] in ("soft prompt", "re-sampled prompts", "preference ranking") and ranked.n.eq(3).all()
    assert ranked.index[-1] == rc.grid.RANDOM and rc.grid.EXPERT not in ranked.index
    share = grid.repaired(values).mean()
    assert share["soft prompt"] == pytest.approx(0.83, abs=0.01) and share.max() < 1


def test_a_tuner_of_a_reader_appears_in_the_grid():
    code = """
from promptnb import recipes as rc
rc.enter("nudge", "a nudge", steps=7)
rows = [r for r in rc.RECIPES.values() if r.paper == "grid" and r.tune.tuner == "nudge"]
print(len(rows), {r.pretrain.name for r in rows} == {"prompt-dt", "prompt-mt-bc", "cmt"}, rows[0].tune.hyper)
print(rows[0].id in rc.EXHIBITS["grid", "grid"].recipes)
"""
    p = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert p.stdout.split("\n")[:2] == ["12 True (('steps', 7),)", "True"]


def test_an_empty_grid_says_so(tmp_home):
    view = View(exhibits.exhibit("grid", "grid"), "desk", partial=True, whose="yours")
    printed, tidy = grid.tuners(view)
    assert printed[list(view.families)].map(lambda x: x.startswith("(")).all(axis=None)
    figure, numbers = grid.repair(view)
    assert isinstance(tidy, pd.DataFrame) and numbers.empty and figure.axes


def test_a_claim_on_some_tasks_and_no_difference_of_two_papers():
    view = View(exhibits.exhibit(PTDT, "pdt_fig4"), "desk", partial=True, whose="shipped")
    every, one = [c for c in rc.PAPER_OF[PTDT].claims if c.exhibit == "pdt_fig4"]
    (all_tasks,), (outside,) = claims.comparisons(view, every), claims.comparisons(view, one)
    assert one.tasks == (1,) and outside["difference"] != all_tasks["difference"]
    assert all_tasks["published"] == 217 and np.isnan(outside["published"])  # of the mean alone
    improves = claims.answered(PTDT, "desk", "shipped")
    improves = improves[[c.text == "tuning improves an expert prompt" for c in improves.claim]]
    assert len(improves) == 3 and improves.published.isna().all()  # one of the two rows is in another's paper


def test_a_claim_on_the_mean_over_datasets():
    t = claims.answered("lamo", "laptop", "shipped")
    arms = t[[c.exhibit == "arms" for c in t.claim]]
    for _, g in arms.groupby(arms.claim.map(lambda c: c.text)):
        *each, mean = g.to_dict("records")
        assert len(each) == 5 and mean["over"] == tuple(r["where"] for r in each)
        assert np.isclose(mean["difference"], np.mean([r["difference"] for r in each]))


def here(bodies):
    "Of these bodies alone."
    return lambda r, seed: r.family in bodies


def test_what_has_run_changes_no_number_of_comparisons(tmp_home):
    "Of three bodies one has run, then all: a word for the first does not depend on that."
    asked = [claims.answered("lamo", "desk", "yours")]
    for bodies in (["hopper"], ["hopper", "walker2d", "reacher2d"]):
        test_scores.fabricate("arms", lambda r, seed: seed, keep=here(bodies), scale="desk")
        asked.append(claims.answered("lamo", "desk", "yours"))
    nothing, one, every = [[*t["where"]] for t in asked]
    assert nothing == one == every
    mean = [t[t["where"] == "mean of 3 datasets, little data"].n.max() for t in asked]
    assert mean == [0, 0, 3]
