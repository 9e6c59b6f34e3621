"""`w2v2-light convert`: a stock fairseq checkpoint, or a Hugging Face folder, as a checkpoint of ours."""

from pathlib import Path


def add_arguments(parser) -> None:
    parser.add_argument(
        "checkpoint",
        help="a wav2vec2 or wav2vec_ctc checkpoint of fairseq, or a Hugging Face folder: Wav2Vec2ForCTC, "
        "Wav2Vec2ForPreTraining, Wav2Vec2Model, HubertForCTC, HubertModel, SEWForCTC, SEWModel",
    )
    parser.add_argument(
        "out", help="where to write the w2v2_light, stochastic_sew or light_ctc checkpoint, such as model.pt"
    )


def run(args) -> int:
    from ..export.from_huggingface import from_huggingface
    from ..models.convert import convert

    print((from_huggingface if Path(args.checkpoint).is_dir() else convert)(args.checkpoint, args.out))
    return 0
