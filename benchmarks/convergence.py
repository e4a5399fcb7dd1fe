"""Loss at equal steps and at equal wall time, every optimizer tuned with the same number of trials.

1. Step times of all optimizers in paired shuffled rounds: forward, backward and step.
2. Tuning: every point of every search space, on one seed.
3. Equal steps: the best point of each, on other seeds.
4. Equal wall time: the same, with as many steps as fit into the time the reference needs, decayed over that length.
"""

import argparse
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from .command_line import add_arguments, carry_out
from .measure import machine, paired_rounds, summarize, versions, waiting
from .optimizers import OPTIMIZERS, TUNED, Setting, available, build, search_space
from .plots import draw_convergence
from .report import edges, print_report, summarize_runs
from .tasks import TASKS, Task, make_task
from .training import Trial, train_step
from .trials import Meter, Results, run_trials

RESULTS = Path(__file__).parent / "results"
AGAIN = "adamw (again)"  # the A/A arm: what the clock says about two equal optimizers
STEPS_PER_CALL = 10  # SOAP and the like do some of their work every tenth step only
TUNING_SEED = 0
PRESETS: dict[str, dict[str, Any]] = {
    "demo": dict(task="text", steps=250, seeds=[1, 2], optimizers="adamw,muon,dmgd", tune=False, rounds=5),
    "full": dict(task="text", tune_steps=300),
    "gpu": dict(
        task="gpt", tune_steps=384, optimizers="adamw,muon,momentum,delta_momentum,dmgd_linear",
        eval_every=48, rounds=6, workers=3, wall=False,
    ),
}  # fmt: skip


def main(arguments: list[str]) -> int:
    args = parse(arguments)
    return carry_out("convergence", arguments, args, kind=Trial, run=run, report=report, width=180)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Command line over preset over the task's own defaults."""
    about = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser("python -m benchmarks convergence", description=about)
    parser.add_argument("--preset", choices=PRESETS, help="demo: minutes, untuned; full: text, everyone; gpu: gpt")
    parser.add_argument("--task", choices=TASKS, default="text")
    corpora = ["stdlib", "imdb", "newsgroups", "shakespeare"]
    parser.add_argument("--corpus", choices=corpora, help="text, gpt: what to read")
    parser.add_argument("--data", help="text, gpt: a file of your own")
    parser.add_argument("--device", help="gpt: cuda, its default, or cpu; the other tasks run on the cpu alone")
    kinds = ["gpt", "transformer", "hope_attention", "hope", "vit", "resnet"]
    parser.add_argument("--model", choices=kinds, help="what to train; the last two for vision, the others for text")
    parser.add_argument("--images", choices=["digits", "fashion"], help="vision: what to look at")
    parser.add_argument("--steps", type=int, help="length of a run; default: the task's")
    parser.add_argument("--tune-steps", type=int, help="length of a tuning run; default: --steps")
    parser.add_argument("--optimizers", help=f"comma-separated; default: all installed of {', '.join(OPTIMIZERS)}")
    parser.add_argument("--no-tune", dest="tune", action="store_false", help="use the settings in optimizers.py")
    parser.add_argument("--no-wall", dest="wall", action="store_false", help="leave out the runs at equal wall time")
    parser.add_argument("--reference", default="muon", help="whose time for --steps is the wall budget (if it runs)")
    parser.add_argument("--eval-every", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=12, help=f"timing rounds of {STEPS_PER_CALL} steps")
    add_arguments(parser)
    preset = parser.parse_known_args(arguments)[0].preset
    parser.set_defaults(**PRESETS.get(preset, {}))
    args = parser.parse_args(arguments)
    wanted = args.optimizers.split(",") if args.optimizers else available()
    if unknown := [name for name in wanted if name not in OPTIMIZERS]:
        parser.error(f"no optimizer named {unknown[0]!r}; there are: {', '.join(OPTIMIZERS)}")
    args.optimizers = [name for name in OPTIMIZERS if name in wanted]  # the table's order: baselines first
    if args.task != "gpt" and args.device not in (None, "cpu"):
        parser.error(f"{args.task} runs on the cpu alone; --task gpt runs on {args.device}")
    if args.task == "gpt" and (blind := [name for name in args.optimizers if OPTIMIZERS[name].inputs]):
        parser.error(f"{blind[0]} looks at layer inputs, which a compiled model does not show; see --optimizers")
    keys = {
        "text": ("corpus", "data", "model"), "vision": ("model", "images"), "regression": (),
        "gpt": ("corpus", "data", "device"),
    }[args.task]  # fmt: skip
    args.options = {key: getattr(args, key) for key in keys if getattr(args, key)}
    if not args.output:
        words = ["convergence", preset or args.task, *(Path(word).stem for word in args.options.values())]
        args.output = RESULTS / f"{'_'.join(words)}.json"
    return args


def run(args: argparse.Namespace, results: Results, console: Console) -> None:
    """Fill `results`."""
    task = make_task(args.task, **args.options)
    steps, names = args.steps or task.steps, args.optimizers
    tune_steps = args.tune_steps or steps
    if args.tune:
        guesses = {name: middle(name, task) for name in names}
    else:
        guesses = {name: tuned(name, task) for name in names}
    results.document |= {
        "benchmark": "convergence",
        "config": {
            "task": task.name, "metric": task.metric, **task.describe(), "steps": steps, "seeds": args.seeds,
            "tuned_here": args.tune, "tune_steps": tune_steps, "tuning_seed": TUNING_SEED,
            "weight_decay": task.weight_decay, "aux_lr": task.aux_lr,
        },
        "search_spaces": {
            name: {
                "lr": sorted({at.lr for at in search_space(name, task.name)}),
                OPTIMIZERS[name].second: sorted({at.second for at in search_space(name, task.name)}),
            }
            for name in names
        },
        "machine": machine(), "versions": versions(),
    }  # fmt: skip
    console.print(f"{task.metric}: {', '.join(names)}; {steps} steps, seeds {args.seeds}")
    if not {*names, "adamw", AGAIN} <= set(results.document.get("step_time", ())):
        console.print("timing one step of each, in shuffled rounds ...")
        results.document["step_time"] = step_times(task, guesses, args.rounds)
    step_time = results.document["step_time"]

    def trial(name: str, at: Setting, seed: int, length: int) -> Trial:
        options = tuple(sorted(args.options.items()))
        return Trial(args.task, options, name, at.lr, at.second, seed, length, min(args.eval_every, length))

    searches = {name: search_space(name, task.name) if args.tune else [] for name in names}
    reference = args.reference if args.reference in names else max(names, key=lambda name: step_time[name]["ms"])
    lengths = fitted_steps(step_time, steps, reference)
    total = tune_steps * sum(map(len, searches.values())) + len(args.seeds) * steps * len(names)
    if args.wall:
        total += len(args.seeds) * sum(lengths[name] for name in names)
    with Meter(total) as meter:
        tuning = [trial(name, at, TUNING_SEED, tune_steps) for name in names for at in searches[name]]
        run_trials("tune", tuning, results, meter, args.workers)
        best = {name: best_of(searches[name], name, tuning, results) if args.tune else guesses[name] for name in names}
        equal_steps = {name: [trial(name, best[name], seed, steps) for seed in args.seeds] for name in names}
        run_trials("equal steps", itertools.chain(*equal_steps.values()), results, meter, args.workers)
        equal_wall = {name: [trial(name, best[name], seed, lengths[name]) for seed in args.seeds] for name in names}
        if args.wall:
            run_trials("equal wall time", itertools.chain(*equal_wall.values()), results, meter, args.workers)
    results.document |= {
        "best": {name: {"lr": at.lr, OPTIMIZERS[name].second: at.second} for name, at in best.items()},
        "edges": edges(best, task.name) if args.tune else [],
        "equal_steps": summarize_runs(equal_steps, results),
        "equal_wall": summarize_runs(equal_wall, results) if args.wall else {},
        "wall_reference": reference,
    }


def report(results: Results, plot: Path, console: Console) -> None:
    print_report(results.document, console)
    draw_convergence(results.document, results.trials, plot)


def best_of(search: list[Setting], name: str, tuning: list[Trial], results: Results) -> Setting:
    """The point with the lowest loss; a diverged one loses against any other."""
    losses = {trial.setting: results.trials[trial]["loss"] for trial in tuning if trial.optimizer == name}
    return min(search, key=lambda at: float("inf") if losses[at] is None else losses[at])


def middle(name: str, task: Task) -> Setting:
    """A point to time an optimizer at: the second learning rate, and of three second values the middle one."""
    space = search_space(name, task.name)
    return space[len(space) // 3]


def tuned(name: str, task: Task) -> Setting:
    """The committed best setting."""
    try:
        return TUNED[task.name][name]
    except KeyError:
        sys.exit(f"optimizers.py has no tuned setting of {name} for {task.name}; run without --no-tune")


def step_times(task: Task, settings: dict[str, Setting], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of one whole training step per optimizer, and its ratio to AdamW's."""
    adamw = settings.get("adamw", middle("adamw", task))
    arms = {name: training_arm(task, name, at) for name, at in ({"adamw": adamw} | settings).items()}
    arms[AGAIN] = training_arm(task, "adamw", adamw)
    summary = summarize(paired_rounds(arms, rounds=rounds, warmup=1), reference="adamw")
    for numbers in summary.values():
        numbers["ms"] /= STEPS_PER_CALL
        numbers["min_ms"] /= STEPS_PER_CALL
    return summary


def fitted_steps(step_time: dict[str, dict[str, float]], steps: int, reference: str) -> dict[str, int]:
    """How many steps of each take as long as `steps` of the reference, by their ratios in the same rounds."""
    time = steps * step_time[reference]["ratio"]
    return {name: max(1, round(time / numbers["ratio"])) for name, numbers in step_time.items()}


def training_arm(task: Task, name: str, setting: Setting) -> Callable[[], None]:
    """`STEPS_PER_CALL` training steps on a model of its own."""
    model = task.model(0)
    optimizers = build(name, task, model, setting, warmup=1)
    batches = list(task.batches(0, STEPS_PER_CALL))

    def arm() -> None:
        for batch in batches:
            train_step(task, model, optimizers, batch)

    return waiting(arm, next(model.parameters()).device.type)
