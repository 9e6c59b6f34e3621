"""Options of the verbs that recognise speech (transcribe, evaluate): the model, its operating point, the decoder."""

import math
import os
import sys
from typing import Any, Callable, Dict, List, Sequence

_OF_THE_LM = ("lexicon", "lexicon_free", "lm_weight", "word_score", "sil_score", "beam_threshold")


def add_arguments(parser, several_points: bool = False, model_required: bool = True) -> None:
    """Declares them. several_points: --operating-point takes a list."""
    parser.add_argument(
        "--model",
        required=model_required,
        metavar="FOLDER|CHECKPOINT",
        help="a model folder, as `export` writes it, or a fine-tuned checkpoint",
    )
    parser.add_argument(
        "--operating-point",
        default="",
        metavar="POINT[,POINT...]" if several_points else "POINT",
        help=f"e.g. s2q1k2 (default: the model's own){'; several are run one after the other' * several_points}",
    )
    parser.add_argument(
        "--auto-operating-point",
        action="store_true",
        help="measure the speed of every operating point on this machine, once, and take the most accurate one that "
        "keeps --budget",
    )
    parser.add_argument(
        "--budget",
        metavar="rtf=FACTOR",
        help="seconds of compute that a second of audio may take, e.g. rtf=0.05; of the recordings given, by their "
        "lengths, in batches of 20 s, else of utterances of 10 s, one by one",
    )
    parser.add_argument(
        "--measure-again", action="store_true", help="do not rely on what --auto-operating-point measured before"
    )
    parser.add_argument("--verbose", "-v", action="store_true", help="print what the operating points were measured at")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "int8"),
        help="in which the model computes (default: auto, as the folder says)",
    )
    parser.add_argument("--beam", type=int, metavar="N", help="prefixes kept (default: 1, greedy; more with --lm)")
    parser.add_argument("--lm", metavar="FILE", help="a KenLM n-gram, .arpa or .bin: `pip install flashlight-text`")
    parser.add_argument("--lexicon", metavar="FILE", help="the words that --lm may find, with their spelling")
    parser.add_argument(
        "--lexicon-free",
        action="store_true",
        default=None,
        help="--lm is an n-gram over the labels (of train.ltr); words are not limited",
    )
    parser.add_argument("--lm-weight", type=float, metavar="W", help="of the language model's log-probability")
    parser.add_argument("--word-score", type=float, metavar="W", help="added for each word, with --lm")
    parser.add_argument("--sil-score", type=float, metavar="W", help="added for each silence, with --lm")
    parser.add_argument("--beam-threshold", type=float, metavar="X", help="how far behind the best a prefix may be")
    parser.add_argument("--dictionary", metavar="FILE", help="dict.ltr.txt, for a checkpoint that holds none")
    add_device(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")


def add_device(parser) -> None:
    """Declares --device."""
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="where the model runs (default: cpu); on a GPU int8 models in bfloat16",
    )


def check(args) -> None:
    """Raises ValueError for options that contradict each other, before anything is loaded."""
    for name in ("beam", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name}: found {value}, expected 1 or more")
    for name in ("lm_weight", "word_score", "sil_score", "beam_threshold"):
        value = getattr(args, name)
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{_option(name)}: found {value:g}, expected a finite number")
    given = [name for name in _OF_THE_LM if getattr(args, name) is not None]
    if given and args.lm is None:
        raise ValueError(f"{_option(given[0])}: only for decoding with --lm; add --lm FILE, or leave it out")
    if args.auto_operating_point:
        from ..runtime.operating import parse_budget

        if args.budget is None:
            raise ValueError("--auto-operating-point needs a budget to keep, such as --budget rtf=0.05")
        parse_budget(args.budget)
        if args.operating_point:
            raise ValueError(
                f"--operating-point {args.operating_point}: --auto-operating-point chooses one; leave one of them out"
            )
        return
    for name in ("budget", "measure_again"):
        if getattr(args, name):
            raise ValueError(f"{_option(name)}: only with --auto-operating-point; add that, or leave it out")


def note(line: str) -> None:
    """Prints a line of information on standard error, where there is one."""
    if sys.stderr is not None:
        print(line, file=sys.stderr, flush=True)


def recognizer(args, note: Callable[[str], None] = note, recordings: Sequence[Any] = (), longest: float = 0.0):
    """The Recognizer that parsed options describe, at its (first) operating point.

    note: is told what --auto-operating-point chose, and why. recordings: paths of those that are to keep the budget;
    None: a stream. longest: seconds that are heard at once, if not the default. Raises ValueError and
    FileNotFoundError.
    """
    from ..runtime.recognizer import Recognizer

    first = args.operating_point.split(",")[0].strip()
    made = Recognizer.from_pretrained(
        args.model,
        operating_point=first,
        dtype=args.dtype,
        threads=args.threads,
        dictionary=args.dictionary,
        device=args.device or "cpu",
    )
    decoder = _decoder(args, made.labels)
    if decoder is not None:
        made.decoder = decoder
    if args.auto_operating_point:
        choice = choose_point(args, made, note, recordings, longest)
        made.point = choice.point
        note(choice.line())
        if args.verbose:
            for line in choice.table():
                note(line)
    return made


def choose_point(args, made, note: Callable[[str], None], recordings: Sequence[Any] = (), longest: float = 0.0):
    """The Choice of an operating point for --budget, among those of the Recognizer `made`; others as `recognizer`."""
    import torch

    from ..runtime import operating
    from ..runtime.audio import duration
    from ..runtime.folder import is_model_folder, read_config

    model = made.model
    config = read_config(args.model).get("about") if is_model_folder(args.model) else None
    candidates = operating.trained_points(model.config, model.point, config)
    ranking = operating.rank(model.config, candidates, len(model.symbols), config, made.sample_rate)
    key = {
        **operating.machine(torch.get_num_threads(), torch.__version__),
        "model": operating.fingerprint(args.model),
        "dtype": made.dtype,
        **({"gpu": torch.cuda.get_device_name()} if args.device == "cuda" else {}),
        "decoder": decoder_name(args),
        "lm": "" if args.lm is None else os.path.abspath(args.lm),
    }

    def run(point, samples) -> None:
        made.point = point
        for transcript in made.transcribe([(samples, made.sample_rate)]):
            if transcript.error:
                raise ValueError(f"{args.model}: cannot be measured at {point}: {transcript.error}")

    def macs(point, seconds: float) -> int:
        return operating.whole_macs(model.config, point, len(model.symbols), made.sample_rate, seconds)

    workload = operating.Workload.of(recordings, lambda path: 0.0 if path is None else duration(path), longest or None)
    before = made.point
    try:
        speeds, measured = operating.kept_or_measured(run, candidates, key, made.sample_rate, args.measure_again, note)
        choice = operating.choose(ranking, speeds, operating.parse_budget(args.budget), measured, workload, macs)
        if measured != operating.NOW:
            # a process's first call takes longer, whatever it hears: that belongs to loading
            run(choice.point, operating.noise_of(made.sample_rate))
    finally:
        made.point = before
    return choice


def compare_with_budget(args, compute: float, audio: float, note: Callable[[str], None] = note) -> None:
    """Tells `note` where a run took more than --budget and a tenth; compute, audio: its seconds."""
    from ..runtime.operating import parse_budget

    if args.auto_operating_point and audio and compute > 1.1 * audio * parse_budget(args.budget):
        note(
            f"note: this run had a real-time factor of {compute / audio:.4g}, above --budget {args.budget}: the "
            "machine was busier than when it was measured (--measure-again), or there was too little audio to get "
            "under way"
        )


def points(args, made, all_points: bool = False) -> List[Any]:
    """The operating points to run the Recognizer `made` at: those named, all it was trained for, or its own."""
    from ..nn.operating_point import OperatingPoint
    from ..runtime.folder import is_model_folder, read_config
    from ..runtime.operating import trained_points

    if all_points:
        about = read_config(args.model).get("about") if is_model_folder(args.model) else None
        return trained_points(made.model.config, made.model.point, about)
    if "," in args.operating_point:
        space = made.model.config.operating_points
        named = [space.check(OperatingPoint.parse(text)) for text in args.operating_point.split(",")]
        return list(dict.fromkeys(named))
    return [made.point]


def describe(args, made) -> Dict[str, str]:
    """How a Recognizer recognises, for a report."""
    return {
        "model": str(args.model),
        "operating_point": str(made.point),
        "dtype": made.dtype,
        **({"device": args.device} if args.device == "cuda" else {}),
        "decoder": decoder_name(args),
    }


def decoder_name(args) -> str:
    """The decoder and its settings in a few words: "greedy", "beam 8", "lm 4gram.bin, beam 50, lm weight 2.0"."""
    parts = [] if args.lm is None else [f"lm {os.path.basename(args.lm)}"]
    parts += [f"beam {args.beam}"] if args.beam is not None and (args.beam > 1 or parts) else []
    for name in _OF_THE_LM:
        value = getattr(args, name)
        if value is True:
            parts.append(name.replace("_", "-"))
        elif value is not None:
            parts.append(f"{name.replace('_', ' ')} {os.path.basename(value) if name == 'lexicon' else value}")
    return ", ".join(parts) or "greedy"


def _decoder(args, labels):
    """The decoder that options ask for; None: greedy."""
    if args.lm is not None:
        from ..runtime.lm import LanguageModelDecoder

        names = ("lexicon_free", "lm_weight", "word_score", "sil_score", "beam", "beam_threshold")
        settings = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
        return LanguageModelDecoder(labels, args.lm, args.lexicon, **settings)
    if args.beam is not None and args.beam > 1:
        from ..runtime.recognizer import BeamDecoder

        return BeamDecoder(labels, args.beam)
    return None


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
