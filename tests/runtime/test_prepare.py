"""Prepared models: the same network in another precision, at every operating point, in batches and in streams."""

import copy

import pytest
import torch
from tiny_checkpoints import MODELS, STREAMING, finetuned, random_audio

from fairseq_w2v2_light.cli.main import main
from fairseq_w2v2_light.export.folder import export_folder
from fairseq_w2v2_light.nn.frontend import receptive_field
from fairseq_w2v2_light.nn.operating_point import OperatingPoint
from fairseq_w2v2_light.nn.streaming import Stream
from fairseq_w2v2_light.runtime import half, packed_frontend, prepare
from fairseq_w2v2_light.runtime.folder import write_folder
from fairseq_w2v2_light.runtime.load import load_ctc
from fairseq_w2v2_light.runtime.packed_frontend import PackedFrontend
from fairseq_w2v2_light.runtime.prepare import prepare_
from fairseq_w2v2_light.runtime.products import PackedConv1d
from fairseq_w2v2_light.runtime.quantized import QuantizedLinear, quantize_
from fairseq_w2v2_light.runtime.streaming import StreamingRecognizer

# of the logits, relative to their spread: 24 and 8 bits; of bfloat16, whose instructions not every CPU has, emulated
TOLERANCES = {"float32": 1e-4, "int8": 0.06, "bfloat16": 0.06}
PRUNED = dict(layer_heads=[0, 2, 1], layer_ffn=[40, 0, 7], head_dim=8)
KINDS = {**MODELS, "pruned": dict(layout="large", **PRUNED), "pruned post-LN": dict(layout="base", **PRUNED)}


@pytest.fixture(autouse=True)
def _any_cpu(monkeypatch):
    """bfloat16 is computed on any CPU, if slowly."""
    for module in (half, prepare):
        monkeypatch.setattr(module, "multiplies_bfloat16", lambda: True)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Loaded checkpoints by kind, each made once."""
    made = {}

    def load(kind):
        if kind not in made:
            made[kind] = load_ctc(finetuned(tmp_path_factory.mktemp("model"), **KINDS[kind]))
        return copy.deepcopy(made[kind])

    return load


@pytest.mark.parametrize("dtype", ("float32", "int8", "bfloat16"))
@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_the_same(models, kind, dtype):
    exact, model = models(kind), models(kind)
    assert prepare_(model, dtype, rows=40) == dtype
    counts = torch.tensor([900, 700, 432, 500])
    wave, _ = random_audio(*counts.tolist())
    for point in exact.config.operating_points.points():
        expected, lengths = exact(wave, counts, point)
        found, frames = model(wave, counts, point)
        assert torch.equal(frames, lengths) and found.dtype == torch.float32
        tolerance = TOLERANCES[dtype] * float(expected.std())
        for row, valid in enumerate(lengths.tolist()):
            error = (found[row, :valid] - expected[row, :valid]).square().mean().sqrt()
            assert error <= tolerance
            alone, _ = model(wave[row : row + 1, : counts[row]], point=point)
            difference = (alone[0] - found[row, :valid]).square().mean().sqrt()
            assert difference <= tolerance / 2  # a last bit of fp32 may turn a step of 8


@pytest.mark.parametrize("dtype, kind", [("int8", QuantizedLinear), ("bfloat16", half.HalfLinear)])
def test_linears_are_of_the_dtype_also_from_an_int8_folder(models, tmp_path, dtype, kind):
    folder = tmp_path / "int8"
    write_folder(quantize_(models("large")), folder, dtype="int8")
    for model in (models("large"), load_ctc(folder)):
        prepare_(model, dtype)
        assert {type(model.backbone.encoder.layers[0].fc1), type(model.backbone.post_extract_proj)} == {kind}


@pytest.mark.parametrize("dtype", ("float32", "int8", "bfloat16"))
def test_a_stream_gives_the_frames_of_the_whole_utterance(models, dtype):
    model = models("streaming")
    prepare_(model, dtype, rows=6)
    point = OperatingPoint(chunk=4)
    stream = Stream(model.backbone, point)
    wave = random_audio(1000)[0]
    state, outputs, rest = stream.start(), [], wave
    while rest.size(1) >= stream.samples_needed(state):
        needed = stream.samples_needed(state)
        frames, state = stream.step(rest[:, :needed], state)
        outputs.append(frames)
        rest = rest[:, needed:]
    outputs.append(stream.finish(rest, state))
    with torch.no_grad():
        expected, _ = model.backbone.encode(wave, point=point)
    found = torch.cat(outputs, dim=1)
    assert found.shape == expected.x.shape
    assert (found - expected.x).square().mean().sqrt() <= TOLERANCES[dtype] * expected.x.std()


@pytest.mark.parametrize("intel", (True, False))
@pytest.mark.parametrize("kind", ("base", "large"))
@pytest.mark.parametrize("dtype", ("float32", "int8", "bfloat16"))
def test_products_of_onednn_see_few_lengths(models, dtype, kind, intel, monkeypatch):
    """It prepares itself for every one."""
    monkeypatch.setattr(packed_frontend, "multiplies_by_mkl", lambda: intel)
    exact, model = models(kind), models(kind)
    prepare_(model, dtype, rows=20)
    if not isinstance(model.backbone.feature_extractor, PackedFrontend):
        pytest.skip("this torch has no packed product")
    second = model.backbone.feature_extractor.conv_layers[1]
    by_onednn = isinstance(second, (half.HalfConvLayer, packed_frontend.FusedConvLayer))
    assert isinstance(second, packed_frontend.FusedConvLayer) != intel
    last, lengths = model.backbone.feature_extractor.conv_layers[-1], []
    last.register_forward_hook(lambda layer, inputs, output: lengths.append(len(output)))
    field, hop = receptive_field(model.config.conv_layers)
    asked = (*range(1, 40), 127, 128, 129, 140)
    for frames in asked:
        wave, _ = random_audio((frames - 1) * hop + field)
        logits, expected = model(wave)[0], exact(wave)[0]
        assert (logits - expected).norm() <= TOLERANCES[dtype] * expected.norm(), frames
    few = [*range(1, 9), *range(12, 33, 4), 40, 128, 128, 144, 144]
    assert sorted(set(lengths)) == (sorted(set(few)) if by_onednn else sorted(asked))


def test_the_dtype_of_a_folder_is_that_it_runs_in(tmp_path, monkeypatch):
    path = finetuned(tmp_path, layout="large", **STREAMING)
    for dtype in ("float32", "bfloat16", "int8"):
        export_folder(path, tmp_path / dtype, dtype=dtype)
        assert prepare_(load_ctc(tmp_path / dtype)) == dtype
        assert prepare_(load_ctc(tmp_path / dtype), "float32") == "float32"
        recognizer = StreamingRecognizer.from_checkpoint(tmp_path / dtype)
        recognizer.accept(random_audio(900)[0][0])
        assert recognizer.finish().seconds == pytest.approx(900 / 16000)
    monkeypatch.setattr(prepare, "multiplies_bfloat16", lambda: False)
    assert prepare_(load_ctc(tmp_path / "bfloat16")) == "float32"
    with pytest.raises(ValueError, match="bfloat16 was asked for, but this CPU has no instructions for it"):
        prepare_(load_ctc(tmp_path / "bfloat16"), "bfloat16")


def test_an_int8_folder_in_fp32_has_the_weights_of_its_integers(tmp_path):
    path = finetuned(tmp_path, layout="large")
    assert main(["quantize", path, str(tmp_path / "int8")]) == 0
    model, exact = load_ctc(tmp_path / "int8"), load_ctc(path)
    prepare_(model, "float32")
    wave = random_audio(700)[0]
    expected = exact(wave)[0]
    assert 0 < (model(wave)[0] - expected).square().mean().sqrt() <= 0.04 * expected.std()


def test_what_is_refused(models, tmp_path):
    with pytest.raises(ValueError, match="dtype: found 'int4', expected one of auto, float32, bfloat16, int8"):
        prepare_(models("base"), "int4")
    model = models("base")
    prepare_(model)
    with pytest.raises(ValueError, match="the model is prepared already; load it again"):
        prepare_(model)
    with pytest.raises(ValueError, match="the model is prepared for inference and cannot be saved"):
        write_folder(model, tmp_path / "out")
    gated = load_ctc(finetuned(tmp_path, layout="large", prune_units=["heads"]))
    for dtype in ("int8", "bfloat16"):
        with pytest.raises(ValueError, match="the model has gates, .* remove what they closed first: w2v2-light prune"):
            prepare_(gated, dtype)
    assert prepare_(gated) == "float32" and gated(random_audio(700)[0])[0].isfinite().all()


def test_a_convolution_that_comes_out_wrong_stays_in_fp32(monkeypatch):
    torch.manual_seed(0)
    conv = PackedConv1d(torch.randn(8, 4, 3), torch.randn(8), padding=1, groups=2)
    assert isinstance(half.half_conv(conv, 20), half.HalfConv1d)
    monkeypatch.setattr(half.HalfConv1d, "forward", lambda self, x, stride=1: torch.zeros(1, x.size(1), 8))
    assert half.half_conv(conv, 20) is conv
    monkeypatch.setattr(half.HalfConv1d, "forward", lambda self, x, stride=1: torch.full((1, x.size(1), 8), torch.nan))
    assert half.half_conv(conv, 20) is conv


@pytest.mark.parametrize(
    "flags, expected", [("fpu avx2 amx_bf16", True), ("fpu avx512_bf16", True), ("fpu avx2", False)]
)
def test_linux_says_what_a_cpu_has(monkeypatch, tmp_path, flags, expected):
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nmodel name : bf16 in a name\nflags\t\t: {flags}\n")
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    path = half.Path
    monkeypatch.setattr(half, "Path", lambda name: path(tmp_path / "cpuinfo"))
    assert half._has("_is_avx512_bf16_supported", {"avx512_bf16", "amx_bf16"}) is expected


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "int8"))
def test_the_dropout_of_a_checkpoint_is_off(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(prepare, "multiplies_bfloat16", lambda: True)
    keys = dict(layout="large", attention_dropout=0.5, dropout=0.5, activation_dropout=0.5)
    model = load_ctc(finetuned(tmp_path, ctc_keys=dict(attention_dropout=0.5), **keys))
    prepare_(model, dtype, rows=50)
    wave, _ = random_audio(900)
    assert not any(module.training for module in model.modules())
    assert torch.equal(model(wave)[0], model(wave)[0])
