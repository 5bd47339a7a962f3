"""Paper scale of Prompt-DT and of what builds on it, against the numbers of the papers and of the released code.

Sources: PromptDT.pdf (tables), mxu34/prompt-dt (files named), knight-fzq/mtdt by Prompt-Tuning DT's first author."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from promptnb import data
from promptnb import recipes as rc
from promptnb.experiments import multitask, plan
from promptnb.experiments.run import Run
from promptnb.models.dt import DTConfig, PromptDT
from promptnb.recipes.prompt_tuning_dt import TABLE_FAMILIES
from promptnb.report import exhibits

PTDT, PD = "prompt_tuning_dt", "prompt_diffuser"
EVERY = (*TABLE_FAMILIES, "ant-dir-ood", "ml1-pick-place", "ml1-reach")


def recipe(family, key, paper=PTDT, scale="paper"):
    "A recipe at a scale."
    return rc.resolve(rc.RECIPES[f"{paper}/{family}/{key}"], scale)


def store_of(returns, task=0, steps=12):
    "Trajectories of one task with these returns: the last reward is the return; states count the steps."
    rewards = np.zeros((len(returns), steps))
    rewards[:, -1] = returns
    states = np.arange(steps, dtype=float)[:, None]
    trajectories = [dict(observations=states, actions=np.zeros((steps, 1)), rewards=r) for r in rewards]
    return data.from_arrays(trajectories, [task] * len(returns))


def policy_for(store):
    "What `data.demos` reads of a policy."
    return SimpleNamespace(mean=torch.zeros(store.s.shape[1]), std=torch.ones(store.s.shape[1]), rtg_scale=1.0)


# ---- 1: MT-BC-FT, twice


def settings(r):
    "(updates, learning rate, batch, steps of a window, where windows lie, trajectories) of fine-tuning."
    h, t = dict(r.tune.hyper), r.tune
    return h["steps"], h["lr"], t.demo_batch, t.demo_K, t.demo_position, t.demos


@pytest.mark.parametrize("family", EVERY)
def test_the_released_mt_bc_ft(family):
    "pdt_main.py: finetune_steps 10, finetune_lr 1e-4, finetune_batch_size 256; the last prompt_length steps."
    length = 2 if family == "ml1-reach" else 5
    assert settings(recipe(family, "mt-bc-ft")) == (10, 1e-4, 256, length, "tail", 0)
    assert dict(recipe(family, "mt-bc-ft").tune.hyper)["weight_decay"] == 1e-4  # prompt_seq_trainer.py


def test_the_mt_bc_ft_of_table_7():
    "PromptDT.pdf Table 7: 100 steps, batch 1,280."
    assert settings(recipe("ant-dir", "mt-bc-ft-100")) == (100, 1e-4, 1280, 5, "tail", 0)


@pytest.mark.parametrize("scale", rc.SCALES)
def test_both_are_runs_of_their_own_at_every_scale(scale):
    a, b = (Run(recipe("ant-dir", key, scale=scale), scale) for key in ("mt-bc-ft", "mt-bc-ft-100"))
    assert a.id != b.id and a.pretraining().id == b.pretraining().id
    assert scale == "smoke" or settings(a.recipe)[0] < settings(b.recipe)[0]


def test_each_stands_beside_its_own_number():
    "Fig. 2 (by eye): -40, -160, 110. Table 7: 930, -32, 470."
    t = exhibits.reported(PTDT).query("exhibit == 'table1'").set_index(["method", "family"]).value
    assert [t["MT-BC-FT", f] for f in TABLE_FAMILIES] == [-40, -160, 110]
    assert [t["MT-BC-FT, 100 updates", f] for f in TABLE_FAMILIES] == [930, -32, 470]


def test_windows_of_fine_tuning_are_the_last_steps():
    "get_batch_finetune in prompt_utils.py: steps T-K-1 ... T-2."
    store = store_of(range(8))
    demos = data.demos(store, store, policy_for(store), n=0, K=5, batch=64, windows="tail")
    assert demos.batch(0).t.unique().tolist() == [6, 7, 8, 9, 10]
    anywhere = data.demos(store, store, policy_for(store), n=0, K=5, batch=64).batch(0)
    assert anywhere.t.unique().tolist() == list(range(12))
    with pytest.raises(Exception, match="windows.*tail"):
        data.demos(store, store, policy_for(store), windows="tial")


# ---- 3: prompts


def test_the_first_authors_pools():
    "create_dataset.py: random = 5 lowest returns, medium = ranks 50 to 54, expert = 5 highest, of the expert file."
    returns = np.random.default_rng(0).permutation(100).astype(float)
    store = store_of(returns)
    named = {name: rc.POOLS[name] for name in ("lowest", "middle", "highest")}
    assert {p.quality for p in named.values()} == {"expert"}
    got = {n: sorted(data.pool(store, p.first, p.count, p.ranked).returns.tolist()) for n, p in named.items()}
    assert got == dict(lowest=[0, 1, 2, 3, 4], middle=[50, 51, 52, 53, 54], highest=[95, 96, 97, 98, 99])


def test_the_start_of_the_replay_buffer():
    "PromptDT.pdf, Fig. 3: the first 500 trajectories; uniform actions stand in for the buffer's start."
    pool = rc.POOLS["buffer"]
    store = store_of(range(501, 0, -1))
    assert pool.quality == "random"
    assert data.pool(store, pool.first, pool.count, pool.ranked).returns.tolist() == list(range(501, 1, -1))


@pytest.mark.parametrize("n, held", [(54, 3), (20, 1), (4, 1), (1, 1)])
def test_few_trajectories_are_ranked_in_percent(n, held):
    "Of 20, the five lowest of 100 are one."
    spans = {name: data.rank_span(n, rc.POOLS[name].first, 5) for name in ("lowest", "middle", "highest")}
    assert {s.stop - s.start for s in spans.values()} == {held}
    assert spans["lowest"].start == 0 and spans["highest"].stop == n
    assert 0 <= spans["lowest"].start <= spans["middle"].start <= spans["highest"].start


def test_pools_are_of_each_task():
    store = data.join([store_of(range(10 * i, 10 * i + 10), task=i) for i in (1, 2)], None, mapped=False)
    assert data.pool(store, 0, 20).returns.tolist() == [10, 11, 20, 21]
    assert data.pool(store, -5, 10).returns.tolist() == [19, 29]


@pytest.mark.parametrize(
    "paper, family, key, quality",
    [
        (PTDT, "cheetah-dir", "pdt", "highest"),
        (PTDT, "cheetah-dir", "pdt-random", "lowest"),
        (PTDT, "cheetah-dir", "pdt-uniform", "random"),
        (PTDT, "ant-dir", "ranking", "highest"),
        (PTDT, "ant-dir", "ranking-random", "lowest"),
        (PTDT, "ant-dir", "ranking-uniform", "random"),
        (PTDT, "cheetah-vel", "ranking-medium", "middle"),
        (PTDT, "cheetah-vel", "hill", "highest"),
        (PTDT, "cheetah-vel", "prompt-dt", "expert"),
        (PTDT, "cheetah-vel", "pdt-expert-data-random-prompt", "buffer"),
        (PD, "cheetah-vel", "pdt-random", "lowest"),
        (PD, "cheetah-vel", "diffuser", "highest"),
        (PD, "cheetah-vel", "diffuser-medium-data-medium-prompt", "middle"),
        (PD, "cheetah-vel", "diffuser-uniform", "random"),
        (PD, "ant-dir-ood", "pdt-zero", "highest"),
    ],
)
def test_whose_prompt_a_row_starts_from(paper, family, key, quality):
    "The author's pools in his papers' tables, any expert in Prompt-DT's own, uniform actions as our control."
    r = recipe(family, key, paper)
    assert r.tune.prompt_quality == quality
    assert ("(control)" in r.method) == (quality == "random" or key == "hill")


def test_a_pool_is_cut_from_the_data_that_it_names(monkeypatch):
    "`lowest` prompts come from expert data, `buffer` from random data; demonstrations stay as they are."
    asked = []

    def stored(family, quality, task_ids, episodes):
        asked.append(quality)
        return data.join([store_of(range(20), task=i) for i in task_ids], None, mapped=False)

    monkeypatch.setattr(multitask, "stored", stored)
    p, scale = rc.Pretrain("cheetah-dir"), 20.0
    policy = SimpleNamespace(mean=torch.zeros(1), std=torch.ones(1), rtg_scale=scale)
    for quality, seen, returns in (("lowest", "expert", {0}), ("highest", "expert", {19}), ("buffer", "random", None)):
        asked.clear()
        demos = multitask.prompts_for(policy, p, rc.Tune(prompt_quality=quality), 0)
        assert asked == ["expert", seen]
        left = {round(x * scale) for x in demos.prompt.rtg[:, :, 0].flatten().tolist()}
        assert returns is None or left == returns
    assert plan.data_needs(rc.Recipe("p", "cheetah-dir", "m", "k", p, rc.Tune(prompt_quality="buffer"))) == {
        ("expert", 100),
        ("random", 100),
    }


# ---- 7: Meta-World


def test_reach_is_that_of_table_3():
    "PromptDT.pdf Table 3: K* = 2; Fig. 2: 3,000 iterations of 10 updates; text: 200 episodes."
    for key in ("prompt-dt", "mt-orl", "mt-bc-ft", "prompt-mt-bc"):
        p = recipe("ml1-reach", key).pretrain
        assert (p.steps, p.episodes, p.J * p.H) == (30_000, 200, 2 if p.prompt else 0)
    assert recipe("ml1-pick-place", "prompt-dt").pretrain.H == 5  # pdt_main.py


# ---- 8: initial weights, and the lowest trajectory


def test_residual_projections_begin_as_released():
    "transformers 4.5.1, on which mxu34/prompt-dt stands: std 0.02, not 0.02 / sqrt(2 layers), for every weight."
    for scaled, std in ((False, 0.02), (True, 0.02 / 6**0.5)):
        torch.manual_seed(0)
        net = PromptDT(DTConfig(20, 6, scaled_init=scaled))
        for block in net.blocks:
            for layer in (block.proj, block.out):
                assert layer.weight.std().item() == pytest.approx(std, rel=0.02)
            for layer in (block.q, block.kv, block.fc):
                assert layer.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert {r.pretrain.scaled_init for r in rc.PAPER_OF[PTDT].recipes.values()} == {False}


def test_the_initialisation_reaches_the_model_and_the_digest():
    p = rc.resolve(recipe("cheetah-dir", "prompt-dt"), "smoke").pretrain
    scaled = replace(p, scaled_init=True)
    stats = torch.zeros(20), torch.ones(20)
    plain, gpt2 = (multitask.new_policy(x, stats, 0).model.blocks[0] for x in (p, scaled))
    ratio = gpt2.out.weight / plain.out.weight
    assert torch.allclose(ratio, torch.full_like(ratio, (2 * p.layers) ** -0.5), rtol=1e-5)
    assert torch.equal(plain.q.weight, gpt2.q.weight)  # the same draws
    assert rc.digest(p) != rc.digest(scaled)


def test_histories_leave_out_the_lowest_trajectory():
    "process_dataset in prompt_utils.py stops one trajectory early; prompts and statistics are of all."
    store = data.join([store_of([3, 1, 2], task=i) for i in (0, 1)], None, mapped=False)
    p = rc.Pretrain("cheetah-dir")
    assert p.drop_lowest and multitask.histories(store, p).returns.tolist() == [3, 2, 3, 2]
    assert multitask.histories(store, replace(p, drop_lowest=False)) is store
    assert rc.digest(p) != rc.digest(replace(p, drop_lowest=False))
    assert data.drop_lowest(store_of([5])).returns.tolist() == [5]


def test_a_sampler_of_pre_training_cuts_prompts_from_all(monkeypatch):
    store = data.join([store_of([3, 1, 2], task=i) for i in (0, 1)], None, mapped=False)
    stats = torch.zeros(1), torch.ones(1)
    monkeypatch.setattr(multitask, "train_data", lambda p: SimpleNamespace(store=store, stats=stats, hashes=()))
    run = Run(rc.resolve(rc.RECIPES[f"{PTDT}/cheetah-dir/prompt-dt"], "smoke"), "smoke")
    now = multitask.Pretraining(run, multitask.train_data(None), None, None, SimpleNamespace(rtg_scale=1.0))
    sampler = now.sampler()
    assert sampler.store.returns.tolist() == [3, 2, 3, 2] and sampler.prompts.returns.tolist() == [3, 1, 2, 3, 1, 2]


# ---- 10: controls, windows, and the hyper-parameters of the author's code


def test_lora_is_a_control():
    "Neither paper has it."
    assert all(r.method == "LoRA (control)" for r in rc.PAPER_OF[PTDT].recipes.values() if r.tune.tuner == "lora")
    assert not [r for r in rc.PAPER_OF[PD].recipes.values() if r.tune.tuner == "lora"]


def test_windows_are_the_released_ones_and_their_alternative_is_named():
    "get_batch_finetune: as long as a prompt, 5, from the tail; whole windows of 20 are rows of a sweep."
    assert (rc.Tune().demo_K, rc.Tune().demo_position) == (5, "tail")
    for r in rc.PAPER_OF[PTDT].recipes.values():
        if r.tune.tuner != "none":
            assert (r.tune.demo_K, r.tune.demo_position) == (2 if r.family == "ml1-reach" else 5, "tail"), r.id
    sweep = [rc.RECIPES[i] for i in rc.EXHIBITS[PD, "sweep_window"].recipes]
    seen = {(r.family, r.key.split("-")[0], r.tune.demo_K, r.tune.demo_position) for r in sweep}
    windows = ((5, "tail"), (5, "any"), (20, "any"))
    assert seen == {(f, k, *w) for f in ("cheetah-vel", "ant-dir") for k in ("ranking", "diffuser") for w in windows}
    assert {r.key for r in sweep if r.tune.demo_position == "tail"} == {"ranking", "diffuser"}  # the main rows


def test_the_authors_defaults():
    "taming_trainer.py and create_dataset.py of knight-fzq/mtdt; mu and eta are ours, and are listed as such."
    r = recipe("cheetah-vel", "ranking")
    h = dict(r.tune.hyper)
    ours = {k: h[k] for k in ("m", "k", "momentum", "distribution", "linesearch", "batches")}
    assert ours == dict(m=15, k=0, momentum=0.5, distribution="gaussian", linesearch=False, batches=2)
    assert (r.tune.demos, r.tune.demo_batch, r.tune.score_episodes) == (256, 256, 2)


# ---- the tables of differences


def differing(paper):
    "{(field, ours, paper, code)} of the generated differences."
    t = exhibits.differences(paper)
    return set(t[["what", "ours", "paper", "code"]].itertuples(index=False, name=None))


def holds(r, field):
    "Has a recipe this field?"
    try:
        rc.value_of(r, field)
    except KeyError:
        return False
    return True


def test_what_differs_from_prompt_dt_is_listed():
    "PromptDT.pdf Table 2 against pdt_main.py: batch 8 and 16, evaluation episodes 20 and 50; A.6 of the audit."
    for paper in (PTDT, PD):
        assert {
            ("pretrain.per_task", "16", "8", "16"),
            ("pretrain.position", "tail", "random", "tail"),
            ("pretrain.loss_on_prompt", "False", "True", "False"),
            ("tune.mu", "0.1", "not said", "1.0"),
            ("tune.eta", "0.5", "not said", "0.0001"),
            ("tune.seven", "False", "True", "True"),
        } <= differing(paper)


def test_what_agrees_is_not_listed():
    fields = {what for what, *_ in differing(PTDT)}
    assert not fields & {"pretrain.K", "pretrain.lr", "pretrain.steps", "pretrain.H", "tune.m", "tune.demo_K"}


def test_a_wrong_value_at_paper_scale_is_listed(monkeypatch):
    name = f"{PTDT}/ml1-reach/prompt-dt"
    r = rc.RECIPES[name]
    monkeypatch.setitem(rc.PAPER_OF[PTDT].recipes, name, replace(r, pretrain=replace(r.pretrain, H=5)))
    assert ("pretrain.H", "5", "2", "not said") in differing(PTDT)


@pytest.mark.parametrize("paper", [PTDT, PD])
def test_every_setting_of_a_printed_row_is_published_or_ours(paper):
    "Fields that no paper could fix are named here; all others are compared."
    ours = {f"pretrain.{k}" for k in ("name", "family", "precision", "ratio", "ratio_seed", "use_rtg", "prompt")}
    ours |= {f"pretrain.{k}" for k in ("context", "train", "tanh")} | {"target"}
    ours |= {f"tune.{k}" for k in ("tuner", "play", "per_agent", "online", "keep", "alpha", "r", "source")}
    of = rc.PAPER_OF[paper]
    for key in ("pdt", "full", "soft", "adapter", "ranking", "diffuser"):
        r = of.recipes.get(f"{paper}/cheetah-vel/{key}")
        if r is None:
            continue
        known = {p.field for p in of.published if p.covers(r)}
        fields = {f"{part}.{k}".lstrip(".") for part, own in exhibits.parts_of(r).items() for k in own}
        if r.tune.tuner == "none":
            fields = {f for f in fields if not f.startswith("tune.")}
        assert fields - known - ours <= {"tune.prompt_from", "tune.score_episodes", "tune.clip"}, key


@pytest.mark.parametrize("paper", rc.PAPERS)
def test_every_published_field_is_a_recipes_of_every_paper(paper):
    "A misspelt field, or a pattern that fits no recipe, would leave a difference out without a word."
    of = rc.PAPER_OF[paper]
    for p in of.published:
        assert any(holds(r, p.field) for r in of.recipes.values() if p.covers(r)), p


def test_entries_that_say_the_same_are_one_row():
    "LaMo's settings by task are published for LaMo's arms and for DT's; the table has each once, with its family."
    t = exhibits.differences("lamo")
    targets = t[t.what == "offline.targets"]
    assert not targets.duplicated(["ours", "paper", "code"]).any()
    (row,) = targets[targets.ours == "(4.0, 5.0)"].recipes
    assert row.endswith(": kitchen") and int(row.split(":")[0]) > 16


@pytest.mark.parametrize("paper, exhibit", [(PTDT, "table1"), (PTDT, "table1_mw"), (PD, "table1"), (PD, "table1_mw")])
def test_a_table_says_whose_prompts_it_has(paper, exhibit):
    "create_dataset.py of the first author; the texts of both papers could not be had."
    text = rc.EXHIBITS[paper, exhibit].protocol
    assert "the five highest, ranks 50 to 54, the five lowest" in text and "could not be had" in text


@pytest.mark.parametrize("exhibit", ["pdt_table1", "pdt_fig4"])
def test_prompt_dts_own_tables_have_any_expert_prompt(exhibit):
    "PromptDT.pdf: the prompt set is sampled from the expert data."
    e = rc.EXHIBITS[PTDT, exhibit]
    prompted = [rc.RECIPES[i] for i in e.recipes if rc.RECIPES[i].pretrain.prompt]
    assert {r.tune.prompt_quality for r in prompted} == {"expert"}
    assert "any of the test task's expert trajectories" in e.protocol


# ---- how many demonstrations differ


@pytest.mark.parametrize("scale, usable", [("paper", 99), ("desk", 19), ("laptop", 19)])
@pytest.mark.parametrize("key", ["mt-bc-ft-128", "mt-bc-ft", "mt-bc-ft-100"])
def test_batches_of_all_sizes_draw_from_the_same_windows(key, scale, usable):
    "At the tail a trajectory has one window; the lowest trajectory has none."
    r = recipe("ant-dir", key, scale=scale)
    store = multitask.histories(store_of(range(r.pretrain.episodes), steps=30), r.pretrain)
    demos = data.demos(store, store, policy_for(store), **multitask.windows_as(r.tune), H=5)
    ends = [demos.batch(t).rtg[0, :, -1, 0] for t in range(10)]
    assert len(store) == usable and len(torch.cat(ends).unique()) <= usable


@pytest.mark.parametrize("exhibit", ["pdt_fig7", "pdt_table7"])
def test_more_data_says_that_it_is_not(exhibit):
    text = rc.EXHIBITS[PTDT, exhibit].protocol
    assert "99 at paper scale, 19 at desk and laptop scale, whatever the batch" in text


def test_few_shot_is_nearly_all_of_a_task():
    "256 draws with replacement reach all of 19 trajectories and at least 85 of 99."
    for n, least in ((19, 19), (99, 85)):
        store = store_of(range(n))
        for seed in range(3):
            drawn = data.demos(store, store, policy_for(store), n=256, K=5, H=5, windows="tail", seed=seed)
            assert least <= len(drawn.sampler.store) <= n


@pytest.mark.parametrize("paper, exhibit", [(PTDT, "table1"), (PTDT, "controls"), (PD, "table1"), (PD, "table1_mw")])
def test_a_table_says_how_few_its_demonstrations_are(paper, exhibit):
    assert "so nearly all of them" in rc.EXHIBITS[paper, exhibit].protocol


@pytest.mark.parametrize("quality", ["highest", "middle", "lowest"])
def test_seeds_share_a_prompt_where_a_pool_is_one_trajectory(quality):
    "At desk and laptop scale: `rank_span` of 20. Of 100 a pool holds five."
    p = rc.POOLS[quality]
    for n, count in ((20, 1), (100, 5)):
        store = data.pool(store_of(range(n)), p.first, p.count)
        assert len(store) == count
        prompts = [data.demos(store, store, policy_for(store), n=0, K=5, H=5, seed=i).prompt for i in range(9)]
        assert (len({float(x.rtg[0, 0, 0]) for x in prompts}) == 1) == (count == 1)


@pytest.mark.parametrize("exhibit", ["table1", "ablation_init", "story", "table1_mw"])
def test_a_table_says_that_seeds_share_a_prompt(exhibit):
    text = rc.EXHIBITS[PTDT, exhibit].protocol
    assert "all seeds have the same prompt there" in text and "no variation of the prompt" in text


# ---- what the normaliser of states has read


def normalisers(paper, exhibit, prefix=""):
    "{normalise} of the rows of an exhibit whose keys begin so."
    rows = [rc.RECIPES[i] for i in rc.EXHIBITS[paper, exhibit].recipes]
    return {r.pretrain.normalise for r in rows if r.key.startswith(prefix)}


def test_zero_shot_says_that_the_normaliser_is_of_test_tasks_too():
    assert normalisers(PD, "table3") == {"train+test"}
    text = rc.EXHIBITS[PD, "table3"].protocol
    assert "nothing of the test tasks" not in text and "normalise states are of train and test tasks" in text


@pytest.mark.parametrize("exhibit", ["range", "meta"])
def test_cmt_says_whose_normaliser_has_read_the_test_tasks(exhibit):
    assert normalisers("cmt", exhibit, "cmt") == {"train"} and normalisers("cmt", exhibit, "pdt") == {"train+test"}
    assert "by the test tasks too, as released" in rc.EXHIBITS["cmt", exhibit].protocol
