"""What each part of M3 is worth: one change at a time, at one setting, on the same seeds, against tuned Muon.

Without a slow memory and a second moment M3 is Muon, so that every row is trained at the learning rate and momentum
that were tuned for torch's Muon. AdEMAMix, which has the two memories without Newton-Schulz, is trained at AdamW's
learning rate, and has not been tuned.
"""

from .ablation import DRIFT, Ablation
from .m3_variants import TABLES
from .optimizers import TUNED, Setting, available

DRIFTING = ("M3", "defaults", "no slow memory", "alpha=0.5", "mix=pre alpha=1.0")
BASELINES = tuple(name for name in ("adamw", "ademamix") if name in available())

ABLATION = Ablation(
    name="m3",
    about=__doc__.splitlines()[0],
    reference="muon",
    tables={
        **{table: tuple(f"m3:{row}" for row in rows) for table, rows in TABLES.items()},
        "relatives": (*(f"m3:{row}" for row in TABLES["relatives"]), *BASELINES),
        DRIFT: (*(f"m3:{row}" for row in DRIFTING), *BASELINES),
    },
    settings=TUNED["text"] | {"ademamix": Setting(TUNED["text"]["adamw"].lr, 0.999)},
    setting=TUNED["text"]["muon"],
)

main = ABLATION.main
