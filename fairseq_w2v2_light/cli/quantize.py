"""`w2v2-light quantize`: a fine-tuned model with int8 Linears, as a model folder."""

from pathlib import Path


def add_arguments(parser) -> None:
    parser.description = (
        "Write a fine-tuned model as a model folder with int8 Linears: about a quarter of the bytes, and faster on a "
        "CPU. Convolutions, norms and the CTC head stay in float32."
    )
    parser.add_argument("model", help="a CTC checkpoint of fairseq (light_ctc, wav2vec_ctc), or a float32 model folder")
    parser.add_argument("out", help="the folder to write; an earlier one there is replaced")
    parser.add_argument("--dictionary", help="dict.ltr.txt, for a checkpoint that holds no labels")
    parser.add_argument("--sentencepiece", help="the labels' sentencepiece model, to be kept with them")


def run(args) -> int:
    from ..export.folder import export_folder
    from ..runtime.folder import WEIGHTS
    from ..runtime.quantized import QuantizedLinear

    if Path(args.out).resolve() == Path(args.model).resolve():
        raise ValueError(f"{args.out}: OUT is MODEL, whose float32 weights would be lost; give another name")
    model = export_folder(args.model, args.out, args.dictionary, args.sentencepiece, "int8")
    linears = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    stored = (Path(args.out) / WEIGHTS).stat().st_size
    values = model.state_dict()
    scales = sum(linear.weight_scale.numel() for linear in linears)
    parameters = sum(value.numel() for value in values.values()) - scales
    integers = sum(linear.weight.numel() for linear in linears)
    before = 4 * parameters
    print(
        f"{args.model} -> {args.out}: {len(linears)} Linears, {integers:,} of {parameters:,} parameters in int8; "
        f"{before / 2**20:.1f} -> {stored / 2**20:.1f} MiB of weights ({before / stored:.2f} x)"
    )
    return 0
