"""How fast the runtime is on this CPU, beside stock fairseq and Hugging Face with the same weights, in fp32.

    python benchmarks/inference.py [--models base large sew_tiny digits ...] [--threads 2] [--seconds 10] [--repeats 9]

Batch size 1, waveform to logits. Everything that a table compares runs in turns in one process, so that a busy machine
slows all of it; times are medians, and the minimum beside them. "ours" is a loaded model as it is, "ours, packed" the
same after `runtime.pack.pack_`. Weights are random: speed does not depend on them, and they are the same for all. The
last column is the largest difference of an output from the first row's. MACs are counted at the same duration, and a
product of two 1024 x 1024 matrices that takes its turn with the others says what this machine could do.

--cpu-time counts the time that this process computed (with --threads 1): for a machine that others use too.
"""

import argparse
import statistics
import sys
import tempfile
import time
from copy import deepcopy
from typing import Callable, Dict, List, NamedTuple, Optional

import torch
from torch import Tensor

from fairseq_w2v2_light.nn.counts import SAMPLE_RATE, count_macs
from fairseq_w2v2_light.nn.operating_point import OperatingPoint
from fairseq_w2v2_light.runtime.ctc import CtcModel
from fairseq_w2v2_light.runtime.pack import pack_
from fairseq_w2v2_light.study.cost import load_subject
from fairseq_w2v2_light.study.experiment import PLAIN

SYMBOLS = ["<s>", "<pad>", "</s>", "<unk>", *"|ETAONIHSRDLUMWCFGYPBVK'XJQZ"]
TINY = "pretraining/light_stochastic_tiny"
# as `w2v2-light prune` left the digits model at 40 % of the MACs: two of 16 heads, one hidden channel less
PRUNED = (
    "model.conv_feature_layers=[(32,10,5),(64,3,2),(96,3,2),(128,3,2),(192,3,2),(192,2,2),(191,2,2)]",
    "model.conv_norm_dims=[32,64,96,128,192,192,192]",
    "model.encoder_embed_dim=191",
    "model.norm_dim=192",
    "model.head_dim=48",
    f"model.conv_pos_group_dims={[12] * 15 + [11]}",
    "model.layer_heads=[1,0,1,0]",
    "model.layer_ffn=[595,590,603,591]",
)
# wav2vec 2.0 LARGE as trained on 60,000 hours
PRE_NORM = ("model.layer_norm_first=true", "model.extractor_mode=layer_norm", "model.conv_bias=true")
# (recipe, overrides) of models that others have, too
MODELS = {
    "base": ("pretraining/w2v2_light_base", ("model.unique_layers=12",)),
    "large": ("pretraining/w2v2_light_large", ("model.unique_layers=24", "model.attention_map_every=1", *PRE_NORM)),
    "sew_tiny": ("pretraining/sew_tiny", ()),
    "digits": (TINY, PLAIN),
}
# (recipe, overrides, operating points; the first one is what the others are compared with)
POINTS = {
    "stochastic_tiny": (TINY, (), ("s1q1k1", "s1q2k2", "s2q1k1", "s2q1k2", "s2q2k2", "s3q2k2")),
    "stochastic_base": (
        "pretraining/w2v2_light_base",
        ("model.unique_layers=12", "model.squeeze_factors=[1,2,3]", "model.query_pools=[1,2]", "model.kv_pools=[1,2]"),
        ("s1q1k1", "s1q2k2", "s2q1k1", "s2q2k2", "s3q2k2"),
    ),
}
SMOKE = dict(models=["digits", "stochastic_tiny", "pruned"], seconds=1.0, repeats=1)


class Subject(NamedTuple):
    """What is timed: its name, its MACs, and a function that computes logits."""

    name: str
    macs: float
    run: Callable[[], Tensor]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = [*MODELS, *POINTS, "pruned"]
    parser.add_argument("--models", nargs="+", choices=known, default=["base", "large", "sew_tiny", "digits", "pruned"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--cpu-time", action="store_true", help="time that this process computed, not the clock's")
    parser.add_argument("--smoke", action="store_true", help="tiny models, for seconds: whether it runs at all")
    args = parser.parse_args()
    if args.smoke:
        parser.set_defaults(**SMOKE)
        args = parser.parse_args()
    if args.cpu_time and args.threads > 1:
        parser.error("--cpu-time counts one thread: add --threads 1")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    wave = torch.randn(1, round(args.seconds * SAMPLE_RATE))
    clock = time.process_time if args.cpu_time else time.perf_counter
    print(f"torch {torch.__version__}, {args.threads} threads, {args.seconds:g} s of audio, fp32, {args.repeats} turns")
    with torch.inference_mode():
        for name in args.models:
            subjects = build(name, wave)
            print(f"\n{name}\n")
            show(subjects, measure(subjects, args.repeats, clock))
    return 0


def build(name: str, wave: Tensor) -> List[Subject]:
    if name in MODELS:
        return implementations(*MODELS[name], wave)
    if name == "pruned":
        plain, pruned = ours(TINY, PLAIN), ours(TINY, (*PLAIN, *PRUNED))
        return [*packed_and_not("unpruned", plain, wave), *packed_and_not("pruned", pruned, wave)]
    recipe, overrides, points = POINTS[name]
    model = ours(recipe, overrides)
    packed = packed_copy(model, wave)
    return [
        Subject(text, macs(model, wave, point), lambda point=point: packed(wave, point=point)[0])
        for text, point in ((text, OperatingPoint.parse(text)) for text in points)
    ]


def implementations(recipe: str, overrides, wave: Tensor) -> List[Subject]:
    """Stock fairseq, Hugging Face where it can be imported, ours and ours packed, with the same weights."""
    model = ours(recipe, overrides)
    count = macs(model, wave)
    subjects = []
    stock = stock_model(recipe, overrides, model)
    if stock is not None:
        subjects.append(Subject("stock fairseq", count, lambda: stock(wave)))
    other = hugging_face_model(model)
    if other is not None:
        subjects.append(Subject("Hugging Face, SDPA", count, lambda: other(wave).logits))
    return [*subjects, *packed_and_not("ours", model, wave)]


def ours(recipe: str, overrides) -> CtcModel:
    torch.manual_seed(0)
    return CtcModel(load_subject(recipe, list(overrides)).network, SYMBOLS).eval().requires_grad_(False)


def packed_and_not(name: str, model: CtcModel, wave: Tensor) -> List[Subject]:
    packed, count = packed_copy(model, wave), macs(model, wave)
    return [
        Subject(name, count, lambda: model(wave)[0]),
        Subject(f"{name}, packed", count, lambda: packed(wave)[0]),
    ]


def packed_copy(model: CtcModel, wave: Tensor) -> CtcModel:
    packed = deepcopy(model)
    if not pack_(packed, model.backbone.config.frames(wave.size(1))):
        print("this torch cannot pack: the rows called packed are not")
    return packed


def macs(model: CtcModel, wave: Tensor, point: Optional[OperatingPoint] = None) -> float:
    count = count_macs(model.backbone.config, wave.size(1), point or model.point, len(model.symbols))
    return float(sum(count.values()))


def stock_model(recipe: str, overrides, model: CtcModel) -> Optional[Callable[[Tensor], Tensor]]:
    """fairseq's own Wav2Vec2Model, which runs wav2vec 2.0 at squeeze factor 1 only."""
    from fairseq.models.wav2vec.wav2vec2 import Wav2Vec2Config, Wav2Vec2Model

    if model.backbone.encoder.upsample is not None:
        return None
    config = Wav2Vec2Config()
    for key, value in load_subject(recipe, list(overrides)).model.items():
        if hasattr(config, key) and value is not None:
            setattr(config, key, value)
    config.quantize_targets = False
    stock = Wav2Vec2Model(config).eval()
    missing, unexpected = stock.load_state_dict(model.backbone.state_dict(), strict=False)
    unused = ("mask_emb", "project_q.", "final_proj.")
    if unexpected or not all(key.startswith(unused) for key in missing):
        raise RuntimeError(f"stock fairseq: weights do not fit: missing {missing}, unexpected {unexpected}")
    return lambda wave: model.head(stock.extract_features(wave, None)["x"])


def hugging_face_model(model: CtcModel):
    """The same model in transformers, None where that, or our export to it, is not there."""
    # transformers looks for torchaudio, and fails where one is installed that does not fit this torch
    sys.modules.setdefault("torchaudio", None)
    try:
        import transformers

        from fairseq_w2v2_light.export.huggingface import export_huggingface
    except ImportError as error:
        print(f"without Hugging Face: {error}")
        return None
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        export_huggingface(model, folder)
        return transformers.AutoModelForCTC.from_pretrained(folder, attn_implementation="sdpa").eval()


def measure(subjects: List[Subject], repeats: int, clock: Callable[[], float]) -> Dict[str, List[float]]:
    """Seconds of each subject's turns, and of the product of matrices, after one turn that does not count."""
    matrices = torch.randn(2, 1024, 1024)
    turns = {"product": lambda: matrices[0] @ matrices[1], **{subject.name: subject.run for subject in subjects}}
    seconds: Dict[str, List[float]] = {name: [] for name in turns}
    for repeat in range(repeats + 1):
        for name, run in turns.items():
            start = clock()
            run()
            if repeat:
                seconds[name].append(clock() - start)
    return seconds


def show(subjects: List[Subject], seconds: Dict[str, List[float]]) -> None:
    """A table with the first subject as the measure of the others."""
    peak = 2 * 1024**3 / min(seconds["product"])
    first, expected = subjects[0], subjects[0].run()
    print(f"matrix product: {peak / 1e9:.0f} GFLOP/s\n")
    print("| what | ms, median | ms, min | GMACs | of the product's speed | speed-up | / MAC ratio | difference |")
    print("|---|---|---|---|---|---|---|---|")
    for subject in subjects:
        median, least = statistics.median(seconds[subject.name]), min(seconds[subject.name])
        speed_up = statistics.median(seconds[first.name]) / median
        output = subject.run()
        same_model = subject.macs == first.macs
        difference = f"{float((output - expected).abs().max()):.1e}" if same_model else ""
        print(
            f"| {subject.name} | {median * 1e3:.1f} | {least * 1e3:.1f} | {subject.macs / 1e9:.2f} "
            f"| {2 * subject.macs / median / peak:.2f} | {speed_up:.2f} | {speed_up * subject.macs / first.macs:.2f} "
            f"| {difference} |"
        )


if __name__ == "__main__":
    sys.exit(main())
