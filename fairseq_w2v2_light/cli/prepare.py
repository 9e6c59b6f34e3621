"""`w2v2-light prepare`: manifests, labels and dictionaries from what people have."""

import argparse
from pathlib import Path
from typing import Dict, List, Optional

from fairseq_w2v2_light.data import corpus, sources, synth, text
from fairseq_w2v2_light.data.check import check_folder
from fairseq_w2v2_light.data.manifest import RECEPTIVE_FIELD, localise_manifest

EXIT_PROBLEMS = 2
SPLITS = ("train", "valid", "test")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the sources: librispeech, table, audio, synth, manifest; and check."""
    kinds = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")
    _add_librispeech(kinds)
    _add_table(kinds)
    _add_audio(kinds)
    _add_synth(kinds)
    _add_manifest(kinds)
    _add_check(kinds)


def run(args: argparse.Namespace) -> int:
    """Runs one source; returns the exit code."""
    return args.prepare(args)


def _source(kinds, name: str, help_text: str, prepare) -> argparse.ArgumentParser:
    parser = kinds.add_parser(name, help=help_text, description=help_text[0].upper() + help_text[1:] + ".")
    parser.set_defaults(prepare=prepare)
    return parser


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make: manifests, labels, dictionary")
    parser.add_argument("--force", action="store_true", help="replace the manifests that OUT already holds")


def _add_audio_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--convert",
        action="store_true",
        help="write 16 kHz mono FLAC copies of other audio under OUT/audio instead of skipping it",
    )
    parser.add_argument("--deep", action="store_true", help="decode every file, to find damaged ones (slow)")
    _add_min_frames(parser)


def _add_min_frames(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--min-frames",
        type=int,
        default=RECEPTIVE_FIELD,
        metavar="N",
        help="shortest audio, in samples (default: %(default)s)",
    )


def _add_label_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--labels",
        choices=list(corpus.LABEL_SUFFIXES),
        default="letter",
        help="letter: task.labels=ltr; sentencepiece: task.labels=spm, its model trained on the training text",
    )
    parser.add_argument(
        "--vocab-size", type=int, default=1000, metavar="N", help="sentencepiece pieces (default: 1000)"
    )
    parser.add_argument("--sentencepiece-type", choices=["unigram", "bpe"], default="unigram")
    parser.add_argument("--normalise", choices=text.NORMALISATIONS, default="upper", help=text.NORMALISATION_HELP)


def _add_division(parser: argparse.ArgumentParser, splits: Dict[str, float]) -> None:
    for split, fraction in splits.items():
        parser.add_argument(
            f"--{split}-percent",
            type=float,
            default=fraction,
            metavar="F",
            help=f"share of the {split} split, a fraction between 0 and 1 as in fairseq (default: {fraction})",
        )
    parser.add_argument("--seed", type=int, default=42, metavar="N", help="of the random division (default: 42)")


def _options(args: argparse.Namespace) -> corpus.Options:
    given = vars(args)
    names = ("labels", "vocab_size", "sentencepiece_type", "normalise", "min_frames", "convert", "deep", "force")
    return corpus.Options(**{name: given[name] for name in names if name in given})


def _report(summary: corpus.Summary) -> int:
    print("\n".join(summary.lines()))
    return 0


def _add_librispeech(kinds) -> None:
    parser = _source(
        kinds, "librispeech", "a tree in LibriSpeech's layout (*.trans.txt beside the audio)", _librispeech
    )
    parser.add_argument("tree", type=Path, metavar="TREE", help="folder that holds train-clean-100, dev-clean, ...")
    _add_output(parser)
    defaults = {
        "train": "every train-*",
        "valid": f"the first of {', '.join(sources.VALID_SUBSETS)}",
        "test": f"the first of {', '.join(sources.TEST_SUBSETS)}",
    }
    for split in SPLITS:
        parser.add_argument(
            f"--{split}",
            nargs="*",
            metavar="SUBSET",
            help=f"subsets of the {split} split (default: {defaults[split]}; none: no such split)",
        )
    parser.add_argument(
        "--split",
        action="append",
        default=[],
        metavar="NAME=SUBSET,...",
        help="a further split, as in dev_other=dev-other",
    )
    _add_audio_options(parser)
    _add_label_options(parser)


def _librispeech(args: argparse.Namespace) -> int:
    subsets: Dict[str, List[str]] = {}
    for split in SPLITS:
        if getattr(args, split) is not None:
            subsets[split] = getattr(args, split)
    for item in args.split:
        name, _, names = item.partition("=")
        if not sources.SPLIT_NAME.fullmatch(name) or not names:
            raise ValueError(f"--split {item}: expected NAME=SUBSET,..., for example dev_other=dev-other")
        subsets[name] = names.split(",")
    corpus.refuse_existing(args.out, args.force)
    splits = sources.read_librispeech(args.tree, subsets)
    record = {"source": "librispeech", "tree": str(args.tree)}
    return _report(corpus.prepare(splits, args.out, _options(args), args.tree, record=record))


def _add_table(kinds) -> None:
    parser = _source(
        kinds, "table", "a CSV, TSV or JSON-lines table with columns path, text[, speaker][, split]", _table
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="relative paths in it start from its folder")
    _add_output(parser)
    parser.add_argument(
        "--columns",
        default="",
        metavar="path=A,text=B",
        help="names of the columns path, text, speaker, split if others",
    )
    _add_division(parser, {"valid": 0.05, "test": 0.05})
    parser.add_argument(
        "--speaker-disjoint", action="store_true", help="no speaker in two splits (for a table without split column)"
    )
    _add_audio_options(parser)
    _add_label_options(parser)


def _table(args: argparse.Namespace) -> int:
    corpus.refuse_existing(args.out, args.force)
    utterances = sources.read_table(args.file, sources.parse_columns(args.columns))
    splits: Dict[str, List[sources.Utterance]] = {}
    for utterance in utterances:
        splits.setdefault(utterance.split, []).append(utterance)
    division: Optional[corpus.Division] = None
    if corpus.UNDIVIDED in splits:
        fractions = {"valid": args.valid_percent, "test": args.test_percent}
        division = corpus.Division(fractions, args.seed, args.speaker_disjoint)
    elif args.speaker_disjoint:
        _refuse_shared_speakers(splits)
    record = {"source": "table", "file": str(args.file), "seed": args.seed}
    summary = corpus.prepare(
        splits, args.out, _options(args), args.file.parent, division, record=record, protected=args.file
    )
    return _report(summary)


def _refuse_shared_speakers(splits: Dict[str, List[sources.Utterance]]) -> None:
    owner: Dict[str, str] = {}
    for split, utterances in splits.items():
        for utterance in utterances:
            if owner.setdefault(utterance.speaker, split) != split:
                raise ValueError(
                    f"{utterance.where}: speaker {utterance.speaker!r} is in split {owner[utterance.speaker]!r} and in "
                    f"{split!r}; mend the split column or leave out --speaker-disjoint"
                )


def _add_audio(kinds) -> None:
    parser = _source(kinds, "audio", "a folder of audio without text, for pre-training", _audio)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="searched with all folders below it")
    _add_output(parser)
    parser.add_argument("--extensions", nargs="+", default=[], metavar="EXT", help="default: all that libsndfile reads")
    _add_division(parser, {"valid": 0.01})
    _add_audio_options(parser)


def _audio(args: argparse.Namespace) -> int:
    corpus.refuse_existing(args.out, args.force)
    utterances = sources.read_audio_folder(args.folder, args.extensions)
    out = corpus.absolute(args.out)
    # A second run must not take the first one's converted copies for recordings.
    utterances = [item for item in utterances if out / "audio" not in corpus.absolute(item.path).parents] or utterances
    division = corpus.Division({"valid": args.valid_percent}, args.seed)
    record = {"source": "audio", "folder": str(args.folder), "seed": args.seed}
    splits = {corpus.UNDIVIDED: utterances}
    return _report(corpus.prepare(splits, args.out, _options(args), args.folder, division, record=record))


def _add_synth(kinds) -> None:
    parser = _source(kinds, "synth", "a small spoken corpus made with espeak-ng (pip install espeakng-loader)", _synth)
    _add_output(parser)
    defaults = synth.SynthOptions()
    sizes = " ".join(str(defaults.utterances[split]) for split in SPLITS)
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--utterances",
        nargs=3,
        type=int,
        metavar=("TRAIN", "VALID", "TEST"),
        help=f"utterances of each split (default: {sizes})",
    )
    size.add_argument("--hours", nargs=3, type=float, metavar=("TRAIN", "VALID", "TEST"), help="or hours of each split")
    for split in SPLITS:
        parser.add_argument(
            f"--{split}-voices",
            nargs="+",
            default=defaults.voices[split],
            metavar="VOICE",
            help=f"accent+variant, as in en-us+f1 (default: {' '.join(defaults.voices[split])})",
        )
    parser.add_argument("--vocabulary", type=Path, metavar="FILE", help="words to speak, one a line (default: digits)")
    parser.add_argument(
        "--words",
        nargs=2,
        type=int,
        default=defaults.words_per_utterance,
        metavar=("FEWEST", "MOST"),
        help="words of an utterance (default: 1 6)",
    )
    parser.add_argument(
        "--noise",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        help="add white noise at LOW to HIGH dB below the speech",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="same seed, same corpus (default: 0)")
    _add_label_options(parser)


def _synth(args: argparse.Namespace) -> int:
    sizes = {}
    if args.utterances:
        sizes["utterances"] = dict(zip(SPLITS, args.utterances))
    if args.hours:
        sizes["hours"] = dict(zip(SPLITS, args.hours))
    if args.vocabulary:
        sizes["words"] = synth.read_vocabulary(args.vocabulary)
    options = synth.SynthOptions(
        voices={split: getattr(args, f"{split}_voices") for split in SPLITS},
        words_per_utterance=tuple(args.words),
        noise_db=tuple(args.noise) if args.noise else None,
        seed=args.seed,
        **sizes,
    )
    return _report(corpus.speak(options, args.out, _options(args)))


def _add_manifest(kinds) -> None:
    parser = _source(
        kinds, "manifest", "a manifest folder whose root line is relative, given absolute roots", _manifest
    )
    parser.add_argument("data", type=Path, metavar="DATA", help="folder of manifests; its audio stays where it is")
    _add_output(parser)


def _manifest(args: argparse.Namespace) -> int:
    splits = localise_manifest(args.data, args.out, args.force)
    print(f"wrote {args.out}: {', '.join(splits)}")
    return 0


def _add_check(kinds) -> None:
    parser = _source(kinds, "check", "verify a manifest folder; exit code 2 when something is wrong", _check)
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("--deep", action="store_true", help="decode every file: NaN, infinite and missing samples")
    _add_min_frames(parser)


def _check(args: argparse.Namespace) -> int:
    reports = check_folder(args.data, args.min_frames, args.deep)
    for report in reports:
        print(report.line())
    for report in reports:
        for note in report.notes:
            print(f"note: {note}")
        for problem in report.problems:
            print(f"problem: {problem}")
    problems = sum(len(report.problems) for report in reports)
    print(f"{args.data}: {problems} problems" if problems else f"{args.data}: no problem found")
    return EXIT_PROBLEMS if problems else 0
