"LaMo's settings at paper scale, each against the number of the paper or of its released code."

import pandas as pd
import pytest
import torch
from homes import ROOT

from promptnb import recipes as rc
from promptnb.core import Steps
from promptnb.experiments import offline, plan
from promptnb.experiments.run import Run
from promptnb.models.lm import LamoPolicy
from promptnb.models.pixels import PixelLamo
from promptnb.recipes import lamo as R
from promptnb.report import exhibits
from promptnb.report.lamo import label_of
from promptnb.train import FitConfig, optimiser, step_once

PAPER = rc.PAPER_OF["lamo"]
BODIES = ("hopper", "halfcheetah", "walker2d")


def at_paper(arm, family, quality="medium", ratio=0.1):
    return rc.resolve(R.offline_recipe(arm, family, quality, ratio), "paper")


def shown(id, dataset):
    "{label: resolved recipe} of an exhibit on one dataset, at paper scale."
    e = PAPER.exhibits[id]
    found = [rc.resolve(PAPER.recipes[i], "paper") for i in e.recipes]
    return {label_of(e, r): r for r in found if r.dataset == dataset}


# ---- baselines


@pytest.mark.parametrize("arm", R.BASIC)
@pytest.mark.parametrize("family", [*BODIES, "kitchen"])
def test_baselines_train_as_long_as_lamos_curves(arm, family):
    "LaMo, Figs. 9, 11, 12: CQL and IQL end at 95,000 to 100,000 updates; sec. 5.1: every 2,500, the last 20,000."
    x = at_paper(arm, family).offline
    assert (x.steps, x.steps // x.points, round(x.last * x.steps)) == (100_000, 2500, 20_000)


@pytest.mark.parametrize("arm", R.BASIC)
def test_a_million_updates_are_a_named_switch(arm):
    "CORL trains 1,000,000 updates; nothing else differs, and the last 20,000 count."
    short, long = (at_paper(name, "hopper").offline for name in (arm, f"{arm}-1m"))
    assert (long.steps, round(long.last * long.steps)) == (1_000_000, 20_000)
    changed = {k for k, v in vars(long).items() if v != getattr(short, k)}
    assert changed == {"steps", "points", "last"}


def test_baselines_of_reacher2d_and_breakout_train_as_lamo_there():
    "LaMo, App. D: 37,500 updates of Reacher2d, the last 12,500; 50,000 of Breakout, the last 10,000."
    for arm, family, want in (("cql", "reacher2d", (37_500, 12_500)), ("discrete-cql", "breakout", (50_000, 10_000))):
        x = at_paper(arm, family).offline
        assert (x.steps, round(x.last * x.steps)) == want


def test_discrete_baselines_have_their_own_batch_and_rate():
    "LaMo, Fig. 11: CQL at 6.25e-5, which is d3rlpy's default; its batch is 32, and BC's are 100 and 1e-3."
    for arm, want in dict.fromkeys(("discrete-cql", "bcq", "nfq"), (32, 6.25e-5)).items():
        x = at_paper(arm, "qbert").offline
        assert (x.batch, x.lr) == want, arm
    x = at_paper("discrete-bc", "qbert").offline
    assert (x.batch, x.lr) == (100, 1e-3)


# ---- data


def test_shares_of_human_data_are_of_all_that_there_are():
    "Kitchen's partial set has about 600 episodes; our script plays 100, and the smaller scales have their own number."
    for arm in ("lamo", "cql"):
        asked = {quality: at_paper(arm, "kitchen", quality).offline.episodes for quality in ("partial", "complete")}
        assert asked == dict(partial=10_000, complete=10_000)
        assert at_paper(arm, "kitchen", "expert").offline.episodes == 100
        for scale, episodes in (("desk", 20), ("laptop", 20), ("smoke", 2)):
            r = rc.resolve(R.offline_recipe(arm, "kitchen", "partial"), scale)
            assert r.offline.episodes == episodes


def test_all_human_data_do_not_make_the_script_play_more():
    "One rule collects a family's data, each quality with its own number of episodes."
    needs = {("expert", 100), ("partial", 10_000), ("complete", 10_000)}
    kitchen = plan.Collection("kitchen", "paper", needs, {"lamo"})
    human, ours = kitchen.rule().command.split(" && ")
    assert "--quality complete --quality partial --episodes 10000 --stamp" in human
    assert "--quality expert --episodes 100 --stamp" in ours


# ---- trunks


def test_two_kitchen_cells_of_table_1_have_gpt2_medium():
    "LaMo, Table 7: GPT-2 medium on Kitchen Complete 30 % and Partial 100 %, and nowhere else."
    wide = set()
    for i in PAPER.exhibits["table1"].recipes:
        r = rc.resolve(PAPER.recipes[i], "paper")
        if r.method == "LaMo":
            text = r.offline.text
            assert (text.layers, text.heads, text.width) in {(12, 12, 768), (24, 16, 1024)}
            wide |= {r.dataset} if text.width == 1024 else set()
    assert wide == {"kitchen complete 30%", "kitchen partial 100%"}


@pytest.mark.parametrize("dataset", ["kitchen complete 30%", "kitchen complete 50%", "kitchen partial 100%"])
def test_lamo_without_pretraining_has_the_same_trunk(dataset):
    "LaMo, Table 15: rows differ in the weights that the trunk begins with, and not in its size."
    lamo, random = (shown("table15", dataset)[label].offline for label in ("LaMo", "LaMo without pre-training"))
    assert random.text == lamo.text and dict(random.model)["init"] == "random"


@pytest.mark.parametrize("dataset", ["kitchen complete 30%", "kitchen complete 50%", "kitchen partial 100%"])
def test_figure_10_sets_one_trunk_beside_the_other(dataset):
    by_label = shown("fig10", dataset)
    widths = {label: r.offline.text.width for label, r in by_label.items()}
    assert widths == {"LaMo with GPT-2 small": 768, "LaMo with GPT-2 medium": 1024}
    known = exhibits.reported("lamo").query("exhibit == 'fig10' and family == @dataset")
    assert set(known.method) == set(widths)


# ---- DT


def tokens_at(arm, t):
    "Tokens (3, d) of one step at timestep t, in a small net with an arm's switches."
    own = dict(at_paper(arm, "hopper").offline.model) | dict(layers=1, heads=1, width=16, vocab=8)
    model = LamoPolicy(dict(state_dim=3, act_dim=2, max_timestep=9, **own), K=1).eval()
    g = torch.Generator().manual_seed(0)
    s, a, rtg = (torch.randn(1, 1, n, generator=g) for n in (3, 2, 1))
    one = Steps(s=s, a=a, rtg=rtg, t=torch.full((1, 1), t), mask=torch.ones(1, 1))
    with torch.no_grad():
        return model.tokens(one)[0], model.time.weight[t]


@pytest.mark.parametrize("arm, after", [("dt", True), ("wiki", True), ("lamo", True), ("dt-time-first", False)])
def test_the_timestep_is_added_after_the_layernorm(arm, after):
    "LaMo's class does so for every model (decision_transformer.py): without its vector tokens are normalised."
    torch.manual_seed(0)
    tokens, time = tokens_at(arm, 4)
    bare = tokens - time
    normal = torch.allclose(bare.mean(-1), torch.zeros(3), atol=1e-5) and torch.allclose(
        bare.var(-1, correction=0), torch.ones(3), atol=1e-2
    )
    assert normal == after


def test_dt_is_tuned_as_in_figure_11():
    "LaMo, Fig. 11: lr and weight decay 1e-4; experiment.py's default: 10,000 updates of warm-up."
    for family in (*BODIES, "kitchen", "reacher2d"):
        x = at_paper("dt", family).offline
        assert (x.lr, x.weight_decay, x.warmup) == (1e-4, 1e-4, 10_000), family
    sweep = {arm: at_paper(arm, "hopper").offline for arm in ("dt-lr-10", "dt-wd-10", "dt-wd-0.1")}
    told = {arm: (x.lr * x.lr_times, x.weight_decay, x.warmup) for arm, x in sweep.items()}
    assert told == {
        "dt-lr-10": (pytest.approx(1e-3), 1e-4, 10_000),
        "dt-wd-10": (1e-4, 1e-3, 10_000),
        "dt-wd-0.1": (1e-4, 1e-5, 10_000),
    }


# ---- AdamW


@pytest.mark.parametrize("arm, eps", [("lamo", 1e-6), ("text", 1e-6), ("wiki", 1e-6), ("dt", 1e-8), ("random", 1e-8)])
def test_eps_is_1e_6_where_a_pretrained_trunk_is_read(arm, eps):
    "srzer/LaMo-2023, experiment-d4rl/utils.py; its Atari code leaves AdamW's own 1e-8."
    run = Run(at_paper(arm, "hopper"), "paper")
    assert offline.fit_config(run).eps == eps
    if arm != "random":  # not an arm on Atari
        assert at_paper(arm, "qbert").offline.eps == 1e-8


def test_eps_reaches_the_step():
    "A gradient as small as eps halves AdamW's first step."

    class Tiny(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(1))

        def loss(self, batch):
            return (1e-6 * self.w).sum()

    moved = []
    for eps in (1e-12, 1e-6):
        model, config = Tiny(), FitConfig(lr=1.0, weight_decay=0.0, warmup=1, eps=eps)
        step_once(model, optimiser(model.parameters(), config), None, 0, config, "cpu")
        moved.append(-model.w.item())
    assert moved == pytest.approx([1.0, 0.5], rel=1e-3)


# ---- Atari


@pytest.mark.parametrize("family", R.GAMES)
def test_atari_is_the_released_configuration(family):
    "srzer/LaMo-2023, experiment-atari: clip 1.0, 4,096 steps an episode; DT at 3e-4 (Fig. 11) with weight decay 0.1."
    lamo, dt = (at_paper(arm, family).offline for arm in ("lamo", "dt"))
    assert lamo.clip == dt.clip == 1.0 and lamo.limit == dt.limit == 4096 and lamo.batch == dt.batch == 128
    assert (dt.lr, dt.weight_decay) == (3e-4, 0.1)
    assert all(at_paper(arm, family).offline.limit == 4096 for arm in R.DISCRETES)


@pytest.mark.parametrize("arm, width", [("dt", 768), ("dt-128", 128)])
def test_dt_on_atari_is_as_wide_as_the_misspelt_configuration_makes_it(arm, width):
    "experiment-atari/model.py says n_embed=128 where GPT-2 has n_embd: 3 layers, 1 head, 768 wide, GELU."
    own = dict(at_paper(arm, "qbert").offline.model)
    model = PixelLamo(dict(state_dim=4 * 84 * 84, act_dim=6, max_timestep=9, **own), K=2)
    shape = model.lm.trunk.config
    assert (shape.n_embd, shape.n_layer, shape.n_head) == (width, 3, 1)
    assert shape.activation_function == "gelu_new" and not model.config.norm_before_time


def test_a_laptop_has_dts_narrow_net():
    assert dict(rc.resolve(R.offline_recipe("dt", "breakout"), "laptop").offline.model)["width"] == 128
    assert dict(rc.resolve(R.offline_recipe("lamo", "breakout"), "laptop").offline.model) == R.ATARI_NET


def test_figure_11_has_its_qbert_panels():
    "DT at 3e-3, 3e-4, 3e-5 and CQL at 6.25e-4, -5, -6; the published labels are ours."
    rates = {label: r.offline.lr * r.offline.lr_times for label, r in shown("fig11", "qbert medium 10%").items()}
    assert rates == pytest.approx(
        {
            "DT": 3e-4,
            "DT, lr 3e-3": 3e-3,
            "DT, lr 3e-5": 3e-5,
            "CQL": 6.25e-5,
            "CQL, lr 6.25e-4": 6.25e-4,
            "CQL, lr 6.25e-6": 6.25e-6,
        }
    )
    known = exhibits.reported("lamo").query("exhibit == 'fig11' and family == 'qbert medium 10%'")
    assert set(known.method) == set(rates)


@pytest.mark.parametrize("scale", ["desk", "laptop"])
def test_figure_11_says_what_its_labels_mean_below_paper_scale(scale):
    "DT's rates keep their ratio to its own, 1e-3; weight decays and CQL's rates are as labelled."

    def at(family, arm, quality="medium", ratio=0.01):
        x = rc.resolve(R.offline_recipe(arm, family, quality, ratio), scale).offline
        return x.lr * x.lr_times, x.weight_decay

    assert [at("hopper", arm) for arm in ("dt", "dt-lr-10", "dt-wd-10")] == [(1e-3, 1e-4), (1e-2, 1e-4), (1e-3, 1e-3)]
    assert at("qbert", "dt-lr-3e-5", ratio=0.1)[0] == pytest.approx(1e-4)
    assert at("hopper", "cql-lr-10")[0] == pytest.approx(3e-3)
    text = PAPER.exhibits["fig11"].protocol
    assert "DT's own rate is 1e-3" in text and "ten times the paper's rate is 1e-2 there" in text


def test_qberts_cql_curves_are_in_percent():
    "Fig. 11 draws them as fractions: 0.193, 0.580, 0.597. Table 2 prints 62.0 for the setting that is used."
    known = pd.read_csv(ROOT / "data" / "reported" / "lamo.csv").query("exhibit == 'fig11'")
    cql = known[known.family.eq("qbert medium 10%") & known.method.str.startswith("CQL")].set_index("method")
    assert dict(cql.value) == {"CQL, lr 6.25e-6": 19.3, "CQL, lr 6.25e-4": 58.0, "CQL": 59.7}
    assert cql.source.str.contains("x 100").all()


def test_an_arm_of_atari_is_unknown_elsewhere():
    with pytest.raises(ValueError, match="unknown 'dt-128': did you mean"):
        R.offline_recipe("dt-128", "hopper")


# ---- what is published


def test_every_published_field_is_a_recipes():
    "No entry whose field no recipe has, or whose pattern fits none."
    for p in PAPER.published:
        values = []
        for r in filter(p.covers, PAPER.recipes.values()):
            try:
                values.append(rc.value_of(r, p.field))
            except KeyError:
                continue
        assert values, p


def test_no_control_of_ours_is_held_against_the_paper():
    for p in PAPER.published:
        for r in filter(p.covers, PAPER.recipes.values()):
            assert not r.key.split("-medium")[0].endswith(("-long", "-1m", "-fair", "drop-best", "time-first")), (
                p,
                r.id,
            )


def test_what_a_scale_changes_has_a_source():
    "Precision and the number of Kitchen's and Atari's episodes are ours."
    t = exhibits.deviations("lamo", "laptop").set_index("field")
    assert set(t.index[t.source == "ours"]) <= {"offline.precision", "offline.episodes"}


def test_paper_scale_differs_only_where_it_says():
    "Of the settings of the optimiser none; of the others those named here, each with both values."
    t = exhibits.differences("lamo")
    fields = {what for what in t.what if what.startswith("offline.") and not what.startswith("offline.text.")}
    assert fields == {
        "offline.targets",
        "offline.steps",
        "offline.drop_best",
        "offline.vocab",
        "offline.dropout",
        "offline.points",
        "offline.episodes",
    }
    texts = set(t.what[t.what.str.startswith("offline.text.")])
    assert texts >= {f"offline.text.{name}" for name in ("kind", "activation", "vocab")}
    standing = set(t.what) - fields - texts
    assert standing >= {"data", "weight of the language loss, lambda", "Atari: head", "Wiki-RL's k-means loss"}
    assert (t.source != "").all()
