"The guide keeps its word: from arrays to a table in the number of lines it states, under 30, and the right prompt wins. (test_notebooks runs it.)"

import json
import re
from pathlib import Path

import pytest

GUIDE = json.loads((Path(__file__).resolve().parent.parent / "nbs" / "own.ipynb").read_text())["cells"]


def source(c):
    return "".join(c["source"])


def lines(cells):
    "Lines of code between the two headings, imports included; blank ones and comments are none."
    first, last = (
        next(i for i, c in enumerate(cells) if source(c).startswith(h)) for h in ("## From here", "## To here")
    )
    return [
        l
        for c in cells[first:last]
        if c["cell_type"] == "code"
        for l in source(c).splitlines()
        if l.strip() and not l.strip().startswith("#")
    ]


def table(cells):
    "Method -> (mean, low, high) of the committed output of the last cell before 'To here'."
    last = next(i for i, c in enumerate(cells) if source(c).startswith("## To here"))
    text = "".join(cells[last - 1]["outputs"][0]["data"]["text/plain"])
    return {
        m[1]: tuple(map(float, m.groups()[1:]))
        for m in re.finditer(r"^(\S.*?)\s+(-?[\d.]+)\s+(-?[\d.]+)\s+(-?[\d.]+)$", text, re.M)
    }


def broken_words(cells):
    "What the guide promises and does not keep."
    n, t = len(lines(cells)), table(cells)
    stated = {int(x) for c in cells if c["cell_type"] == "markdown" for x in re.findall(r"(\d+) lines", source(c))}
    out = [] if stated == {n} else [f"it has {n} lines and states {sorted(stated)}"]
    out += [f"it has {n} lines, not fewer than 30"] if n >= 30 else []
    out += [f"a line has {len(l)} characters" for l in lines(cells) if len(l) > 120]
    out += [
        f"'{m}' is not clearly below Prompt-DT"
        for m in ("no prompt", "wrong prompt")
        if not t[m][2] < t["Prompt-DT"][1]
    ]
    return out + ([] if any("assert verdict" in source(c) for c in cells) else ["no verdict is asserted"])


def test_the_guide_keeps_its_word():
    assert broken_words(GUIDE) == []


@pytest.mark.parametrize(
    "old, new, says",
    [
        ("return policy", r"policy.eval()\\n\\n    # done\\n    return policy", "it has 30 lines, not fewer than 30"),
        (r"wrong prompt +-[\d.]+ +-[\d.]+ +-[\d.]+", "wrong prompt -5 -6 -4", "'wrong prompt' is not clearly below"),
        ("assert verdict", "verdict", "no verdict is asserted"),
    ],
)
def test_a_broken_guide_is_named(old, new, says):
    text, n = re.subn(old, new, json.dumps(GUIDE))
    assert n and any(says in b for b in broken_words(json.loads(text)))
