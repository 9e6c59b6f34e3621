"""`w2v2-light infer OVERRIDES...`: fairseq's own CTC decoding program, on every supported Python, with our defaults.

Takes every override of examples/speech_recognition/new/infer.py, plus `decoding.operating_point=s2q1k2`; hydra's
flags too (`-m decoding.operating_point=s1q1k1,s2q1k1` decodes at several points, `--config-dir`, `--config-name`).
From Python: `infer(["task.data=...", "common_eval.path=..."])` returns one dict a job, with its WER.
"""

import argparse
import ast
import contextlib
import functools
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

from fairseq_w2v2_light.files import atomic_path
from fairseq_w2v2_light.paths import user_dir
from fairseq_w2v2_light.runtime.lm import require_flashlight

PASS_THROUGH = True

logger = logging.getLogger(__name__)

_USAGE = """usage: w2v2-light infer task.data=FOLDER common_eval.path=CHECKPOINT [KEY=VALUE ...] [hydra flags]

Decodes dataset.gen_subset (default: test) with fairseq's examples/speech_recognition/new/infer.py and prints the WER.

  decoding.operating_point=s2q1k2        decode a stochastic model at this operating point
  -m decoding.operating_point=s1q1k1,s2q1k1   ... at several, one after the other
  dataset.gen_subset=valid               another split
  common_eval.results_path=FOLDER        keep hypotheses, references and WER in FOLDER/SPLIT
  common_eval.post_process=sentencepiece for labels other than letters
  decoding.type=kenlm decoding.lmpath=words.arpa decoding.beam=50
                                         decode with a language model over words (needs flashlight-text);
                                         decoding.lmweight, .wordscore, .silweight: see w2v2-light tune-lm
  decoding.lexicon=lexicon.txt           ... and these words, or spellings, instead of the language model's own
  decoding.unitlm=true                   ... over labels, without a lexicon
  --config-dir DIR --config-name NAME    read the overrides from DIR/NAME.yaml
  --trust-checkpoint                     let a checkpoint run the code that it may hold; only if you trust who made it
"""

# Keys that hold a path. Users mean them from where they stand, but hydra changes the working directory.
_PATHS = (
    "task.data",
    "task.target_dictionary",
    "common.user_dir",
    "common_eval.path",
    "common_eval.results_path",
    "decoding.results_path",
    "decoding.lmpath",
    "decoding.lexicon",
)
# What hydra takes for its own grammar in a value that is not quoted.
_HYDRA_SIGNS = ",=()[]{}$"


class _JobFailed(BaseException):
    """Carries an error out of hydra, which would print it in its own way and exit."""


def run(args: argparse.Namespace) -> int:
    """Decodes, then prints one line a job: operating point, WER, counts."""
    if args.rest in ([], ["-h"], ["--help"]):
        print(_USAGE, end="", file=sys.stdout if args.rest else sys.stderr)
        return 0 if args.rest else 2
    try:
        results = infer(args.rest)
    except SystemExit as error:
        # hydra has printed what it could not compose; 0 is its --help.
        for text in filter(_needs_quotes, args.rest if error.code else []):
            key, _, value = text.partition("=")
            print(f"{key}: a path with any of {_HYDRA_SIGNS} needs quotes: \"{key}='{value}'\"", file=sys.stderr)
        return 2 if error.code else 0
    for result in results:
        point = result["operating_point"] or "operating point as trained"
        counts = f"{result['errors']} errors / {result['words']} words, {result['sentences']} utterances"
        print(f"{result['split']}, {point}: WER {result['wer']:.2f} % ({counts})")
    return 0


def _needs_quotes(text: str) -> bool:
    key, _, value = text.partition("=")
    return key in _PATHS and value[:1] not in ("'", '"') and any(sign in value for sign in _HYDRA_SIGNS)


def infer(argv: List[str]) -> List[Dict[str, Any]]:
    """Decodes as `w2v2-light infer` does; returns one result a job, in order (one, unless -m asks for more).

    Each has split, operating_point (text, or None for the checkpoint's own), wer (percent), errors, words, sentences,
    seconds (model and decoder, without loading) and results_path (folder, or None). Raises ValueError and
    FileNotFoundError with a message for the user, SystemExit where hydra refuses the command line.
    """
    import fairseq  # noqa: F401 - registers our models and tasks; before compat, which they import

    from fairseq_w2v2_light import compat

    arguments = compat.hydra_arguments(list(argv))
    flags = _without(argv, arguments.overrides)
    results: List[Dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="w2v2-light-infer-") as scratch:
        overrides = default_overrides(arguments, scratch) + compat.job_overrides("infer") + arguments.overrides
        adapt = functools.partial(
            _adapt_task, cwd=Path.cwd(), scratch=Path(scratch), multirun=arguments.multirun, results=results
        )
        try:
            compat.run_infer(flags + overrides, adapt)
        except _JobFailed as failure:
            raise _as_raised(failure.__cause__) from None
    return results


def _as_raised(error: Exception) -> Exception:
    """The error that a worker process met, which torch hides below the worker's traceback; any other as it is."""
    text = str(error)
    _, found, message = text.rpartition(f"\n{type(error).__name__}: ")
    if isinstance(error, (ValueError, OSError)) and found and text.startswith("Caught "):
        return type(error)(message.strip())
    return error


def default_overrides(arguments: argparse.Namespace, scratch: str) -> List[str]:
    """What to put before the user's overrides; nothing that a YAML of her own may say.

    Without a results folder hydra works in `scratch` and leaves nothing behind.
    """
    if arguments.config_name or arguments.config_path:
        return []
    given = dict(override.lstrip("+").split("=", 1) for override in arguments.overrides if "=" in override)
    defaults = [] if "task" in given else ["task=audio_finetuning"]
    results_path = given.get("common_eval.results_path") or given.get("decoding.results_path")
    if "hydra.run.dir" not in given and "common_eval.results_path" not in given:
        defaults.append(f"hydra.run.dir={results_path or scratch}")
    if "hydra.sweep.dir" not in given:
        defaults.append(f"hydra.sweep.dir={results_path or scratch}")
    if "hydra.sweep.subdir" not in given:
        defaults.append("hydra.sweep.subdir=${dataset.gen_subset}/${hydra.job.num}")
    return defaults


def _without(argv: List[str], overrides: List[str]) -> List[str]:
    rest = list(argv)
    for override in overrides:
        rest.remove(override)
    return rest


def _adapt_task(
    function: Callable, cwd: Path, scratch: Path, multirun: bool, results: List[Dict[str, Any]]
) -> Callable:
    """Wraps infer's hydra entry: prepares its config, counts what it decodes and keeps the result."""

    namespace = function.__globals__
    stock = namespace["InferenceProcessor"]

    def adapted(cfg):
        try:
            job_dir = Path.cwd()
            point = prepare_config(cfg, cwd, job_dir, multirun, scratch)
            # hydra's multirun calls this once a job: start from infer's own class every time.
            namespace["InferenceProcessor"] = _counting(stock, results)
            jobs = len(results)
            with _decoders(cfg):
                wer = function(cfg)
            # common.suppress_crashes=true ends a job without a result.
            for result in results[jobs:]:
                result.update(operating_point=point, results_path=cfg.decoding.results_path)
            return wer
        except Exception as error:
            raise _JobFailed() from error

    return adapted


def _decoders(cfg):
    """Context in which fairseq's decoders do what the config asks for."""
    from fairseq_w2v2_light import compat

    return compat.mended_kenlm_decoder() if str(cfg.decoding.type) == "kenlm" else contextlib.nullcontext()


def _counting(processor: type, results: List[Dict[str, Any]]) -> type:
    """Subclass of infer's InferenceProcessor that compares the number of hypotheses with that of references."""

    from fairseq_w2v2_light import compat
    from fairseq_w2v2_light.tasks.checked_audio import check_audio

    class CountingProcessor(processor):
        def load_model_ensemble(self):
            models, saved = super().load_model_ensemble()
            compat.complete_task_config(saved.task, self.task.cfg)
            return models, saved

        def get_dataset_itr(self, *args, **kwargs):
            split = self.cfg.dataset.gen_subset
            tsv = Path(self.cfg.task.data) / f"{split}.tsv"
            if tsv.is_file():
                self.task.datasets[split] = check_audio(self.task.datasets[split], tsv)
            return super().get_dataset_itr(*args, **kwargs)

        def get_res_file(self, fname):
            path = Path(self.cfg.decoding.results_path) / fname
            return self.unfinished.enter_context(atomic_path(path)).open("w", buffering=1, encoding="utf-8")

        def __enter__(self):
            self.unfinished = contextlib.ExitStack()
            return super().__enter__()

        def __exit__(self, *exc):
            # Hypotheses and references get their names when all is decoded and counted.
            with self.unfinished:
                closed = super().__exit__(*exc)
                # Stock has divided by the number of words before.
                if exc[0] in (None, ZeroDivisionError):
                    self._check_counts()
                if exc[0] is not None:
                    raise exc[1]
            return closed

        def _check_counts(self):
            split = self.cfg.dataset.gen_subset
            expected = len(self.task.dataset(split))
            if self.num_sentences != expected:
                raise ValueError(
                    f"split {split!r}: {self.num_sentences} hypotheses for {expected} references; "
                    "set dataset.required_batch_size_multiple=1, dataset.skip_invalid_size_inputs_valid_test=false"
                )
            if self.total_length == 0:
                raise ValueError(f"split {split!r}: its references hold no words; the word error rate is undefined")
            results.append(
                {
                    "split": split,
                    "wer": 100.0 * self.total_errors / self.total_length,
                    "errors": self.total_errors,
                    "words": self.total_length,
                    "sentences": self.num_sentences,
                    "seconds": self.gen_timer.sum,
                }
            )

    return CountingProcessor


def prepare_config(
    cfg, cwd: Path, job_dir: Path, multirun: bool = False, scratch: Optional[Path] = None
) -> Optional[str]:
    """Completes infer's composed config in place and verifies what it names; returns the operating point, if any.

    `cwd` is where the user stands, `job_dir` where hydra runs the job, `scratch` a folder for files that the job needs
    (default: `job_dir`). Raises ValueError and FileNotFoundError.
    """
    import torch
    from omegaconf import OmegaConf, open_dict

    from fairseq_w2v2_light import compat

    with open_dict(cfg):
        if cfg.get("task") is None:
            cfg.task = OmegaConf.create({})
        if cfg.task.get("_name") is None:
            cfg.task._name = "audio_finetuning"
        _resolve_paths(cfg, cwd)
        if not _select(cfg, "task.data"):
            raise ValueError("task.data is missing; give task.data=FOLDER, the folder with the manifests")
        if not cfg.common_eval.path:
            raise ValueError("common_eval.path is missing; give common_eval.path=CHECKPOINT")
        if cfg.distributed_training.distributed_world_size > 1:
            raise ValueError(
                f"distributed_training.distributed_world_size is {cfg.distributed_training.distributed_world_size}; "
                "w2v2-light infer decodes in one process: expected 1"
            )
        if str(cfg.decoding.type) != "viterbi":
            try:
                require_flashlight()
            except ValueError as error:
                raise ValueError(f"decoding.type={cfg.decoding.type}: {error}; or decoding.type=viterbi") from None
        if str(cfg.decoding.type) == "fairseqlm":
            # fairseq's decoder would let it run what it holds, with torch 2.1
            compat.read_checkpoint(cfg.decoding.lmpath)
        # fairseq-fixed's infer.yaml names a folder of its author's here.
        if cfg.common.user_dir is None or cfg.common.user_dir.startswith("/private/"):
            cfg.common.user_dir = str(user_dir())
        if not torch.cuda.is_available():
            cfg.common.cpu = True
        point = cfg.decoding.get("operating_point")
        if point is not None:
            cfg.common_eval.model_overrides = add_operating_point(cfg.common_eval.model_overrides, str(point))
        if cfg.common_eval.results_path is not None or cfg.decoding.results_path is not None:
            if multirun or cfg.decoding.results_path is None:
                cfg.decoding.results_path = str(job_dir)
            Path(cfg.decoding.results_path).mkdir(parents=True, exist_ok=True)
        _import_user_dir(cfg)
        labels, symbols = check_checkpoint(cfg.common_eval.path, point)
        if cfg.task.get("labels") is None:
            cfg.task.labels = labels
        if cfg.common_eval.post_process == "letter" and any(symbol.startswith("\u2581") for symbol in symbols):
            logger.warning("the checkpoint's symbols are sentencepieces: using common_eval.post_process=sentencepiece")
            cfg.common_eval.post_process = "sentencepiece"
        if str(cfg.decoding.type) == "kenlm":
            prepare_language_model(cfg.decoding, symbols, scratch or job_dir)
        check_split(cfg.task.data, cfg.dataset.gen_subset, labels, symbols, cfg.task.get("min_sample_size"))
    return None if point is None else str(point)


def prepare_language_model(decoding, symbols: List[str], folder: Path) -> None:
    """Checks the n-gram and lexicon of infer's `decoding` section, and gives fairseq's decoder a lexicon it can read.

    symbols: the checkpoint's, without fairseq's own; none where it does not tell. A lexicon is completed as `transcribe
    --lexicon` does (words alone are spelled, a missing final `|` added), and made of the n-gram's words where none is
    given; it is written into `folder`. Raises ValueError and FileNotFoundError that name file and line.
    """
    from fairseq_w2v2_light.data.manifest import SPECIAL_SYMBOLS
    from fairseq_w2v2_light.runtime.arpa import check_ngram_file
    from fairseq_w2v2_light.runtime.lexicon import held_endings, load_lexicon
    from fairseq_w2v2_light.runtime.text import Labels

    if "lmpath" not in decoding or not decoding.lmpath:
        raise ValueError("decoding.type=kenlm needs a language model: decoding.lmpath=FILE, an .arpa or KenLM's .bin")
    ngram = check_ngram_file(decoding.lmpath)
    if decoding.unitlm and decoding.lexicon is None:
        if ngram.words is not None and symbols and not set(symbols) & set(ngram.words):
            raise ValueError(
                f"{decoding.lmpath}: the n-gram has none of the checkpoint's labels; decoding.unitlm=true needs one "
                "that was made from the label files (train.ltr), not from words"
            )
        return
    if not symbols:
        if decoding.lexicon is None:
            raise ValueError("decoding.lexicon is missing; the checkpoint holds no dictionary to spell words with")
        return
    labels = Labels([*SPECIAL_SYMBOLS, *symbols])
    lexicon = load_lexicon(decoding.lmpath, decoding.lexicon, ngram, labels)
    path = folder / "lexicon.txt"
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for word, spellings in lexicon.items():
            # a language model over labels would count the last one twice
            for spelling in spellings if decoding.unitlm else held_endings(spellings, labels):
                file.write(f"{word}\t{' '.join(labels.symbols[index] for index in spelling)}\n")
    decoding.lexicon = str(path)


def add_operating_point(model_overrides: str, point: str) -> str:
    """Adds {'operating_point': point} to the text of `common_eval.model_overrides`; raises ValueError."""
    from fairseq_w2v2_light.nn.operating_point import OperatingPoint

    point = str(OperatingPoint.parse(point))
    try:
        overrides = ast.literal_eval(model_overrides)
    except (ValueError, SyntaxError):
        overrides = None
    if not isinstance(overrides, dict):
        raise ValueError(
            f"common_eval.model_overrides is {model_overrides!r}; expected a dict, like {{'key': 'value'}}"
        )
    if overrides.get("operating_point", point) != point:
        raise ValueError(
            f"decoding.operating_point is {point}, but common_eval.model_overrides says "
            f"{overrides['operating_point']!r}; give only one of them"
        )
    return repr({**overrides, "operating_point": point})


def check_checkpoint(path: str, point: Optional[str]) -> Tuple[Optional[str], List[str]]:
    """Label suffix and symbols of a checkpoint's CTC model (no symbols where an old checkpoint does not hold them).

    Raises FileNotFoundError, and ValueError where it is no checkpoint, has no output symbols, is of an unknown model,
    or has no operating points but is to run at one.
    """
    from fairseq_w2v2_light import compat
    from fairseq_w2v2_light.models.checkpoint import CTC_MODELS, encoder_weights, require_finite_weights, require_size

    state = compat.read_checkpoint(path)
    model = compat.checkpoint_section(state, "model")
    name = model.get("_name")
    labels = compat.checkpoint_section(state, "task").get("labels")
    dictionary = (state.get("task_state") or {}).get("target_dictionary")
    symbols = list(dictionary.symbols[dictionary.nspecial :]) if dictionary is not None else []
    if not labels and not symbols:
        raise ValueError(f"{path}: a pre-trained {name} model has no symbols to decode; fine-tune it with labels first")
    if not compat.is_registered_model(name):
        raise ValueError(f"{path}: model {name!r} is unknown here; name the plugin that has it in common.user_dir")
    if point is not None and not _has_key(model, "operating_point"):
        raise ValueError(
            f"{path}: decoding.operating_point is {point}, but this {name} checkpoint has no operating points "
            "(it holds no w2v2_light or stochastic_sew model); leave decoding.operating_point out"
        )
    require_finite_weights(state["model"], path)
    if name in CTC_MODELS and isinstance(model.get("w2v_args"), dict):
        require_size(model["w2v_args"].get("model") or {}, encoder_weights(state["model"]), path)
    return labels, symbols


def check_split(
    data: str, split: str, labels: Optional[str], symbols: List[str], min_sample_size: Optional[int] = None
) -> None:
    """Raises ValueError or FileNotFoundError, naming file and line, where a split cannot be decoded.

    Reads the text files, and the header of every audio file. `symbols` are the checkpoint's; fairseq
    leaves out what is shorter than `min_sample_size`.
    """
    from fairseq_w2v2_light.data import manifest

    if ":" in split or "," in split:
        # Several corpora (fairseq-fixed's task.multi_corpus_keys): fairseq reads each under its own name.
        return
    tsv = Path(data) / f"{split}.tsv"
    if Path(data).is_dir() and not tsv.is_file():
        raise FileNotFoundError(f"{tsv}: no such split; {data} has: {', '.join(manifest.list_splits(data))}")
    has_dictionary = (Path(data) / f"dict.{labels}.txt").is_file()
    manifest.validate_split(data, split, labels if has_dictionary else None, min_sample_size)
    root, entries = manifest.read_manifest(tsv).root, manifest.read_manifest(tsv).entries
    for number, entry in enumerate(entries, start=2):
        problem = None if manifest.is_zip_slice(entry.path) else manifest.audio_header_problem(Path(root) / entry.path)
        if problem:
            raise ValueError(f"{tsv}:{number}: {problem}")
    if not symbols:
        return
    path = Path(data) / f"{split}.{labels}"
    for number, line in enumerate(manifest.read_labels(path), start=1):
        unknown = sorted(set(line.split()) - set(symbols))
        if unknown:
            raise ValueError(
                f"{path}:{number}: symbol {unknown[0]!r} is not among those that the checkpoint was trained with"
            )


def _import_user_dir(cfg) -> None:
    from fairseq import utils

    if not Path(cfg.common.user_dir).is_dir():
        raise FileNotFoundError(f"{cfg.common.user_dir}: no such folder (common.user_dir)")
    try:
        utils.import_user_module(cfg.common)
    except ImportError as error:
        raise ValueError(f"common.user_dir={cfg.common.user_dir}: {error}") from error


def _resolve_paths(cfg, cwd: Path) -> None:
    for key in _PATHS:
        value = _select(cfg, key)
        if value:
            section, name = key.split(".")
            cfg[section][name] = os.path.join(cwd, os.path.expanduser(value))


def _select(cfg, key: str) -> Optional[str]:
    section, name = key.split(".")
    node = cfg[section]
    return node[name] if name in node else None


def _has_key(section: Any, key: str) -> bool:
    if isinstance(section, argparse.Namespace):
        section = vars(section)
    if not isinstance(section, dict):
        return False
    return key in section or any(_has_key(value, key) for value in section.values())
