"""`w2v2-light convert`: a stock fairseq checkpoint as one of ours."""

from ..models.convert import convert


def add_arguments(parser) -> None:
    parser.add_argument("checkpoint", help="a wav2vec2 or wav2vec_ctc checkpoint of fairseq")
    parser.add_argument("out", help="where to write the w2v2_light (or light_ctc) checkpoint")


def run(args) -> int:
    print(convert(args.checkpoint, args.out))
    return 0
