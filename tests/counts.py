"""Execution counts of the notebooks, which nbdev_clean takes away: `python tests/counts.py` writes those of a run from
top to bottom. They do not depend on who has run a page, and how often."""

import json
from pathlib import Path

NBS = Path(__file__).resolve().parent.parent / "nbs"


def numbered(nb):
    "Number the code cells of a notebook that has been run, in place; one without outputs has not."
    cells = [c for c in nb["cells"] if c["cell_type"] == "code" and "".join(c["source"]).strip()]
    if not any(c["outputs"] for c in cells):
        return
    for count, cell in enumerate(cells, 1):
        cell["execution_count"] = count
        for output in cell["outputs"]:
            if output["output_type"] == "execute_result":
                output["execution_count"] = count


def write_counts(nbs=NBS):
    "Number the notebooks of a folder, those that are not."
    for path in sorted(Path(nbs).rglob("*.ipynb")):
        if ".ipynb_checkpoints" in path.parts:
            continue
        text = path.read_text("utf-8")
        nb = json.loads(text)
        numbered(nb)
        new = json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
        if new != text:
            path.write_text(new, "utf-8")


if __name__ == "__main__":
    write_counts()
