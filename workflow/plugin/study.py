"""What is run: two recipes, and the table that shows them."""

from promptnb import recipes as rc

PAPER = rc.Paper("mass", "A study of mine")

prompted = rc.Pretrain("mass", width=32, layers=2, dropout=0.0, steps=2000, lr=3e-3, warmup=50, curve_points=1)
shared = dict(paper="mass", family="mass", pretrain=prompted)
PAPER.exhibit(
    "table1",
    "Return at places that were never trained on",
    "A nudge of the state's embedding helps a prompt.",
    "table",
    [
        rc.Recipe(**shared, method="Prompt-DT", key="prompted"),
        rc.Recipe(**shared, method="Prompt-DT, nudged", key="nudged", tune=rc.Tune("nudge", (("steps", 50),))),
    ],
)
rc.add(PAPER)

# what a laptop takes of it: a field that is not here is the recipe's own, or LAPTOP["Pretrain"]'s
rc.LAPTOP["families"]["mass"] = dict(width=32, layers=2, steps=300, lr=3e-3)
