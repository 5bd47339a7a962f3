"""Replies as language models write them: rows that went wrong, and a fuzz of replies whose meaning is known.

A reply is built from goals that it names, in a dress (lists, markup, case, JSON, fences, thinking, languages), and from
goals that it says not to take. What is read must be the first ones, and never the second."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from promptnb.llm import Guidance, Reply
from promptnb.llm.text import GOALS, decision_prompt, parse, scene, sentence, without_thinking

pytest.importorskip("openai")
from advisors import Scripted

NAMES = list(GOALS)
EXAMPLES = 500  # of each kind, and 20,000 once by hand

# ---- rows

THREE = ("drink water", "attack cow", "sleep")
THOUGHT = "I could attack zombie or chop tree; mine diamond is out."
ROWS = {
    f"<think>{THOUGHT}</think> drink water, attack cow, sleep": THREE,
    f"<thinking>\n{THOUGHT}\n</thinking>\n\ndrink water, attack cow, sleep": THREE,
    f"{THOUGHT}</think>drink water, attack cow, sleep": THREE,
    f"<|channel|>analysis<|message|>{THOUGHT}<|end|><|channel|>final<|message|>{sentence(THREE)}": THREE,
    f"[THINK]{THOUGHT}[/THINK]drink water, attack cow, sleep": THREE,
    f"&lt;think&gt;{THOUGHT}&lt;/think&gt; drink water, attack cow, sleep": THREE,
    f"<|begin_of_thought|>{THOUGHT}<|end_of_thought|><|begin_of_solution|>{sentence(THREE)}<|end_of_solution|>": THREE,
    f"<|START_THINKING|>{THOUGHT}<|END_THINKING|><|START_RESPONSE|>{sentence(THREE)}<|END_RESPONSE|>": THREE,
    f"<|START_THINKING|>{THOUGHT}": (),
    f"Thought: {THOUGHT}\nFinal: drink water, attack cow, sleep": THREE,
    f"{THOUGHT}\n\n**Final answer:** drink water, attack cow, sleep": THREE,
    f"<think>{THOUGHT}": (),
    f"<|channel|>analysis<|message|>{THOUGHT}": (),
    "eat plant, drink water, sleep. Avoid zombies.": ("eat plant", "drink water", "sleep"),
    "eat plant, drink water, sleep! Never attack zombie.": ("eat plant", "drink water", "sleep"),
    "Eat plant, drink water, sleep to avoid zombies": ("eat plant", "drink water", "sleep"),
    "Do not attack zombie. Eat plant, drink water, sleep": ("eat plant", "drink water", "sleep"),
    "chop tree instead of sleep, mine coal": ("chop tree", "mine coal"),
    "I don\u2019t sleep, mine coal": ("mine coal",),
    "avoid attack zombie, attack skeleton, attack cow": (),
    "don't attack zombie, sleep or mine coal": (),
    "no sleep, mine coal": ("mine coal",),
    "Don't forget to sleep": ("sleep",),
    "Never fail to drink water; do not forget: mine coal": ("drink water",),
    "You have no choice but to attack cow": ("attack cow",),
    "drink water, sleep (not attack zombie)": ("drink water", "sleep"),
    "sleep (instead of mine coal) and drink water": ("sleep", "drink water"),
    "\u274c attack zombie\n\u2705 sleep": ("sleep",),
    "Avoid:\n- attack zombie\n- sleep\n\nDo:\n- mine coal": ("mine coal",),
    "work-and-sleep": ("work and sleep",),
    "work **and** sleep; wilderness\nsurvival": ("work and sleep", "wilderness survival"),
    "Sleep? No. Mine coal.": ("mine coal",),
    "~~sleep~~ MineCoal": ("mine coal",),
    '```json\n{"avoid": ["sleep"], "goals": ["mine coal"],}\n```': ("mine coal",),
    "{'reason': 'attack zombie', 'goals': ['mine coal']}": ("mine coal",),
    "1. mine coal\n2. don&#39;t sleep": ("mine coal",),
}


@pytest.mark.parametrize("text", ROWS, ids=range(len(ROWS)))
def test_a_reply_is_read_as_it_is_meant(text):
    assert parse(text)[0] == ROWS[text]


def test_raw_replies_and_analyses_are_without_thinking_too():
    g = Guidance(Scripted("<think>attack zombie?</think>Drink."), Scripted("<think>hm</think>Go east."), raw=True)
    assert g([scene()]) == ["Go east."]
    asked = decision_prompt(scene(), "", without_thinking("<think>attack zombie?</think>Drink."))
    assert 'analysis: "Drink."' in asked[1]["content"]
    assert g.decision.asked[0].messages == asked


# ---- dresses

bold = st.sampled_from(
    ["{}", "**{}**", "*{}*", "__{}__", "`{}`", "<b>{}</b>", '"{}"', "'{}'", "\u201c{}\u201d", "\x1b[31m{}\x1b[0m"]
)
cases = st.sampled_from([str, str.upper, str.title, str.capitalize])
spaces = st.sampled_from([" ", "  ", "\t", "\u00a0", "_", "-", "\u2011", "\u3000", "&nbsp;", " \u200b", "\n"])
lists = st.sampled_from(
    ["comma", "and", "lines", "dashes", "numbers", "brackets", "one line", "semicolons", "table", "html"]
)
hidden = st.sampled_from(["", "\u200b", "\ufeff", "\x00", "\u202e", "\x07"])
before = st.sampled_from(
    ["", "Goals: ", "Sure! Here are the goals:\n\n", "Next, ", "**Answer:** ", "Answer:\n", "Ziele: ", "目标："]
)
after = st.sampled_from(["", ".", "\n", "\n\nGood luck!", " \U0001f600", "\n\nLet me know what you think.", "。"])


def wide(text):
    "The letters as East Asian typography has them."
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)


@st.composite
def dressed(draw, goals, wrap=True):
    "Goals as items of a list, each in a dress of its own."
    items = []
    for goal in goals:
        gap = draw(spaces) if wrap else " "
        text = draw(bold).format(draw(cases)(goal).replace(" ", gap))
        items.append(
            wide(text) if draw(st.integers(0, 9)) == 0 and text.isascii() and not {*"<&\x1b"} & {*text} else text
        )
    return items


@st.composite
def listed(draw, goals):
    "Goals in a list of some form."
    kind = draw(lists)
    items = draw(dressed(goals, wrap=kind not in ("table",)))
    numbered = list(enumerate(items, 1))
    forms = dict(
        comma=", ".join(items),
        semicolons="; ".join(items),
        lines="\n".join(items),
        dashes="\n".join(f"- {x}" for x in items),
        numbers="\n".join(f"{i}. {x}" for i, x in numbered),
        brackets="\n".join(f"{i}) {x}" for i, x in numbered),
        table="| # | goal |\n|---|---|\n" + "\n".join(f"| {i} | {x} |" for i, x in numbered),
        html="<ul>" + "".join(f"<li>{x}</li>" for x in items) + "</ul>",
    )
    forms["one line"] = " ".join(f"({i}) {x}" for i, x in numbered)
    forms["and"] = ", then ".join(items)
    return forms[kind]


@st.composite
def in_json(draw, goals, others):
    "Goals as JSON, or as what is nearly JSON, with goals that are not meant beside them."
    items = [draw(cases)(g) for g in goals]
    value = draw(st.sampled_from([items, [dict(goal=x) for x in items], ", ".join(items)]))
    key = draw(st.sampled_from(["goals", "Goals", "sub-goals", "next_goals", "answer"]))
    beside = {"reasoning": "I could " + " or ".join(others or ["wait"])}
    body = json.dumps(draw(st.sampled_from([{key: value}, {**beside, key: value}, {key: value, **beside}])))
    return draw(
        st.sampled_from(["{}", "```json\n{}\n```", "```\n{}\n```", "Here you are:\n{}", "{}\n\nGood luck!"])
    ).replace("{}", body)


@st.composite
def thought(draw, answer, others):
    "An answer after thinking about other goals."
    hm = f"Hm, {' or '.join(others or ['wait'])}? Or not.\n1. {sentence(others)}\n"
    forms = [
        "{a}",
        "<think>{hm}</think>{a}",
        "<thinking>{hm}</thinking>\n\n{a}",
        "{hm}</think>\n{a}",
        "<THINK>{hm}</THINK>{a}",
        "[THINK]{hm}[/THINK]{a}",
        "<|channel|>analysis<|message|>{hm}<|end|><|start|>assistant<|channel|>final<|message|>{a}<|return|>",
        "<think>a</think><reasoning>{hm}</reasoning>{a}",
    ]
    return draw(st.sampled_from(forms)).replace("{hm}", hm).replace("{a}", answer)


@st.composite
def denied(draw, goals):
    "Goals that a reply says not to take, as sentences of their own."
    forms = [
        "Do not {}.",
        "Don\u2019t {}!",
        "Never {}.",
        "Avoid {}.",
        "You cannot {} now.",
        "There is no need to {}.",
        "Should you {}?",
        "I would not {}, since it is dark.",
        "**Do** *not* {}.",
        "don&#39;t {}.",
        "~~{}~~",
        "<del>{}</del>",
        "nicht {}.",
        "不要 {}。",
    ]
    return [draw(st.sampled_from(forms)).format(goal) for goal in goals]


@st.composite
def meant(draw):
    "(a reply, the goals that it means): a fuzz whose right answer is known."
    goals = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=5, unique=True))
    others = draw(st.lists(st.sampled_from([g for g in NAMES if g not in goals]), max_size=3, unique=True))
    if draw(st.integers(0, 3)) == 0:
        answer = draw(in_json(goals, others))
    else:
        answer = draw(before) + draw(listed(goals)) + draw(after)
        answer = "\n\n".join([*([answer] if answer else []), *draw(denied(others))])
    return draw(hidden) + draw(thought(answer, others)) + draw(hidden), tuple(goals[:3]), others


def check_meant(case):
    text, goals, others = case
    found, rejected = parse(text)
    assert found == goals, (text, found, goals)
    assert not {*found} & {*others} and rejected >= 0


alphabet = st.one_of(
    st.sampled_from(
        [*NAMES, "not ", "avoid ", "and", " or ", ",", ". ", "\n", "{", '"goals": ', "[", "]", "}", "<think>"]
    ),
    st.sampled_from(
        ["</think>", "<|channel|>", "final<|message|>", "Answer:", "```", "~~", "&#0;", "\x00", "\ud800", "\u202e"]
    ),
    st.text(max_size=8),
    st.characters(),
)


def check_anything(text):
    found, rejected = parse(text)
    assert {*found} <= {*NAMES} and len(found) == len({*found}) <= 3 and rejected >= 0
    assert parse(sentence(found)) == (found, 0)
    plain = re.sub(r"[\W_]+", " ", text.lower())
    assert not found or text.isascii() is False or any(g.split()[0] in plain for g in found)


def check_guidance(texts):
    "Whatever comes back, each query ends with goals of the list, and is counted."
    g = Guidance(Scripted(*texts), Scripted(*reversed(texts)), raw=False)
    for k in range(len(texts)):
        (said,) = g([scene(("tree",), step=k)])
        assert said == "" or {*said.split(", ")} <= {*NAMES}
    assert g.counts["queries"] == len(texts) and g.counts["kept"] <= len(texts)


anything = st.lists(alphabet, max_size=30).map("".join)
fixed = settings(max_examples=EXAMPLES, derandomize=True, deadline=None, database=None)


@given(meant())
@fixed
def test_replies_mean_what_is_read(case):
    check_meant(case)


@given(anything)
@fixed
def test_any_text_gives_goals_of_the_list_or_none(text):
    check_anything(text)


@given(st.lists(anything.map(lambda text: Reply(text)), min_size=1, max_size=3))
@settings(fixed, max_examples=EXAMPLES // 5)
def test_guidance_takes_any_text(texts):
    check_guidance(texts)
