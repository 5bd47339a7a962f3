"""The guide keeps its word: from arrays to a table in the number of lines it states, under 30; the right prompt wins.

(test_notebooks runs it.)
"""

import json
import re
from pathlib import Path

import pytest

GUIDE = json.loads((Path(__file__).resolve().parent.parent / "nbs" / "own.ipynb").read_text())["cells"]


def source(c):
    return "".join(c["source"])


def place(cells, heading):
    "The index of the cell that begins with a heading."
    return next(i for i, c in enumerate(cells) if source(c).startswith(heading))


def lines(cells):
    "Lines of code between the two headings, imports included; blank ones and comments are none."
    between = cells[place(cells, "## From here") : place(cells, "## To here")]
    code = [line for c in between if c["cell_type"] == "code" for line in source(c).splitlines()]
    return [line for line in code if line.strip() and not line.strip().startswith("#")]


def table(cells):
    "Method -> (mean, low, high) of the committed output of the last cell before 'To here'."
    shown = cells[place(cells, "## To here") - 1]["outputs"][0]["data"]["text/plain"]
    rows = re.findall(r"^(\S.*?)\s+(-?[\d.]+)\s+(-?[\d.]+)\s+(-?[\d.]+)$", "".join(shown), re.M)
    return {method: tuple(map(float, numbers)) for method, *numbers in rows}


def broken_words(cells):
    "What the guide promises and does not keep."
    code, returns, broken = lines(cells), table(cells), []
    prose = [source(c) for c in cells if c["cell_type"] == "markdown"]
    stated = {int(x) for text in prose for x in re.findall(r"(\d+) lines", text)}
    if stated != {len(code)}:
        broken.append(f"it has {len(code)} lines and states {sorted(stated)}")
    if len(code) >= 30:
        broken.append(f"it has {len(code)} lines, not fewer than 30")
    broken += [f"a line has {len(line)} characters" for line in code if len(line) > 120]
    _, lowest, _ = returns["Prompt-DT"]
    for method in ("no prompt", "wrong prompt"):
        _, _, highest = returns[method]
        if not highest < lowest:
            broken.append(f"'{method}' is not clearly below Prompt-DT")
    if not any("assert verdict" in source(c) for c in cells):
        broken.append("no verdict is asserted")
    return broken


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
