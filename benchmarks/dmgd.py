"""What each part of DMGD is worth: one change at a time, at one setting, on the same seeds.

The reference is DMGD with 16 hidden features. Every row is trained at its tuned learning rate and momentum, on seeds no
search has seen. Muon and DeltaMomentum stand beside them at settings tuned for them. `--tables defaults --reference
"dmgd:no hidden layer"` says what each default is worth.
"""

from .ablation import DRIFT, Ablation
from .optimizers import TUNED
from .variants import TABLES

BASELINES = ("muon", "delta_momentum")

ABLATION = Ablation(
    name="dmgd",
    about=__doc__.splitlines()[0],
    reference="dmgd:reference",
    tables={
        **{table: tuple(f"dmgd:{row}" for row in rows) for table, rows in TABLES.items()},
        "structure": (*(f"dmgd:{row}" for row in TABLES["structure"]), *BASELINES),
        DRIFT: ("dmgd:no hidden layer", "dmgd:hidden_dim=128", "dmgd:momentum=0.98", *BASELINES),
    },
    settings=TUNED["text"],
    setting=TUNED["text"]["dmgd"],
)

main = ABLATION.main
