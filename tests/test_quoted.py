"LaMo's tables of settings, the tables that quote methods or games not run here, and the pictures of its tasks."

import numpy as np
import pytest
import test_scores
from PIL import Image
from torch import nn

from promptnb import cli as command
from promptnb import collect, tasks
from promptnb import recipes as rc
from promptnb.models.lm import LMConfig, Residual
from promptnb.models.pixels import LAYERS, PixelConfig
from promptnb.report import exhibits, lamo, view
from promptnb.report.view import View

QUOTED = ("table4", "table6", "table7", "table10", "table12", "fig8")


def made(id, scale="laptop"):
    "(the printed table or the figure, its caption), made and saved."
    return exhibits.drawn(View(view.exhibit("lamo", id), scale))


def numbers(id):
    "An exhibit's tidy numbers."
    e = view.exhibit("lamo", id)
    return lamo.DRAW[e.kind](View(e, "laptop"))[1]


def test_a_drawing_is_all_that_is_left_out():
    assert [e.id for e in rc.exhibits("lamo") if e.unknown] == ["fig2"]


@pytest.mark.parametrize("id", QUOTED)
def test_rendered_without_any_run(id, tmp_home):
    _, caption = made(id)
    folder = View(view.exhibit("lamo", id), "laptop").folder
    assert caption.startswith(view.exhibit("lamo", id).title)
    assert (folder / f"{id}.{'png' if id == 'fig8' else 'md'}").stat().st_size > 500


# ---- settings

TABLE6 = """\
kitchen     1e-4 1e-5 20 4,5         100000
reacher2d   1e-4 1e-5 5  40,76       100000
hopper      1e-4 1e-5 20 1800,3600   100000
halfcheetah 1e-4 1e-5 20 8000,12000  100000
walker2d    1e-4 1e-5 20 2500,5000   100000
breakout    1e-3 1e-2 30 90,120      50000
qbert       1e-3 1e-5 30 14000       100000
pong        3e-4 1e-1 30 10,20       100000"""  # the camera-ready, Table 6


def test_table_6_is_the_papers():
    "Every number of the camera-ready's Table 6."
    found = {}
    for line in TABLE6.splitlines():
        task, lr, decay, k, targets, steps = line.split()
        goals = tuple(map(float, targets.split(",")))
        found[task] = dict(lr=float(lr), weight_decay=float(decay), K=int(k), targets=goals, steps=int(steps))
    assert rc.lamo.TABLE6 == found


def test_our_settings_are_table_6s_but_for_reacher2d():
    "Reacher2d trains for the 37,500 updates of App. D, where Table 6 prints 100,000."
    t = numbers("table6")
    assert t[t.differs][["task", "setting", "published", "ours"]].values.tolist() == [
        ["reacher2d", "updates", "100K", "37.5K"]
    ]
    assert "ours: 37.5K (App. D)" in made_text("table6")


def made_text(id):
    "What is printed, as text."
    return made(id)[0].to_string()


def test_a_setting_that_differs_is_marked(tmp_home, monkeypatch):
    monkeypatch.setitem(rc.lamo.TABLE6["qbert"], "K", 31)
    t = numbers("table6").set_index(["task", "setting"])
    assert t.loc[("qbert", "K"), ["published", "ours", "differs"]].tolist() == ["31", "30", True]


def test_the_models_have_what_table_7_says_of_them():
    "Defaults that no recipe gives: rank 16 and 32, dropout 0.1, a CNN of 32, 64, 64 channels and kernels 8, 4, 3."
    row = {x.name: x for x in rc.lamo.TABLE7}
    config = LMConfig(3, 2)
    assert (row["rank of LoRA"].default, row["dropout"].default) == (config.r, config.dropout)
    assert row["rank of LoRA"].atari == PixelConfig(4 * 84 * 84, 4).r == 32
    assert row["CNN layers"].default == len(LAYERS)
    assert row["CNN channels"].default == tuple(channels for channels, _, _ in LAYERS) == (32, 64, 64)
    assert row["CNN kernels"].default == tuple(kernel for _, kernel, _ in LAYERS) == (8, 4, 3)
    linear = [m for m in Residual(3, 8).modules() if isinstance(m, nn.Linear)]
    assert row["layers of an embedding's MLP"].default == len(linear) == 2


def test_table_7_differs_in_the_embeddings_alone():
    "12 layers of width 768, batch 64 and 128, dropout 0.1; the paper's MLP has 3 layers, the released code's has 2."
    t = numbers("table7")
    assert t[t.differs][["setting", "published", "ours"]].values.tolist() == [
        ["layers of an embedding's MLP", "3", "2"]
    ]
    found = t.set_index(["setting", "tasks"]).ours
    assert found["batch size"].tolist() == ["64", "128"]
    assert found["hidden size, GPT-2 medium"].tolist() == ["1024"]


@pytest.mark.parametrize("key, steps", [("reacher2d/lamo-medium-0.1", 37_500), ("breakout/lamo-medium-1", 50_000)])
def test_table_6_is_among_the_differences(key, steps):
    "Paper scale is compared with the table: what it does otherwise is generated, not written by hand."
    recipe = rc.resolve(rc.RECIPES[f"lamo/{key}"], "paper")
    (found,) = [p for p in rc.PAPER_OF["lamo"].published if p.field == "offline.steps" and p.covers(recipe)]
    assert rc.value_of(recipe, found.field) == steps and not found.agrees(steps)


# ---- quoted tables


@pytest.mark.parametrize("id", ["table4", "table10", "table12"])
def test_quoted_values_are_the_published_ones(id, tmp_home):
    "Each row of the paper's table, once, in its order; nothing of ours without runs."
    t, rep = numbers(id), view.reported("lamo")
    rep = rep[rep.exhibit == id]
    assert t[["method", "dataset"]].values.tolist() == rep[["method", "family"]].values.tolist()
    assert t.elsewhere.tolist() == rep.value.tolist()
    assert t["mean"].isna().all() and (made(id)[0].ours == "-").all()


def test_ours_of_other_tables_stand_in_a_quoted_one(tmp_home):
    "LaMo's runs of Table 3 stand beside Diffusion-QL's published values, by however many seeds there are."
    test_scores.fabricate("table3", lambda r, seed: 40 + seed, seeds=(0, 1))
    t = numbers("table12").set_index(["dataset", "method"])
    own = t.loc[("hopper medium 1%", "LaMo")]
    assert (own["mean"], own.n, own.elsewhere) == (40.5, 2, 52.0)
    assert np.isnan(own.difference)  # of other data
    assert t.xs("Diffusion-QL", level="method")["mean"].isna().all()


def test_table_10_says_what_it_needs(tmp_home):
    assert "the data are yours" in made("table10")[1]
    assert "promptnb collect --family freeway --quality medium" in made("table10")[1]


def test_table_10_runs_at_paper_scale():
    "Six methods on 10 % of each game; scores by the random and human returns 0 / 29.6 and 210 / 8503.3 (get_hns.py)."
    e = view.exhibit("lamo", "table10")
    assert not rc.recipes_of(e, "laptop")
    assert [(r.dataset, r.method) for r in rc.recipes_of(e, "paper")][:6] == [
        ("freeway medium 10%", m) for m in ("LaMo", "DT", "Wiki-RL", "CQL", "BCQ", "NFQ")
    ]
    assert len(rc.recipes_of(e, "paper")) == 12
    assert [tasks.family(f).references for f in e.families] == [(0.0, 29.6), (210.0, 8503.3)]


def test_its_data_are_asked_for_in_one_line(tmp_home, monkeypatch, capsys):
    monkeypatch.setenv("PROMPTNB_DQN_REPLAY", str(tmp_home / "replay"))
    assert command.main(["collect", "--family", "asterix"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert str(tmp_home / "replay" / "Asterix" / "1" / "replay_logs") in said and "_ckpt.10.gz" in said


# ---- pictures


def test_a_strip_is_a_row_of_pictures(tmp_path, monkeypatch):
    frames = np.stack([np.full((84, 84), grey, np.uint8) for grey in (0, 100, 200)])
    monkeypatch.setattr(collect, "strip", lambda *a: (frames, np.arange(3)))
    collect.save_strip(tasks.family("pong"), "expert", tmp_path / "pong.strip.png")
    saved = np.asarray(Image.open(tmp_path / "pong.strip.png").convert("L"))
    assert saved.shape == (collect.HEIGHT, 3 * collect.HEIGHT + 2 * collect.GAP)
    middle = collect.HEIGHT // 2
    assert saved[middle, [middle, middle + 198, middle + 396]].tolist() == [0, 100, 200]
    assert saved[middle, collect.HEIGHT] == 255  # the gap


def test_nothing_is_saved_where_nothing_renders(tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "strip", lambda *a: None)
    collect.save_strip(tasks.family("hopper"), "expert", tmp_path / "hopper.strip.png")
    assert not list(tmp_path.iterdir())


def test_a_task_without_a_strip_says_how_to_get_one(tmp_home):
    fig, _ = lamo.pictures(View(view.exhibit("lamo", "fig8"), "laptop"))
    said = [text.get_text() for ax in fig.axes for text in ax.texts]
    assert len(said) == 8 and "promptnb collect\n--family hopper --page" in said


def test_all_strips_ship():
    fig, _ = lamo.pictures(View(view.exhibit("lamo", "fig8"), "laptop"))
    assert [ax.get_title() for ax in fig.axes if not ax.images] == []
