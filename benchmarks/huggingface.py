"""How far the logits of transformers are from ours, for models of published shapes with random weights.

    python benchmarks/huggingface.py [base sew large]

Each model is exported (`w2v2-light export --format hf`), loaded by transformers, and converted back. "batch 1" is the
largest difference over four utterances alone, "padded" that over the padded batch of four as transformers' own
processor makes it: with a mask for models with LayerNorms, without for those with a GroupNorm, to which padding is then
audio, as it is to ours in this comparison. "batch and alone" is how far such a batch is from the utterances one by one:
transformers (like stock fairseq) with a GroupNorm, not our own. Needs `pip install transformers safetensors`.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from fairseq_w2v2_light.export.from_huggingface import from_huggingface
from fairseq_w2v2_light.export.huggingface import export_huggingface
from fairseq_w2v2_light.models.w2v2_light import WFE_C
from fairseq_w2v2_light.nn.config import EncoderConfig, parse_conv_layers
from fairseq_w2v2_light.nn.operating_point import OperatingPointSpace
from fairseq_w2v2_light.runtime.ctc import CtcModel
from fairseq_w2v2_light.runtime.load import load_ctc

STOCK = "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512, 2, 2)] * 2"
SYMBOLS = ["<s>", "<pad>", "</s>", "<unk>", "|", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ"]
COUNTS = (32000, 20000, 16000, 9600)
SEW = dict(conv_pos=31, unsqueeze_factor=2, unsqueeze_residual=False, squeeze_tail="drop")
LARGE = dict(extractor_norm="layer", conv_bias=True, norm_first=True, dim=1024, ffn_dim=4096, heads=16)


def network(kind: str, depth: int) -> EncoderConfig:
    shape = {"base": {}, "large": LARGE, "sew": SEW}[kind]
    convolutions = parse_conv_layers(WFE_C if kind == "sew" else STOCK)
    points = OperatingPointSpace((2,) if kind == "sew" else (1,), depth=depth)
    return EncoderConfig(convolutions, layer_map=tuple(range(depth)), operating_points=points, **shape)


@torch.no_grad()
def measure(kind: str, depth: int) -> str:
    sys.modules.setdefault("torchaudio", None)  # transformers imports it where it is, and another torch's cannot be
    import transformers

    torch.manual_seed(0)
    config = network(kind, depth)
    ours = CtcModel(config, SYMBOLS, normalize=config.extractor_norm == "layer").eval()
    for parameter in ours.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.01)
    wave = torch.zeros(len(COUNTS), max(COUNTS))
    for row, count in enumerate(COUNTS):
        wave[row, :count] = torch.randn(count)
    rows = [row[:count] for row, count in zip(wave, COUNTS)]
    with tempfile.TemporaryDirectory() as folder:
        hf = Path(folder) / "hf"
        name = export_huggingface(ours, hf)
        theirs = getattr(transformers, name).from_pretrained(str(hf)).eval()
        processor = transformers.AutoProcessor.from_pretrained(str(hf))

        def process(waves):
            arrays = [wave.numpy() for wave in waves]
            return processor(arrays, sampling_rate=16000, padding=True, return_tensors="pt")

        singles = [theirs(**process([row])).logits[0] for row in rows]
        alone = max(difference(single, ours(row[None])[0][0]) for single, row in zip(singles, rows))
        batch = process(rows)
        found = theirs(**batch).logits
        masked = "attention_mask" in batch
        expected, frames = ours(wave, torch.tensor(COUNTS) if masked else None)
        frames = frames.tolist() if masked else [expected.size(1)] * len(rows)
        padded = max(difference(*(x[row, :count] for x in (found, expected))) for row, count in enumerate(frames))
        by_batch = max(difference(found[row, : len(single)], single) for row, single in enumerate(singles))
        del theirs, found
        from_huggingface(hf, Path(folder) / "back.pt")
        back = difference(load_ctc(Path(folder) / "back.pt")(wave[:1])[0], ours(wave[:1])[0])
    parameters = sum(parameter.numel() for parameter in ours.parameters()) / 1e6
    cells = (alone, padded, by_batch, back, expected.abs().max().item())
    return f"| {kind} ({name}) | {parameters:.1f} | " + " | ".join(f"{cell:.1e}" for cell in cells) + " |"


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return (found - expected).abs().max().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["base", "sew", "large"], help="some of base, sew, large")
    parser.add_argument("--smoke", action="store_true", help="one layer each")
    parser.add_argument("--threads", type=int, help="for torch (default: its own choice)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    print("| model | M parameters | batch 1 | padded | batch and alone | and back | largest logit |")
    print("|---|---|---|---|---|---|---|")
    for kind in args.models:
        depth = 1 if args.smoke else 24 if kind == "large" else 12
        print(measure(kind, depth), flush=True)


if __name__ == "__main__":
    main()
