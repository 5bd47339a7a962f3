"The language adapter: which rows it is tuned on, what tuning changes and what not; neither kills nor networks matter."

import copy
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("trl")
from promptnb.core import append_jsonl, read_json, sha256_file
from promptnb.llm import Request, exchanges
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
from promptnb.llm.backends import Local, as_text
from promptnb.llm.text import PARENTS, parse

SMALL = dict(rows=300, steps=40, warm=10, held=8)
TOY = SFT(r=8, alpha=16, lr=5e-3, whole_text=False)


def rows(n, seed="toy"):
    "n rows dict(prompt, response) of the teacher."
    return [dict(prompt=r["prompt"], response=r["response"]) for r in teach("adapter", random_scenes(n, seed))]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "The folder of a tiny adapter."
    return tiny("adapter", tmp_path_factory.mktemp("lm") / "base", **SMALL)


@pytest.fixture(scope="module")
def tokenizer(base):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base)


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    "(folder, facts) of the base, tuned on 60 rows."
    folder = tmp_path_factory.mktemp("lm") / "tuned"
    return folder, tune(base, rows(60), folder, TOY)


def weights(folder):
    return load_lm(folder).state_dict()


def of_lora(name):
    "Does LoRA move this weight?"
    return name.endswith(("q_proj.weight", "v_proj.weight"))


# ---- scenes and the teacher


def test_scenes_obey_the_tech_tree():
    for s in random_scenes(300, 1):
        done = set(s["unlocked"])
        assert all(set(PARENTS[a]) <= done for a in done) and len(s["unlocked"]) == len(done)
        assert set(A.evident(s)) <= done


def test_scenes_show_and_hold_only_what_was_unlocked():
    for s in random_scenes(300, 1):
        done, has = s["unlocked"], s["status"]
        assert all(f"make_{t}" in done for t in A.TOOLS if t in has)
        assert all(f"collect_{g}" in done for g in A.GOODS if g in has)
        assert all(achievement in done for thing, achievement in A.MADE.items() if thing in s["seen"])
        assert all(0 < n <= 9 for n in has.values()) and has["health"] >= 1
        assert not {"none", "player"} & {*s["seen"]}


def test_the_teacher_uses_only_what_the_prompt_shows():
    "Two scenes with the same prompt get the same goals."
    scenes = random_scenes(200, 2)
    blind = [dict(s, unlocked=()) for s in scenes]
    assert A.rule_goals(scenes) == A.rule_goals(blind)
    assert all(len(goals) == 3 for goals in A.rule_goals(scenes))


def test_an_adapters_row_names_its_goals():
    for r in teach("adapter", random_scenes(200, 2)):
        assert A.named_goals(r["response"]) == r["goals"] and len(r["response"]) < 200


def test_half_of_a_decision_models_rows_follow_an_analysis():
    scenes = random_scenes(200, 2)
    followed = [r for r in teach("decision", scenes) if "analysis:" in r["prompt"][1]["content"]]
    assert 60 < len(followed) < 140
    for r in followed:
        assert A.named_goals(r["prompt"][1]["content"]) == r["goals"] == parse(r["response"])[0]
    by_rule = A.rule_goals(scenes)
    assert sum(r["goals"] not in by_rule for r in followed) > 20  # only the analysis has them


# ---- which rows, and how often


def exchange(i, response, l_before, l_after, unlocked_after):
    prompt = [dict(role="user", content=str(i))]
    said = dict(prompt=prompt, response=response, did="do", before="sleep")
    return dict(said, l=l_before, l_after=l_after, unlocked_after=unlocked_after)


LOG = [
    exchange(0, "a", 0.5, 0.4, []),
    exchange(1, "b", 0.5, 0.6, ["collect_wood"]),
    exchange(2, "c", 0.5, None, []),
    exchange(3, "d", 0.5, 0.9, []),
    exchange(4, "e", 0.5, 0.5, ["wake_up", "eat_cow"]),
    exchange(5, None, 0.1, 0.9, ["sleep"]),
    exchange(6, "f", None, 0.9, []),
]


def replies(log, targets, seed=0):
    return "".join(r["response"] for r in sft_rows(log, targets, seed))


@pytest.mark.parametrize("targets, expected", [("own", "abcdef"), ("gain", "bd"), ("achievements", "bee")])
def test_targets(targets, expected):
    assert replies(LOG, targets) == expected


def test_gain_weighted_is_in_proportion_to_the_rise():
    "b rose by 0.1 and d by 0.4: of two rows d has 1.6."
    assert replies(LOG, "gain-weighted") in ("dd", "bd")
    assert sum(replies(LOG, "gain-weighted", s).count("d") for s in range(200)) == pytest.approx(320, abs=12)


@pytest.mark.parametrize("targets", TARGETS)
def test_rows_are_prompts_and_responses(targets):
    assert all(set(r) == {"prompt", "response"} for r in sft_rows(LOG, targets))
    assert sft_rows([], targets) == sft_rows(LOG[5:6], targets) == []


def test_no_gain_no_rows():
    assert sft_rows(LOG[:1], "gain-weighted") == []


@pytest.mark.parametrize("nothing", ["did", "before"])
def test_a_score_of_nothing_done_or_no_goals_is_no_level_to_gain_from(nothing):
    assert A.gain(LOG[3]) == pytest.approx(0.4)
    assert A.gain({**LOG[3], nothing: ""}) == 0


def test_unknown_targets_are_refused(refused):
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


@pytest.mark.parametrize("n", [2, 3, 9, 10, 11, 100, 10_000])
def test_split_keeps_the_order(n):
    train, held = split(list(range(n)))
    assert train + held == list(range(n)) and train
    assert len(held) == max(1, n - int(0.9 * n))


def test_split_takes_a_tenth():
    assert [len(x) for x in split(range(10_000))] == [9000, 1000]


def test_rows_from_a_real_log(tmp_path):
    def row(step, score, unlocked, response):
        known = dict(env=0, episode=0, prompt=[], did="noop", before="sleep")
        return dict(known, step=step, response=response, l=score, unlocked=unlocked)

    path = tmp_path / "log.jsonl"
    append_jsonl(path, row(0, 0.5, [], "x"), row(100, 0.7, ["eat_cow"], "y"), row(200, 0.2, ["eat_cow"], "z"))
    assert [replies(exchanges(path), t) for t in TARGETS] == ["xyz", "x", "x", "x"]


# ---- labels


def test_the_loss_is_on_the_reply(tokenizer):
    (row,) = rows(1)
    (x,) = encoded(tokenizer, [row])
    assert tokenizer.decode([i for i in x["labels"] if i >= 0]) == row["response"] + "<|end|>"
    before = [i for i, label in zip(x["input_ids"], x["labels"]) if label < 0]
    assert tokenizer.decode(before).endswith("<|assistant|>")


def test_the_loss_is_on_the_whole_text(tokenizer):
    x = encoded(tokenizer, rows(1))[0]
    assert encoded(tokenizer, rows(1), whole_text=True)[0]["labels"] == x["input_ids"]


LLAMA_2 = (  # the markup of Llama-2's chat models, as their card describes it
    "{% set n = namespace(system='') %}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{% set n.system = '<<SYS>>\\n' + m['content'] + '\\n<</SYS>>\\n\\n' %}"
    "{% elif m['role'] == 'user' %}{{ bos_token + '[INST] ' + n.system + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture
def llama_2(tokenizer):
    "The tiny tokenizer with the markup of Llama-2, which begins a text with a token of its own."
    tok = copy.deepcopy(tokenizer)
    tok.chat_template, tok.bos_token = LLAMA_2, "<s>"
    return tok


def test_the_released_text_holds_the_markup_twice(llama_2):
    """PKU-RL/AdaRefiner: `llm_template` (utils.py) puts system line and facts into the markup, and the log keeps that;
    sft.py writes '[INST] <<SYS>>', the system line, '<</SYS>>', the logged prompt, '[/INST]' and the response."""
    (row,) = rows(1)
    system, user = (m["content"] for m in row["prompt"])
    head = f"[INST] <<SYS>>\n{system}\n<</SYS>>\n\n"
    (x,) = encoded(llama_2, [row], whole_text=True, markup_twice=True)
    text = llama_2.decode(x["input_ids"]).removesuffix(f" {llama_2.eos_token}")
    assert text == f"<s>{head}{head}{user} [/INST] [/INST] {row['response']}"


def test_our_text_holds_the_markup_once_as_inference_does(llama_2):
    (row,) = rows(1)
    text = llama_2.decode(encoded(llama_2, [row])[0]["input_ids"])
    assert text == f"{as_text(llama_2, row['prompt'])} {row['response']} {llama_2.eos_token}"
    assert text.count("[INST]") == text.count("[/INST]") == 1


def test_the_loss_on_a_reply_is_the_same_part_of_both_texts(tokenizer):
    once, twice = (encoded(tokenizer, rows(3), markup_twice=how) for how in (False, True))
    labelled = [[[i for i in x["labels"] if i >= 0] for x in xs] for xs in (once, twice)]
    assert labelled[0] == labelled[1]
    assert all(len(a["input_ids"]) < len(b["input_ids"]) < 1024 for a, b in zip(once, twice))


def test_rows_are_cut(tokenizer):
    assert len(encoded(tokenizer, rows(1), longest=9)[0]["labels"]) == 9


@pytest.mark.parametrize("goal", ["drink water", "sleep", "chop tree"])
def test_a_goal_is_one_token(tokenizer, goal):
    token = tokenizer.convert_tokens_to_ids(goal.replace(" ", "Ġ"))
    assert tokenizer.encode(goal, add_special_tokens=False) == [token]


def test_a_shared_beginning_changes_no_loss(base, tokenizer):
    "The system line, computed once for all rows, gives the loss that each whole row gives."
    lm, data = load_lm(base).eval(), encoded(tokenizer, rows(5))

    def alone(row):
        ids, labels = (torch.tensor([row[k]]) for k in ("input_ids", "labels"))
        return lm(input_ids=ids, labels=labels).loss.item()

    with torch.no_grad():
        together, each = A.reply_loss(lm, data).item(), [alone(row) for row in data]
    n = [sum(label >= 0 for label in row["labels"]) for row in data]
    assert together == pytest.approx(np.average(each, weights=n), abs=1e-5)


# ---- tiny models


def draws():
    "A number of each global generator."
    return torch.rand(1), random.random(), np.random.rand()


def seeded():
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)


@pytest.fixture(scope="module")
def made_again(base, tmp_path_factory):
    "(folder, numbers drawn after it was made, numbers drawn without it)."
    seeded()
    expected = draws()
    seeded()
    folder = tiny("adapter", tmp_path_factory.mktemp("lm") / "again", **SMALL)
    return folder, draws(), expected


def test_a_tiny_model_is_the_same_again(base, made_again):
    assert sha256_file(made_again[0] / "model.safetensors") == sha256_file(base / "model.safetensors")


def test_whoever_draws_around_a_tiny_model_draws_the_same(made_again):
    _, after, expected = made_again
    assert after == expected


def test_the_facts_of_a_tiny_model(base):
    facts = read_json(base / "facts.json")
    assert facts["held_loss"] < 1.5 < np.log(300)
    assert {"valid", "agree", "overlap", "parameters", "seconds"} <= set(facts)


def test_tiny_models_that_cannot_be_had(base, refused):
    other = SMALL | dict(seed=1)
    refused(tiny, "adapter", base, **other, says=["holds another model", "seed: 0 there, 1 here"])
    refused(tiny, "adaptor", says=["did you mean 'adapter'"])
    refused(tiny, "adapter", step=3, says=["did you mean 'steps'"])


def test_a_tiny_model_answers_fast_and_the_same_again(base):
    "Nothing here is about how good it is: notebooks say that."
    lm = Local(base)
    requests = [Request(r["prompt"], 24, 0.6, i) for i, r in enumerate(rows(8))]
    lm.complete(requests)
    start = time.process_time()
    made = lm.complete(requests)
    assert time.process_time() - start < 3
    assert all(r.ok and r.tokens_out <= 24 and r.text for r in made)
    assert [r.text for r in lm.complete(requests)] == [r.text for r in made]


# ---- tuning


def test_tuning_lowers_the_loss(tuned):
    facts = tuned[1]
    assert facts["eval_after"] < facts["eval_before"] - 0.05
    assert (facts["rows"], facts["held"], facts["steps"]) == (54, 6, 14)


def test_tuning_moves_two_projections_of_two_layers(base, tuned):
    a, b = weights(base), weights(tuned[0])
    moved = {k for k in a if not torch.equal(a[k], b[k])}
    assert set(a) == set(b) and len(moved) == 4 and all(map(of_lora, moved))
    assert tuned[1]["trainable"] == 2 * 2 * 8 * (128 + 128)  # layers, projections, rank, in + out


def test_merged_is_base_plus_lora(base, tuned, tokenizer):
    from peft import PeftModel

    ids = torch.tensor([encoded(tokenizer, rows(1))[0]["input_ids"]])
    models = (load_lm(base), load_lm(tuned[0]), PeftModel.from_pretrained(load_lm(base), tuned[0] / "lora"))
    with torch.no_grad():
        before, merged, apart = (lm.eval()(input_ids=ids).logits for lm in models)
    assert (merged - apart).abs().max() < 1e-4 < (merged - before).abs().max()


def test_a_tuned_folder_is_an_ordinary_one(base, tuned):
    folder = tuned[0]
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert {Path(f).suffix for f in files} <= {".json", ".safetensors", ".txt", ".jinja"}
    expected = {"model.safetensors", "tokenizer.json", "generation_config.json", "chat_template.jinja", "facts.json"}
    assert expected <= files
    assert read_json(folder / "generation_config.json")["do_sample"] is True
    assert (folder / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_a_tuned_model_answers(tuned):
    r = Local(tuned[0]).complete([Request(rows(1)[0]["prompt"], 24, 0)])[0]
    assert r.ok and r.text


def test_tuning_again_reads_what_is_there(base, tuned, monkeypatch, refused):
    monkeypatch.setattr(A, "fit_lora", lambda *a: pytest.fail("trained again"))
    assert tune(base, rows(60), tuned[0], TOY) == tuned[1]
    refused(tune, base, rows(61), tuned[0], TOY, says=["holds another model", "rows"])
    refused(tune, base, rows(60), tuned[0], replace(TOY, lr=1e-3), says=["config.lr: 0.005 there, 0.001 here"])


def test_same_seed_same_weights_no_network(base, tuned, tmp_path, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *a: pytest.fail("asked the network"))
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    tune(base, rows(60), tmp_path / "again", TOY)
    assert torch.equal(torch.rand(1), expected)  # whoever draws around it draws the same
    again, once = (sha256_file(f / "model.safetensors") for f in (tmp_path / "again", tuned[0]))
    assert again == once


def test_whole_text_and_a_bounded_run(base, tmp_path):
    facts = tune(base, rows(30), tmp_path / "whole", replace(TOY, whole_text=True, max_steps=2))
    assert facts["steps"] == 2 and facts["eval_after"] < facts["eval_before"]


def test_what_cannot_be_tuned_is_said_in_a_line(base, tmp_path, monkeypatch, refused):
    out = tmp_path / "x"
    refused(tune, base, rows(1), out, says=["1 row(s)", "at least 2"])
    refused(tune, tmp_path / "none", rows(2), out, says=["no folder on this machine"])
    refused(tune, base, rows(2), out, replace(TOY, quantise="nf5"), says=["did you mean 'nf4'"])
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    refused(tune, base, rows(2), out, replace(TOY, quantise="nf4"), says=["pip install bitsandbytes"])
    assert not out.exists()


def test_a_folder_of_the_users_is_not_touched(base, tmp_path, refused):
    (tmp_path / "thesis.txt").write_text("mine")
    refused(tune, base, rows(2), tmp_path, TOY, says=["no model made here"])
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_four_bits(base, tmp_path):
    pytest.importorskip("bitsandbytes")
    facts = tune(base, rows(20), tmp_path / "q", replace(TOY, quantise="nf4", max_steps=3))
    a, b = weights(base), weights(tmp_path / "q")
    assert facts["steps"] == 3
    assert all(torch.equal(a[k], b[k]) for k in a if not of_lora(k))
    assert any(not torch.equal(a[k], b[k]) for k in a)


KILLED_WHILE_SAVING = """
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    import test_adapter as t
    from promptnb.llm import adapter

    def killed(base, lora, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    adapter.merged = killed
    t.tune({base!r}, t.rows(20), {out!r}, t.TOY)
"""


def test_killed_while_saving(base, tmp_path):
    "kill -9 in the middle of the save: no folder under the name; the next call finishes it and is no worse for it."
    out = tmp_path / "out"
    code = textwrap.dedent(KILLED_WHILE_SAVING).format(tests=str(Path(__file__).parent), base=str(base), out=str(out))
    env = dict(os.environ, OMP_NUM_THREADS="1")
    killed = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not out.exists()
    facts = tune(base, rows(20), out, TOY)
    assert facts["eval_after"] < facts["eval_before"] and load_lm(out) is not None
