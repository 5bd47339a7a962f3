"""What the papers' pages say: every computed sentence of a page, where nothing differs and where everything does.

In the first world all methods are equal, seed by seed; no sentence may then say that one is better. In the second each
method has a level of its own, far above the luck of a seed; this is to be said, but not of a single seed."""

import ast
import contextlib
import functools
import io
import re
import zlib

import numpy as np
import pytest
import test_contexts
import test_guidance
import test_scores
from homes import ROOT, fabricate

from promptnb import recipes as rc
from promptnb.core import read_json

RESOLVED = re.compile(
    r"\b(better|worse|yes|the opposite|more often|less often|rises|falls|lowers|raises|keeps (more|less))\b", re.I
)
FLOOR = dict(random=0.0, behaviour=0.0)  # percent of games won by others
PROMPTS = ("prompt_tuning_dt", "prompt_diffuser")
PAPERS = [slug for slug in rc.PAPERS if slug != "grid"]  # which is no paper


def luck(seed, i=0):
    "What a seed adds to whatever is played on task i."
    return float(np.random.default_rng((seed, i)).normal())


def level(name) -> float:
    "The level of a method, by its name."
    return 1000.0 * (zlib.crc32(name.encode()) % 97)


def disordered(r, seed):
    "Contexts in an order of their own, and not that of the goals."
    goals = test_contexts.shuffled(r.family, seed)
    return test_contexts.look(r.family, test_contexts.place_of(r.family), goals)


def exhibits(paper):
    "The exhibits that are made at laptop scale."
    return [e for e in rc.exhibits(paper) if not e.unknown and rc.recipes_of(e, "laptop")]


def made(home, paper, seeds, method, only=""):
    "Records of a whole paper, or of one exhibit, at laptop scale; `method(name)` is what a method adds to luck."
    for e in exhibits(paper):
        if only not in ("", e.id):
            continue
        if paper in PROMPTS:
            fabricate(home, e, "laptop", seeds, lambda r, seed, i: method(r.method) + luck(seed, i), look={}, spent={})
        elif paper == "lamo":
            test_scores.fabricate(e.id, lambda r, seed: method(r.method) + luck(seed), seeds)
        elif paper == "cmt":
            of_run = dict(value=lambda r, seed, i: method(r.method) + luck(seed, i))
            of_run |= dict(
                score=lambda r, seed: method(r.method) + luck(seed), episode=lambda k, seed, i: luck(seed, i)
            )
            test_contexts.fabricate(e.id, seeds, **of_run, looks=disordered, floor=FLOOR)
        else:
            of_run = dict(score=lambda label, seed: 50 + method(label) + luck(seed), sft=lambda seed: (2.0, 2.0))
            of_run |= dict(behave=lambda label, seed: (40 + luck(seed), 100), comprehend=lambda label, seed, part: 0.3)
            test_guidance.fabricate(e.id, seeds, **of_run)


@functools.cache
def cells(paper) -> list:
    "The code cells of a paper's page, each as a syntax tree."
    page = read_json(ROOT / "nbs" / "papers" / f"{paper}.ipynb")
    return [ast.parse("".join(c["source"])) for c in page["cells"] if c["cell_type"] == "code"]


def said(paper, monkeypatch) -> str:
    "What the cells of a page print, without its exhibits and where they come from."
    from promptnb.report.exhibits import Page

    for name in ("show", "provenance"):
        monkeypatch.setattr(Page, name, lambda *a: None)
    names, out = {}, io.StringIO()
    with contextlib.redirect_stdout(out):
        for cell in cells(paper):
            exec(compile(cell, paper, "exec"), names)
    return out.getvalue()


def resolved(text) -> list:
    "The lines that say a difference: questions, and 'better: none', do not."
    answers = {
        line: re.sub(r"[^.:]*\?|[\w ]+: none|\w+ on no dataset", "", line, flags=re.I) for line in text.splitlines()
    }
    return [line for line, answer in answers.items() if RESOLVED.search(answer)]


@pytest.mark.parametrize("paper", PAPERS)
def test_nothing_is_said_where_nothing_differs(paper, tmp_home, monkeypatch):
    made(tmp_home, paper, (0, 1, 2), lambda name: 0.0)
    text = said(paper, monkeypatch)
    assert len(text) > 500, text
    assert not resolved(text)


@pytest.mark.parametrize("paper", PAPERS)
def test_one_seed_says_nothing(paper, tmp_home, monkeypatch):
    made(tmp_home, paper, (0,), level)
    text = said(paper, monkeypatch)
    assert "not tested" in text
    assert not resolved(text)


@pytest.mark.parametrize("paper", PAPERS)
def test_what_is_far_apart_is_said(paper, tmp_home, monkeypatch):
    made(tmp_home, paper, (0, 1, 2), level)
    text = said(paper, monkeypatch)
    assert len(resolved(text)) >= 3, text


FIRST = dict(
    prompt_tuning_dt="table1", prompt_diffuser="table1", lamo="arms", cmt="adaptation", rladapter="main"
)  # what ships of a paper first


@pytest.mark.parametrize("paper", PAPERS)
def test_a_page_runs_where_only_its_first_exhibit_has_records(paper, tmp_home, monkeypatch):
    made(tmp_home, paper, (0, 1, 2), level, only=FIRST[paper])
    text = said(paper, monkeypatch)
    assert resolved(text)
