"""`w2v2-light export`: a fine-tuned checkpoint for use elsewhere."""

from pathlib import Path


def add_arguments(parser) -> None:
    parser.add_argument("checkpoint", help="a CTC checkpoint of fairseq (light_ctc, wav2vec_ctc), or a model folder")
    parser.add_argument("out", help="the folder to write; an earlier export there is replaced")
    parser.add_argument(
        "--format",
        choices=("folder",),
        default="folder",
        help="folder: for `w2v2-light transcribe` and the Python runtime, which need no fairseq (default)",
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        help="of the stored weights: float32 (default), bfloat16, int8 (see `w2v2-light quantize`)",
    )
    parser.add_argument("--dictionary", help="dict.ltr.txt, for a checkpoint that holds no labels")
    parser.add_argument("--sentencepiece", help="the labels' sentencepiece model, to be kept with them")


def run(args) -> int:
    from ..export.folder import export_folder

    model = export_folder(args.checkpoint, args.out, args.dictionary, args.sentencepiece, args.dtype)
    size = sum(file.stat().st_size for file in Path(args.out).iterdir())
    parameters = sum(value.numel() for value in model.state_dict().values())
    print(
        f"{args.checkpoint} -> {args.out}: {parameters:,} parameters, {size / 2**20:.1f} MiB, "
        f"operating points {', '.join(map(str, model.config.operating_points.points()))}"
    )
    return 0
