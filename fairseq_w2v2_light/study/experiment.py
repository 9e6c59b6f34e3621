"""Runs fairseq's own commands one after the other, as the examples do: train, decode."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence, Union

from ..data.manifest import localise_manifest, read_manifest
from ..files import atomic_write_text
from ..paths import config_dir, user_dir

_UPDATE = re.compile(r"num_updates=(\d+)")
_VALID = re.compile(r"num_updates (\d+)")


def localised(source: Path, out: Path) -> Path:
    """`out`/data: the manifest folder `source` with absolute roots, as fairseq wants them; made where it is missing.

    Raises ValueError where it is of another folder, which what was trained in `out` belongs to, and FileNotFoundError
    where a split or its letter labels are missing.
    """
    for name in (f"{split}.{ending}" for split in ("train", "valid", "test") for ending in ("tsv", "ltr")):
        if not (source / name).is_file():
            raise FileNotFoundError(
                f"{source / name}: no such file; expected a manifest folder with train, valid and test and their "
                "letter labels, as `w2v2-light prepare` makes it"
            )
    data = out / "data"
    if not all((data / f"{split}.tsv").is_file() for split in ("train", "valid", "test")):
        localise_manifest(source, data, force=True)
    found = Path(read_manifest(data / "train.tsv").root)
    expected = (source / read_manifest(source / "train.tsv").root).resolve()
    if found != expected:
        raise ValueError(
            f"{out}: what is there was trained on {found}, not on {expected}; give another folder as --out"
        )
    return data


def train(
    recipe: str,
    data: Path,
    out: Path,
    overrides: Sequence[str] = (),
    max_update: Optional[int] = None,
    report: Callable[[str], None] = print,
) -> Path:
    """Trains a recipe with stock `fairseq-hydra-train`; returns the checkpoint to go on with.

    recipe: a group and name below `config/`, like pretraining/w2v2_light_tiny. Checkpoints and `train.log` go to
    `out`; a run that was stopped goes on where it was. Returns the last checkpoint, at the end of the learning rate's
    schedule: a few hundred words of validation choose a best one by chance (on connected digits, the best of six by
    valid WER once made 33 errors on the test split, the last one 17). Raises RuntimeError with the end of the log when
    the command fails, and ValueError where `out` holds what was trained with other settings.
    """
    out.mkdir(parents=True, exist_ok=True)
    group, name = recipe.rsplit("/", 1)
    command = [
        _program("fairseq-hydra-train"),
        f"common.user_dir={user_dir()}",
        f"task.data={Path(data).resolve()}",
        f"checkpoint.save_dir={out.resolve()}",
        f"hydra.run.dir={out.resolve() / 'hydra'}",
        *overrides,
        *([f"optimization.max_update={max_update}"] if max_update else []),
        "--config-dir",
        str(config_dir(group)),
        "--config-name",
        name,
    ]
    report("$ " + shlex.join(["fairseq-hydra-train", *command[1:]]))
    log, finished = out / "train.log", out / "finished.txt"
    if finished.is_file() and finished.read_text(encoding="utf-8") == shlex.join(command[1:]):
        report(f"  finished before; remove {out} to train again")
        return out / "checkpoint_last.pt"
    _require_same_settings(out, command[1:])
    start = time.time()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=_environment())
    last = 0
    with log.open("a", encoding="utf-8") as file:
        for line in process.stdout:
            file.write(line)
            file.flush()
            last = _show_progress(line, last, max_update, start, report)
    if process.wait() != 0:
        raise RuntimeError(f"fairseq-hydra-train ended with {process.returncode}; the end of {log}:\n{_tail(log)}")
    atomic_write_text(finished, shlex.join(command[1:]))
    report(f"  done in {time.time() - start:.0f} s; log: {log}")
    return out / "checkpoint_last.pt"


def _require_same_settings(out: Path, arguments: Sequence[str]) -> None:
    """Notes the settings of a run; fairseq would go on with the checkpoint of another one as if it were this one's."""
    file = out / "command.txt"
    before = next((one.read_text(encoding="utf-8") for one in (file, out / "finished.txt") if one.is_file()), None)
    if before is not None and (out / "checkpoint_last.pt").is_file():
        changed = sorted(set(arguments) ^ set(shlex.split(before)))
        if changed:
            raise ValueError(
                f"{out}: what is there was trained with other settings ({' '.join(changed)}); remove it, or give "
                "another folder as --out"
            )
    atomic_write_text(file, shlex.join(arguments))


# what makes light_stochastic_tiny a plain wav2vec 2.0
PLAIN = ("model.unique_layers=0", "model.squeeze_factors=[1]", "model.query_pools=[1]", "model.kv_pools=[1]")


def train_plain(
    data: Path,
    out: Path,
    updates: Sequence[int],
    report: Callable[[str], None] = print,
    overrides: Sequence[str] = (),
) -> Path:
    """Trains the plain tiny model of the examples, (pre-training, fine-tuning) updates; returns its CTC checkpoint.

    overrides: of the pre-training recipe.
    """
    recipe = "pretraining/light_stochastic_tiny"
    start = train(recipe, data, out / "pretrained", [*PLAIN, *overrides], max_update=updates[0], report=report)
    overrides = [f"model.w2v_path={start.resolve()}"]
    return train("finetuning/tiny", data, out / "finetuned", overrides, max_update=updates[1], report=report)


def _show_progress(line, last, max_update, start, report) -> int:
    match = _UPDATE.search(line) or (_VALID.search(line) if "[valid]" in line else None)
    if match is None:
        return last
    updates = int(match.group(1))
    step = max((max_update or 1000) // 10, 1)
    if "[valid]" in line:
        scores = re.findall(r"\| (loss|wer|accuracy) ([\d.]+)", line)
        report(f"  update {updates}: valid " + ", ".join(f"{name} {value}" for name, value in scores))
    elif updates // step > last // step:
        loss = re.search(r"\bloss=([\d.]+)", line)
        total = f" / {max_update}" if max_update else ""
        report(f"  update {updates}{total}: loss {loss.group(1) if loss else '?'} ({time.time() - start:.0f} s)")
    return max(updates, last)


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def _program(name: str) -> str:
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name}: not found beside {sys.executable} nor on PATH; install fairseq")
    return found


def _environment() -> Dict[str, str]:
    """The environment for fairseq's commands: the plugin importable, and output that comes line by line."""
    path = os.pathsep.join(filter(None, [str(user_dir().parent), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def decode(
    checkpoint: Union[str, Path],
    data: Path,
    points: Sequence[str],
    out: Path,
    split: str = "test",
    report: Callable[[str], None] = print,
) -> List[Dict]:
    """Decodes `split` with the stock infer at each operating point; its results, one dict a point (wer in percent).

    Hypotheses and infer's log go to `out`.
    """
    from ..cli.infer import infer

    arguments = [
        f"task.data={Path(data).resolve()}",
        f"common_eval.path={Path(checkpoint).resolve()}",
        f"common_eval.results_path={out.resolve()}",
        f"dataset.gen_subset={split}",
        "-m",
        "decoding.operating_point=" + ",".join(points),
    ]
    report("$ " + shlex.join(["w2v2-light", "infer", *arguments]))
    out.mkdir(parents=True, exist_ok=True)
    log = out / "infer.log"
    with log.open("w", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        return infer(arguments)
