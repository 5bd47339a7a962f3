"The language adapter: which rows it is tuned on, what tuning changes and what it must not, and that neither a kill nor a network matters."

import os
import random
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("trl")
from promptnb.core import PromptnbError, append_jsonl, read_json, sha256_file
from promptnb.llm import PARENTS, Request, exchanges, parse
from promptnb.llm import adapter as A
from promptnb.llm.adapter import (
    SFT,
    TARGETS,
    encoded,
    load_lm,
    random_scenes,
    sft_rows,
    shares,
    split,
    teach,
    tiny,
    tune,
)
from promptnb.llm.backends import Local

SMALL = dict(rows=300, steps=40, warm=10, held=8)
TOY = SFT(r=8, alpha=16, lr=5e-3, whole_text=False)


def rows(n, seed="toy"):
    return [dict(prompt=r["prompt"], response=r["response"]) for r in teach("adapter", random_scenes(n, seed))]


def no_network(monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *a: pytest.fail("asked the network"))


def refused(f, *a, says=(), **k):
    "f must raise a PromptnbError of one line that has all of `says`."
    with pytest.raises(PromptnbError) as e:
        f(*a, **k)
    assert "\n" not in str(e.value) and all(s in str(e.value) for s in says), str(e.value)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny("adapter", tmp_path_factory.mktemp("lm") / "base", **SMALL)


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    "(folder, facts) of the base, tuned on 60 rows."
    folder = tmp_path_factory.mktemp("lm") / "tuned"
    return folder, tune(base, rows(60), folder, TOY)


def weights(folder):
    return load_lm(folder).state_dict()


# ---- scenes and the teacher


def test_scenes_obey_the_tech_tree():
    for s in random_scenes(300, 1):
        done, have = set(s["unlocked"]), s["status"]
        assert all(set(PARENTS[a]) <= done for a in done) and len(s["unlocked"]) == len(done)
        assert all(f"make_{t}" in done for t in A.TOOLS if t in have) and all(
            f"collect_{g}" in done for g in A.GOODS if g in have
        )
        assert all(0 < v <= 9 for v in have.values()) and have["health"] >= 1 and not {"none", "player"} & {*s["seen"]}
        assert all(MADE in done for k, MADE in A.MADE.items() if k in s["seen"]) and set(A.evident(s)) <= done


def test_the_teacher_says_what_the_prompt_shows():
    "Two scenes with the same prompt get the same goals: what no prompt says, the teacher does not use."
    s = random_scenes(200, 2)
    blind = [dict(x, unlocked=()) for x in s]
    assert A.rule_goals(s) == A.rule_goals(blind) and all(len(g) == 3 for g in A.rule_goals(s))
    for r in teach("adapter", s):
        assert A.named_goals(r["response"]) == r["goals"] and len(r["response"]) < 200
    told = [r for r in teach("decision", s) if "analysis:" in r["prompt"][1]["content"]]
    assert 60 < len(told) < 140 and all(
        A.named_goals(r["prompt"][1]["content"]) == r["goals"] == parse(r["response"])[0] for r in told
    )
    assert (
        sum(r["goals"] not in A.rule_goals(s) for r in told) > 20
    )  # goals that no rule would give: only the analysis has them


# ---- which rows, and how often

LOG = [
    dict(prompt=[dict(role="user", content=str(i))], response=z, l=l, l_after=after, unlocked_after=new)
    for i, (z, l, after, new) in enumerate(
        [
            ("a", 0.5, 0.4, []),
            ("b", 0.5, 0.6, ["collect_wood"]),
            ("c", 0.5, None, []),
            ("d", 0.5, 0.9, []),
            ("e", 0.5, 0.5, ["wake_up", "eat_cow"]),
            (None, 0.1, 0.9, ["sleep"]),
            ("f", None, 0.9, []),
        ]
    )
]


def test_targets():
    said = {t: "".join(r["response"] for r in sft_rows(LOG, t)) for t in TARGETS}
    assert (said["own"], said["gain"], said["achievements"]) == ("abcdef", "bd", "bee") and said["gain-weighted"] in (
        "dd",
        "bd",
    )
    assert sum(
        "".join(r["response"] for r in sft_rows(LOG, "gain-weighted", s)).count("d") for s in range(200)
    ) == pytest.approx(200 * 2 * 0.8, abs=12)
    assert all(set(r) == {"prompt", "response"} for t in TARGETS for r in sft_rows(LOG, t))
    assert (
        all(sft_rows(x, t) == [] for t in TARGETS for x in ([], LOG[5:6])) and sft_rows(LOG[:1], "gain-weighted") == []
    )
    refused(sft_rows, LOG, "achievement", says=["did you mean 'achievements'"])


def test_shares_are_whole_and_of_the_right_sum():
    rng = np.random.default_rng(0)
    for i in range(200):
        w = rng.random(rng.integers(1, 30)) * (rng.random() < 0.9) * rng.integers(0, 2, 1)
        n = int(rng.integers(0, 40))
        k = shares(w, n, i)
        if w.sum():
            assert k.sum() == n and (np.abs(k - w / w.sum() * n) < 1 + 1e-6).all() and (k[w == 0] == 0).all()
        else:
            assert (k == 0).all()


def test_split_keeps_the_order():
    for n in (2, 3, 9, 10, 11, 100, 10_000):
        a, b = split(list(range(n)))
        assert a + b == list(range(n)) and len(b) == max(1, n - int(0.9 * n)) and a
    assert [len(x) for x in split(range(10_000))] == [9000, 1000]


def test_rows_from_a_real_log(tmp_path):
    def new(step, l, done, z):
        return dict(env=0, step=step, episode=0, prompt=[], response=z, did="noop", l=l, unlocked=done)

    path = tmp_path / "log.jsonl"
    append_jsonl(path, new(0, 0.5, [], "x"), new(100, 0.7, ["eat_cow"], "y"), new(200, 0.2, ["eat_cow"], "z"))
    log = exchanges(path)
    assert [[r["response"] for r in sft_rows(log, t)] for t in TARGETS] == [["x", "y", "z"], ["x"], ["x"], ["x"]]


# ---- labels


def test_loss_is_on_the_reply_or_on_all(base):
    from transformers import AutoTokenizer

    tok = AutoTokenizer.from_pretrained(base)
    (r,) = rows(1)
    (x,) = encoded(tok, [r])
    assert tok.decode([i for i in x["labels"] if i >= 0]) == r["response"] + "<|end|>"
    assert tok.decode([i for i, l in zip(x["input_ids"], x["labels"]) if l < 0]).endswith("<|assistant|>")
    assert (
        encoded(tok, [r], whole_text=True)[0]["labels"] == x["input_ids"]
        and len(encoded(tok, [r], longest=9)[0]["labels"]) == 9
    )
    assert all(
        tok.encode(g, add_special_tokens=False) == [tok.convert_tokens_to_ids(g.replace(" ", "Ġ"))]
        for g in ("drink water", "sleep", "chop tree")
    )


def test_shared_beginning_changes_no_loss(base):
    "The system line, computed once for all rows, gives the loss that each whole row gives."
    from transformers import AutoTokenizer

    tok = AutoTokenizer.from_pretrained(base)
    lm = load_lm(base).eval()
    data = encoded(tok, rows(5))
    with torch.no_grad():
        fast, n = A.reply_loss(lm, data).item(), [sum(l >= 0 for l in d["labels"]) for d in data]
        slow = [
            lm(input_ids=torch.tensor([d["input_ids"]]), labels=torch.tensor([d["labels"]])).loss.item() for d in data
        ]
    assert fast == pytest.approx(np.average(slow, weights=n), abs=1e-5)


# ---- tiny models


def test_tiny_is_the_same_again(base, tmp_path):
    "Same settings, same weights; whoever draws random numbers around it draws the same."
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    first = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    again = tiny("adapter", tmp_path / "again", **SMALL)
    assert (torch.rand(1), random.random(), np.random.rand()) == first
    assert sha256_file(again / "model.safetensors") == sha256_file(base / "model.safetensors")
    facts = read_json(base / "facts.json")
    assert facts["held_loss"] < 1.5 < np.log(300) and {"valid", "agree", "overlap", "parameters", "seconds"} <= set(
        facts
    )
    refused(
        tiny,
        "adapter",
        tmp_path / "again",
        **SMALL | dict(seed=1),
        says=["holds another model", "seed: 0 there, 1 here"],
    )
    refused(tiny, "adaptor", says=["did you mean 'adapter'"])
    refused(tiny, "adapter", step=3, says=["did you mean 'steps'"])


def test_tiny_answers_fast_enough_and_goals_only(base):
    "Nothing here is about how good it is: notebooks say that. A reply ends, and no text is outside the vocabulary."
    import time

    lm = Local(base)
    ask = [Request(r["prompt"], 24, 0.6, i) for i, r in enumerate(rows(8))]
    lm.complete(ask)
    start = time.process_time()
    replies = lm.complete(ask)
    assert time.process_time() - start < 3
    assert all(r.ok and r.tokens_out <= 24 and r.text for r in replies) and [r.text for r in lm.complete(ask)] == [
        r.text for r in replies
    ]


# ---- tuning


def test_tuning_lowers_the_loss_and_moves_little(base, tuned):
    folder, facts = tuned
    assert facts["eval_after"] < facts["eval_before"] - 0.05 and (facts["rows"], facts["held"], facts["steps"]) == (
        54,
        6,
        14,
    )
    a, b = weights(base), weights(folder)
    moved = {k for k in a if not torch.equal(a[k], b[k])}
    assert (
        moved
        and all(k.endswith(("q_proj.weight", "v_proj.weight")) for k in moved)
        and len(moved) == 4
        and set(a) == set(b)
    )
    assert facts["trainable"] == 2 * 2 * 8 * (128 + 128)


def test_merged_is_base_plus_lora(base, tuned):
    from peft import PeftModel
    from transformers import AutoTokenizer

    ids = torch.tensor([encoded(AutoTokenizer.from_pretrained(base), rows(1))[0]["input_ids"]])
    with torch.no_grad():
        two, one = (
            PeftModel.from_pretrained(load_lm(base), tuned[0] / "lora").eval()(input_ids=ids).logits,
            load_lm(tuned[0]).eval()(input_ids=ids).logits,
        )
    assert (one - two).abs().max() < 1e-4 < (one - load_lm(base).eval()(input_ids=ids).logits).abs().max()


def test_tuned_folder_is_an_ordinary_one(base, tuned):
    files = sorted(str(p.relative_to(tuned[0])) for p in tuned[0].rglob("*") if p.is_file())
    assert {Path(f).suffix for f in files} <= {".json", ".safetensors", ".txt", ".jinja"} and {
        "model.safetensors",
        "tokenizer.json",
        "generation_config.json",
        "chat_template.jinja",
        "facts.json",
    } <= {*files}
    assert read_json(tuned[0] / "generation_config.json")["do_sample"] is True
    r = Local(tuned[0]).complete([Request(rows(1)[0]["prompt"], 24, 0)])[0]
    assert r.ok and r.text
    assert (tuned[0] / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_tuning_again_reads_what_is_there(base, tuned, monkeypatch):
    monkeypatch.setattr(A, "fit_lora", lambda *a: pytest.fail("trained again"))
    assert tune(base, rows(60), tuned[0], TOY) == tuned[1]
    refused(tune, base, rows(61), tuned[0], TOY, says=["holds another model", "rows"])
    refused(tune, base, rows(60), tuned[0], replace(TOY, lr=1e-3), says=["config.lr: 0.005 there, 0.001 here"])


def test_same_seed_same_weights_no_network(base, tuned, tmp_path, monkeypatch):
    no_network(monkeypatch)
    torch.manual_seed(5)
    first = torch.rand(1)
    torch.manual_seed(5)
    tune(base, rows(60), tmp_path / "again", TOY)
    assert sha256_file(tmp_path / "again" / "model.safetensors") == sha256_file(
        tuned[0] / "model.safetensors"
    ) and torch.equal(torch.rand(1), first)


def test_whole_text_and_a_bounded_run(base, tmp_path):
    facts = tune(base, rows(30), tmp_path / "whole", replace(TOY, whole_text=True, max_steps=2))
    assert facts["steps"] == 2 and facts["eval_after"] < facts["eval_before"]


def test_what_cannot_be_tuned_is_said_in_a_line(base, tmp_path, monkeypatch):
    refused(tune, base, rows(1), tmp_path / "x", says=["1 row(s)", "at least 2"])
    refused(tune, tmp_path / "none", rows(2), tmp_path / "x", says=["no folder on this machine"])
    refused(tune, base, rows(2), tmp_path / "x", replace(TOY, quantise="nf5"), says=["did you mean 'nf4'"])
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    refused(tune, base, rows(2), tmp_path / "x", replace(TOY, quantise="nf4"), says=["pip install bitsandbytes"])
    assert not (tmp_path / "x").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    refused(tune, base, rows(2), tmp_path / "full", TOY, says=["no model made here"])


def test_four_bits(base, tmp_path):
    pytest.importorskip("bitsandbytes")
    facts = tune(base, rows(20), tmp_path / "q", replace(TOY, quantise="nf4", max_steps=3))
    a, b = weights(base), weights(tmp_path / "q")
    assert (
        facts["steps"] == 3
        and all(torch.equal(a[k], b[k]) for k in a if not k.endswith(("q_proj.weight", "v_proj.weight")))
        and any(not torch.equal(a[k], b[k]) for k in a)
    )


def test_killed_while_saving(base, tmp_path):
    "kill -9 in the middle of the save: no folder under the name; the next call finishes it and is no worse for it."
    code = textwrap.dedent(f"""
        import os, signal, sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
        import test_adapter as t; from promptnb.llm import adapter as A
        def killed(base, lora, folder): (folder/"model.safetensors").write_bytes(b"half"); os.kill(os.getpid(), signal.SIGKILL)
        A.merged = killed
        t.tune({str(base)!r}, t.rows(20), {str(tmp_path / "out")!r}, t.TOY)""")
    done = subprocess.run(
        [sys.executable, "-c", code], env=dict(os.environ, OMP_NUM_THREADS="1"), capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "out").exists()
    facts = tune(base, rows(20), tmp_path / "out", TOY)
    assert facts["eval_after"] < facts["eval_before"] and load_lm(tmp_path / "out") is not None
