"""torch.export records the CTC model once, and the program runs for any batch and length."""

import pytest
import torch

from fairseq_w2v2_light.nn.config import encoder_config
from fairseq_w2v2_light.nn.operating_point import OperatingPoint
from fairseq_w2v2_light.runtime.ctc import CtcModel

if not hasattr(torch.compiler, "is_exporting"):
    pytest.skip("torch.export of dynamic shapes is tested with torch 2.7 or later", allow_module_level=True)

STOCHASTIC = dict(squeeze_factors=(1, 2), query_pools=(1, 2), kv_pools=(1, 2))
MODELS = {
    "base": (dict(conv_pos=8), "s1q1k1", True),
    "large, shared": (
        dict(extractor_norm="layer", conv_bias=True, norm_first=True, unique_layers=1, attention_map_every=2),
        "s2q2k2",
        False,
    ),
    "SEW": (dict(squeeze_tail="drop", unsqueeze_residual=False), "s2q1k2", False),
    "streaming": (
        dict(extractor_norm="layer", norm_first=True, chunk_frames=(4,), left_context_frames=8, lookahead_frames=4),
        "s2q1k2",
        False,
    ),
}


def ctc_model(keys, point, normalize):
    """A tiny model at a point, with random norms and biases."""
    generator = torch.Generator().manual_seed(0)
    shape = dict(
        conv_feature_layers="[(16, 10, 5), (16, 3, 2), (16, 2, 2)]",
        extractor_norm="group",
        encoder_layers=2,
        dim=32,
        ffn_dim=48,
        heads=4,
        conv_pos=7,
        conv_pos_groups=4,
    )
    pools = {} if point == "s1q1k1" else dict(STOCHASTIC, query_pools=(1, 2) if "q2" in point else (1,))
    symbols = ["<s>", "<pad>", "</s>", "<unk>", "A", "B", "C", "|"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = encoder_config(**{**shape, **pools, **keys})
        model = CtcModel(config, symbols, normalize, point=OperatingPoint.parse(point))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval().requires_grad_(False)


def audio(*samples):
    """(batch, samples) noise, also after the end of each row, and their lengths (batch,)."""
    wave = torch.randn(len(samples), max(samples), generator=torch.Generator().manual_seed(sum(samples))) + 0.3
    return wave, torch.tensor(samples)


def exported(model, *inputs):
    free = torch.export.Dim.DYNAMIC
    shapes = tuple(dict.fromkeys(range(tensor.dim()), free) for tensor in inputs)
    return torch.export.export(model, inputs, dynamic_shapes=shapes)


@pytest.mark.parametrize("kind", MODELS)
def test_the_program_runs_for_other_batches_and_lengths(kind, tmp_path):
    model = ctc_model(*MODELS[kind])
    torch.export.save(exported(model, *audio(1333, 700, 901)), tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    for samples in ((2000,), (1207, 30, 57, 333), (133, 151), (770, 750)):
        wave, lengths = audio(*samples)
        logits, frames = program(wave, lengths)
        for row, count in enumerate(samples):
            alone, _ = model(wave[row : row + 1, :count])
            assert frames[row] == alone.size(1)
            torch.testing.assert_close(logits[row, : frames[row]], alone[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ("large, shared", "SEW"))
def test_a_program_without_lengths(kind):
    model = ctc_model(*MODELS[kind])
    program = exported(model, audio(1333, 1333)[0]).module()
    for samples in (1333, 1351, 1373, 1390, 400):
        wave, _ = audio(samples)
        logits, frames = program(wave)
        assert frames is None
        torch.testing.assert_close(logits, model(wave)[0], atol=1e-5, rtol=1e-5)
