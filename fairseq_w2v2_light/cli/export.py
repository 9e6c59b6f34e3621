"""`w2v2-light export`: a fine-tuned checkpoint for use elsewhere."""

from pathlib import Path


def add_arguments(parser) -> None:
    parser.add_argument("checkpoint", help="a CTC checkpoint of fairseq (light_ctc, wav2vec_ctc), or a model folder")
    parser.add_argument("out", help="the folder to write; an earlier export there is replaced")
    parser.add_argument(
        "--format",
        choices=("folder", "hf"),
        default="folder",
        help="folder: for `w2v2-light transcribe` and the Python runtime, which need no fairseq (default); hf: for "
        "Hugging Face's transformers (Wav2Vec2ForCTC, SEWForCTC)",
    )
    parser.add_argument(
        "--operating-point",
        default="",
        metavar="POINT",
        help="hf: the one to run at, where there are several, e.g. s1q1k1",
    )
    parser.add_argument("--dtype", default="float32", help="folder: of the stored weights: float32 (default), bfloat16")
    parser.add_argument("--dictionary", help="dict.ltr.txt, for a checkpoint that holds no labels")
    parser.add_argument("--sentencepiece", help="folder: the labels' sentencepiece model, to be kept with them")


def run(args) -> int:
    _refuse_options_of_other_formats(args)
    if args.format == "hf":
        return _export_huggingface(args)
    from ..export.folder import export_folder

    model = export_folder(args.checkpoint, args.out, args.dictionary, args.sentencepiece, args.dtype)
    size = sum(file.stat().st_size for file in Path(args.out).iterdir())
    parameters = sum(value.numel() for value in model.state_dict().values())
    print(
        f"{args.checkpoint} -> {args.out}: {parameters:,} parameters, {size / 2**20:.1f} MiB, "
        f"operating points {', '.join(map(str, model.config.operating_points.points()))}"
    )
    return 0


def _export_huggingface(args) -> int:
    from ..export.huggingface import export_huggingface
    from ..runtime.load import load_ctc

    model = load_ctc(args.checkpoint, args.dictionary)
    architecture = export_huggingface(model, args.out, args.operating_point)
    size = sum(file.stat().st_size for file in Path(args.out).iterdir())
    print(f"{args.checkpoint} -> {args.out}: {architecture}, {size / 2**20:.1f} MiB")
    return 0


def _refuse_options_of_other_formats(args) -> None:
    for option, formats, given in (
        ("--operating-point", ("hf",), bool(args.operating_point)),
        ("--dtype", ("folder",), args.dtype != "float32"),
        ("--sentencepiece", ("folder",), args.sentencepiece is not None),
    ):
        if given and args.format not in formats:
            raise ValueError(f"{option}: is for --format {formats[0]}, not for --format {args.format}; leave it out")
