"""`w2v2-light student`: a small model that starts with layers of a large one, to be distilled."""

import argparse

from ..trust import TRUST_HELP, TRUST_OPTION

PASS_THROUGH = True


def add_arguments(parser) -> None:
    parser.add_argument("teacher", help="a checkpoint: stock wav2vec2 or wav2vec_ctc, or any of ours")
    parser.add_argument("out", help="where to write the student")
    parser.add_argument(
        "overrides",
        nargs="*",
        help="model.KEY=VALUE: further keys of the student, e.g. model.squeeze_factors=[1,2]; model.chunk_frames=[24] "
        "makes it stream, with the teacher's positions made causal",
    )
    parser.add_argument(
        "--layers",
        default="",
        metavar="CHOICE",
        help="the teacher's layers to start with: every:2, first:4, last:4, or depths from 0 such as 0,3,6,9; may be "
        "left out where --width changes, with which no layer can be copied",
    )
    parser.add_argument("--width", type=int, metavar="N", help="channels of the Transformer (default: the teacher's)")
    parser.add_argument(
        "--ffn",
        type=int,
        metavar="N",
        help="inner channels of the FFN (default: the teacher's; of a pruned one, what each layer has left)",
    )
    parser.add_argument(
        "--heads",
        type=int,
        metavar="N",
        help="attention heads (default: the teacher's; of a pruned one, what each layer has left)",
    )
    parser.add_argument(
        "--layers-n",
        type=int,
        metavar="N",
        help="number of the student's layers; those beyond --layers start anew (default: as many as --layers)",
    )
    parser.add_argument(
        "--unique-layers",
        type=int,
        metavar="N",
        help="make a shared student: N stored layers, the first of --layers, serve all its depths (default: one each)",
    )
    parser.add_argument(
        "--dictionary",
        default="",
        metavar="FILE",
        help="dict.ltr.txt of a CTC teacher whose checkpoint holds none, as the public ones from before 2021",
    )
    parser.add_argument(
        "--input-level",
        type=float,
        metavar="X",
        help="make a student that hears audio as it is (task.normalize=false) of a teacher that was trained with "
        "task.normalize=true, as streaming needs: X is the standard deviation that the audio will have, with samples "
        "from -1 to 1; measure yours, LibriSpeech's utterances have 0.05 (the median of 26; most are within 0.035 and "
        "0.095)",
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of what is initialised anew (default: 1)")


def run(args) -> int:
    parser = argparse.ArgumentParser(
        prog="w2v2-light student",
        description="Make a student from a teacher: a smaller checkpoint of the same kind, to distil into.",
        allow_abbrev=False,
    )
    add_arguments(parser)
    # taken away before; here for --help
    parser.add_argument(TRUST_OPTION, action="store_true", help=TRUST_HELP)
    # overrides may follow the options
    options = parser.parse_intermixed_args(args.rest)

    from ..compress.student import format_report, make_student

    report = make_student(options.teacher, options.out, student_spec(options), options.dictionary)
    print(f"{options.teacher} -> {options.out} ({report.model})\n\n{format_report(report)}")
    return 0


def student_spec(options: argparse.Namespace):
    """The StudentSpec that parsed options describe."""
    from ..compress.student import StudentSpec
    from ..models.recipe import parse_overrides

    return StudentSpec(
        layers=options.layers,
        width=options.width,
        ffn=options.ffn,
        heads=options.heads,
        layers_n=options.layers_n,
        unique_layers=options.unique_layers,
        overrides=parse_overrides(options.overrides),
        seed=options.seed,
        input_level=options.input_level,
    )
