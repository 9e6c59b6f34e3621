"""`w2v2-light export`: a fine-tuned checkpoint for use elsewhere."""

from pathlib import Path


def add_arguments(parser) -> None:
    parser.add_argument("checkpoint", help="a CTC checkpoint of fairseq (light_ctc, wav2vec_ctc), or a model folder")
    parser.add_argument("out", help="the folder to write; an earlier export there is replaced")
    parser.add_argument(
        "--format",
        choices=("folder", "hf", "onnx"),
        default="folder",
        help="folder: for `w2v2-light transcribe` and the Python runtime, which need no fairseq (default); hf: for "
        "Hugging Face's transformers (Wav2Vec2ForCTC, SEWForCTC); onnx: a graph for onnxruntime, for any batch and "
        "length",
    )
    parser.add_argument(
        "--operating-point",
        default="",
        metavar="POINT",
        help="hf, onnx: the one to run at, e.g. s2q1k1 (onnx: by default the model's own; hf: needed where there are "
        "several)",
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        help="of the stored weights: float32 (default); folder: bfloat16; int8, those of the Linears",
    )
    parser.add_argument("--dictionary", help="dict.ltr.txt, for a checkpoint that holds no labels")
    parser.add_argument("--sentencepiece", help="folder: the labels' sentencepiece model, to be kept with them")


def run(args) -> int:
    _refuse_options_of_other_formats(args)
    if args.format == "hf":
        return _export_huggingface(args)
    if args.format == "onnx":
        return _export_onnx(args)
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


def _export_onnx(args) -> int:
    from ..export.onnx import export_onnx
    from ..runtime.load import load_ctc
    from ..runtime.quantized import INT8, dequantize_

    if args.dtype not in ("float32", "int8"):
        raise ValueError(f"--dtype: found '{args.dtype}', expected float32 or int8 with --format onnx")
    model = load_ctc(args.checkpoint, args.dictionary)
    if model.stored_dtype == INT8:
        dequantize_(model)  # onnxruntime has integers of its own
    written = export_onnx(model, args.out, args.operating_point, int8=args.dtype == "int8")
    print(
        f"{args.checkpoint} -> {args.out}: {args.dtype}, operating point {written.point}, {written.bytes / 2**20:.1f} "
        f"MiB; logits of noise differ from the model's by at most {written.difference:.1e} (relative error "
        f"{written.relative_error:.1e}), the best label agrees in {written.agreement:.1%} of frames"
    )
    return 0


def _refuse_options_of_other_formats(args) -> None:
    for option, formats, given in (
        ("--operating-point", ("hf", "onnx"), bool(args.operating_point)),
        ("--dtype", ("folder", "onnx"), args.dtype != "float32"),
        ("--sentencepiece", ("folder",), args.sentencepiece is not None),
    ):
        if given and args.format not in formats:
            known = " or ".join(formats)
            raise ValueError(f"{option}: is for --format {known}, not for --format {args.format}; leave it out")
