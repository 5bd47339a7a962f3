"""The list of faults: what is made to go wrong, what must come of it, and the tests that do it.

A test names its rows by `@pytest.mark.fault(3)`. `python tests/faults.py` writes the table into nbs/faults.ipynb.
"""

import ast
import json
from pathlib import Path

TESTS = Path(__file__).resolve().parent
PAGE = TESTS.parent / "nbs" / "faults.ipynb"
TABLE = "faulttab"  # id of the page's cell that holds the table

FAULTS = {  # row: (what is made to go wrong, what must come of it)
    1: ("kill -9 of a job at a random step", "run again: weights, metrics and records are those of an unbroken run"),
    2: (
        "kill -9 at each call that writes a checkpoint",
        "the checkpoint before, or the new one, is whole; no half file",
    ),
    3: ("SIGTERM, as from Slurm", "a checkpoint within 30 s, and an exit status that says: run me again"),
    4: ("two runs in one folder", "the second is refused and names the first; a dead holder's lock is free"),
    5: ("a checkpoint cut short, or one bit of it flipped", "named and passed over; the one before is used"),
    6: ("a checkpoint of other settings, other shapes, a newer format", "refused, with the settings that differ"),
    7: ("a file that runs code when unpickled: checkpoint, policy, dataset", "it does not run, and is refused"),
    8: ("a dataset cut short, without a column, with NaN, of other sizes", "refused, or mended as documented"),
    9: ("a dataset that is not the one of the manifest", "made again; accepted when told to, and every table says so"),
    10: ("a loss of NaN or infinity", "the run stops, keeps its last good checkpoint, and is shown as diverged"),
    11: ("no space left, at every write", "one line, nothing finished is lost, and it goes on once there is space"),
    12: ("a read-only folder; spaces, other alphabets and great length in its name", "it works, or one line says why"),
    13: ("no GPU, or too little memory on it", "one line with the setting to change; never the processor instead"),
    14: ("more jobs than GPUs; a job killed on one", "never two jobs on one GPU; the GPU of a dead job is free"),
    15: (
        "a parameter misspelt, of another type, out of range",
        "refused before a kernel starts, with the nearest name",
    ),
    16: (
        "a cell that raises or takes too long; kernel or papermill killed",
        "a failed record with the reason; no table",
    ),
    17: ("a table with a seed missing", "refused; a partial one counts the seeds that each cell has"),
    18: ("the whole graph killed", "run again: only unfinished jobs run, from their checkpoints"),
    19: ("an environment that raises, gives NaN or other shapes, or never ends", "the episode fails and is counted"),
    20: ("the same seed in two processes, with pictures drawn between and without", "the same bits, in every family"),
    21: ("a language model's server that refuses, is slow, busy, breaks off", "bounded retries, then the last goals"),
    22: ("a reply that is empty, huge, no JSON, no goal", "only goals of the list are taken; the others are counted"),
    23: ("instructions hidden in the text of the world or in a reply", "quoted as data; goals of the list or none"),
    24: ("a budget of calls, tokens or dollars is used up", "no further call, and the run goes on"),
    25: ("the same prompts again, the server gone", "the tape gives the same run; another model's tape is not used"),
    26: ("a key in the environment, and a server that sends it back", "it is in no file and on no screen"),
    27: ("a clock that jumps back; two hosts on one folder", "names do not collide; order is that of steps"),
    28: ("an export or outputs that do not fit the notebooks", "the tests of the project fail"),
}


def rows_of(decorator):
    "The rows that a decorator names: [3] for `@pytest.mark.fault(3)`, [] for any other."
    if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.fault":
        return [ast.literal_eval(arg) for arg in decorator.args]
    return []


def tests_of_rows(folder=TESTS):
    "{row: [(file, test), ...]} of all tests in a folder that name a row."
    found = {}
    for file in sorted(folder.glob("test_*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            for decorator in getattr(node, "decorator_list", ()):
                for row in rows_of(decorator):
                    found.setdefault(row, []).append((file.name, node.name))
    return found


def wrong(found):
    "What is wrong with the tests of rows, one line each."
    lacking = [f"row {row} has no test: {what}" for row, (what, _) in FAULTS.items() if row not in found]
    unknown = [f"{file}: {test} names row {row}" for row in found.keys() - FAULTS.keys() for file, test in found[row]]
    return lacking + unknown


def table(found):
    "The table as Markdown."
    lines = ["| | What goes wrong | What must come of it | Tests |", "|---|---|---|---|"]
    for row, (what, result) in FAULTS.items():
        tests = [f"[{test}](../tests/{file})" for file, test in found.get(row, ())]
        lines.append(f"| {row} | {what} | {result} | {', '.join(tests)} |")
    return "\n".join(lines)


def table_cell(page):
    "The cell of a notebook that holds the table."
    return next(cell for cell in page["cells"] if cell["id"] == TABLE)


def main():
    page = json.loads(PAGE.read_text("utf-8"))
    table_cell(page)["source"] = table(tests_of_rows()).splitlines(keepends=True)
    PAGE.write_text(json.dumps(page, indent=1, ensure_ascii=False, sort_keys=True) + "\n", "utf-8")


if __name__ == "__main__":
    main()
