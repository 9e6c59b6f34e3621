"""Whether recordings that are transcribed at an operating point chosen for a budget keep it.

    python benchmarks/budget.py [--recipes pretraining/light_stochastic_tiny] [--budgets 3] [--repeats 3] [--threads 2]

The network of each recipe with random weights is measured once, as `--auto-operating-point` does, in a process of its
own. Then, for budgets between its fastest and its slowest point, and for several sets of recordings (noise), fresh
processes choose a point from what was kept, transcribe the recordings, and measure the point again. The table has what
these took as a share of the budget: median and worst of the processes. Exits with 1 when a median is above 1.1.

--cpu-time measures and compares seconds of one thread's CPU instead of the clock: whether what was measured is what is
needed, on a machine that others use, too.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import List

import numpy as np
import soundfile
import torch
from limits import verdict

from fairseq_w2v2_light.runtime.folder import write_folder
from fairseq_w2v2_light.study.bench import load_model

# seconds of the recordings of each set
SETS = {
    "12 of 1 to 4 s": [1 + index / 4 for index in range(12)],
    "one of 5 s": [5.0],
    "4 of 10 s": [10.0] * 4,
    "one of 45 s": [45.0],
}
TOLERANCE = 1.1
SMOKE = dict(recipes="pretraining/light_stochastic_tiny", budgets=1, repeats=1, sets=1, rounds=1)
# arguments: JSON with the options of the verb, the recordings, whether by CPU time, rounds (0: as many as usual)
CHILD = """
import argparse, functools, json, sys, time
from fairseq_w2v2_light.cli import recognition_options
from fairseq_w2v2_light.runtime import operating

given = json.loads(sys.argv[1])
clock = time.process_time if given["cpu_time"] else time.perf_counter
operating.measure = functools.partial(operating.measure, clock=clock)
if given["rounds"]:
    operating.FEWEST_ROUNDS = operating.MOST_ROUNDS = given["rounds"]
parser = argparse.ArgumentParser()
recognition_options.add_arguments(parser)
args = parser.parse_args(given["options"])
choices = []
choose = operating.choose
operating.choose = lambda *values: choices.append(choose(*values)) or choices[-1]
made = recognition_options.recognizer(args, lambda line: None, given["recordings"])
(choice,) = choices
began = clock()
seconds = sum(transcript.seconds for transcript in made.transcribe(given["recordings"]))
took = clock() - began
again = None
if given["recordings"]:
    run = lambda point, samples: list(made.transcribe([(samples, made.sample_rate)]))
    again = operating.measure(run, [choice.point], made.sample_rate)[choice.point].median
print(json.dumps({
    "line": choice.line(), "point": str(choice.point), "expected": choice.factors[choice.point],
    "factor": took / seconds if seconds else None, "again": again, "slow": choice.speeds[choice.point].slow,
    "speeds": [speed.slow for speed in choice.speeds.values()],
}))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", default="pretraining/light_stochastic_tiny,pretraining/stochastic_sew_base")
    parser.add_argument("--budgets", type=int, default=3, help="how many, between the fastest and the slowest point")
    parser.add_argument("--repeats", type=int, default=3, help="fresh processes for each budget and set")
    parser.add_argument("--sets", type=int, default=len(SETS), help="the first so many")
    parser.add_argument("--rounds", type=int, default=0, help="of a measurement (default: as usual)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="needs --threads 1")
    parser.add_argument("--smoke", action="store_true", help="a tiny network, for seconds: whether it runs at all")
    args = parser.parse_args()
    if args.smoke:
        parser.set_defaults(**SMOKE)
        args = parser.parse_args()
    if args.cpu_time and args.threads != 1:
        parser.error("--cpu-time: needs --threads 1, the CPU time of several says nothing of the clock's")
    clock = "CPU time" if args.cpu_time else "time"
    print(f"torch {torch.__version__}, {args.threads} thread(s), {clock}; shares of the budget, median (worst)\n")
    print("| recipe | budget | recordings | point | expected | recordings took | point measured again |")
    print("|---|---|---|---|---|---|---|")
    missed: List[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for recipe in args.recipes.split(","):
            missed += measure(args, recipe, Path(folder))
    return verdict(missed, args.smoke)


def measure(args, recipe: str, folder: Path) -> List[str]:
    """Prints the rows of a recipe; those that have a median above the tolerance."""
    place = folder / recipe.replace("/", "-")
    write_folder(load_model(recipe), place / "model")
    sets = {name: write_noise(place, name, lengths) for name, lengths in list(SETS.items())[: args.sets]}
    speeds = run(args, place, 1e6, [])["speeds"]
    fastest, slowest = min(speeds), max(speeds)
    missed = []
    for index in range(args.budgets):
        # halfway between, in factors; the slowest point just fits the last one
        budget = 1.02 * fastest * (slowest / fastest) ** ((index + 1) / args.budgets)
        for name, recordings in sets.items():
            try:
                runs = [run(args, place, budget, recordings) for _ in range(args.repeats)]
            except NoPoint as error:
                print(f"| {recipe} | {budget:.4g} | {name} | none: {error} |  |  |  |")
                continue
            shares = [[one[key] / budget for one in runs] for key in ("expected", "factor", "again")]
            cells = [f"{statistics.median(share):.2f} ({max(share):.2f})" for share in shares]
            print(f"| {recipe} | {budget:.4g} | {name} | {runs[0]['point']} | {' | '.join(cells)} |", flush=True)
            worst = max(map(statistics.median, shares))
            missed += [f"{recipe} {budget:.4g}, {name}: {worst:.2f} of {TOLERANCE:g}"] if worst > TOLERANCE else []
    return missed


class NoPoint(Exception):
    """No point keeps the budget."""


def run(args, place: Path, budget: float, recordings) -> dict:
    """What a fresh process chooses for a budget, and what it takes."""
    options = ["--model", str(place / "model"), "--auto-operating-point", "--budget", f"rtf={budget!r}"]
    given = {
        "options": [*options, "--threads", str(args.threads)],
        "recordings": [str(path) for path in recordings],
        "cpu_time": args.cpu_time,
        "rounds": args.rounds,
    }
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "XDG_CACHE_HOME": str(place.absolute() / "cache"),
    }
    result = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(given)], capture_output=True, text=True, env=environment
    )
    if "no operating point is that fast" in result.stderr:
        raise NoPoint(result.stderr.partition("the fastest, ")[2].partition(";")[0])
    if result.returncode != 0:
        raise RuntimeError(result.stderr)
    return json.loads(result.stdout)


def write_noise(place: Path, name: str, lengths) -> list:
    """Files of noise with pauses, such as speech has, of these lengths in seconds."""
    from streaming import speech  # beside this file

    paths = []
    for index, seconds in enumerate(lengths):
        paths.append(place / f"{name} {index}.wav")
        soundfile.write(str(paths[-1]), speech(seconds, seed=index).astype(np.float32), 16000)
    return paths


if __name__ == "__main__":
    sys.exit(main())
