"""int8 Linears: small errors, the same for any batch; folders that give them back; what cannot be quantised."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from tiny_checkpoints import MODELS, STREAMING, finetuned, pretrained, random_audio
from torch import nn

from fairseq_w2v2_light.cli.main import main
from fairseq_w2v2_light.export.folder import export_folder
from fairseq_w2v2_light.nn.config import encoder_config
from fairseq_w2v2_light.nn.squeeze import Unsqueeze
from fairseq_w2v2_light.paths import user_dir
from fairseq_w2v2_light.runtime import quantized
from fairseq_w2v2_light.runtime.ctc import CtcModel
from fairseq_w2v2_light.runtime.folder import read_folder, write_folder
from fairseq_w2v2_light.runtime.load import load_ctc
from fairseq_w2v2_light.runtime.quantized import (
    QuantizedLinear,
    best_method,
    dequantize_,
    quantize_,
    quantize_rows,
    quantize_weight,
)
from fairseq_w2v2_light.runtime.unsqueeze import WholeUnsqueeze


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear_of(weight, bias=None):
    linear = nn.Linear(weight.size(1), weight.size(0), bias is not None)
    linear.weight.data, linear.bias = weight, bias if bias is None else nn.Parameter(bias)
    return linear.requires_grad_(False)


# ---- weights


def test_a_weight_is_within_half_a_step():
    weight = seeded(7, 50) * torch.logspace(-30, 30, 7)[:, None]
    values, scale = quantize_weight(weight)
    assert values.dtype == torch.int8 and scale.dtype == torch.float32 and scale.shape == (7,)
    assert values.abs().amax(1).tolist() == [127] * 7
    error = (values.double() * scale.double()[:, None] - weight.double()).abs()
    assert bool((error <= 0.5001 * scale.double()[:, None]).all())


def test_rows_of_zeros_and_of_the_smallest_numbers():
    weight = torch.zeros(3, 4)
    weight[1] = torch.tensor([1e-42, -1e-42, 0.0, 5e-43])
    values, scale = quantize_weight(weight)
    assert values[0].tolist() == [0] * 4 and scale[0] == 0 and values[1].tolist() == [127, -127, 0, 64]
    found = QuantizedLinear.of(linear_of(weight, torch.tensor([1.0, 2.0, 3.0])))(seeded(2, 4))
    assert torch.equal(found, torch.tensor([[1.0, 2.0, 3.0]] * 2))


@pytest.mark.parametrize("value", (torch.nan, torch.inf, -torch.inf))
def test_weights_that_are_not_finite(tmp_path, value):
    with pytest.raises(ValueError, match="NaN or infinite weights cannot be quantised"):
        quantize_weight(torch.tensor([[1.0, value]]))
    model = load_ctc(finetuned(tmp_path))
    model.backbone.encoder.layers[1].fc1.weight[2, 3] = value
    with pytest.raises(ValueError, match="backbone.encoder.layers.1.fc1.weight' has NaN or infinite values"):
        quantize_(model)
    assert model.stored_dtype == "float32" and isinstance(model.backbone.encoder.layers[0].fc1, nn.Linear)


# ---- activations


@pytest.mark.parametrize("levels", (255, 127))
@pytest.mark.parametrize("one_pass", (True, False))
def test_a_row_is_within_half_a_step_whatever_its_neighbours_are(monkeypatch, levels, one_pass):
    monkeypatch.setattr(quantized, "_has_row_quantizer", lambda: one_pass)
    x = seeded(6, 40) * torch.tensor([1e-3, 1.0, 1e3, 1.0, 0.0, 1.0])[:, None] + 2
    values, scale, offset = quantize_rows(x, levels)
    assert values.dtype == torch.uint8 and values.max() <= levels and scale.shape == offset.shape == (6, 1)
    assert bool(((values * scale + offset - x).abs() <= 0.5001 * scale + 1e-6 * x.abs()).all())
    assert torch.equal(quantize_rows(x[3:4], levels)[0], values[3:4])


@pytest.mark.parametrize("channels", (61, 62, 63, 64))
def test_a_single_row_of_any_width(channels):
    """A part of a single row is in one piece, where it may begin at any byte."""
    x = seeded(2, channels)
    for ours, expected in zip(quantize_rows(x[1:]), quantize_rows(x)):
        assert torch.equal(ours, expected[1:])


def test_both_ways_to_quantise_rows_agree(monkeypatch):
    x = seeded(5, 64)
    fast = quantize_rows(x)
    monkeypatch.setattr(quantized, "_has_row_quantizer", lambda: False)
    for ours, theirs in zip(quantize_rows(x), fast):
        torch.testing.assert_close(
            ours.float(), theirs.float(), rtol=1e-5, atol=1.0 if ours.dtype == torch.uint8 else 1e-6
        )


# ---- products


@pytest.mark.parametrize("shape", ((1024, 1024), (1024, 4096), (4096, 1024), (768, 3072), (33, 5), (1, 1)))
@pytest.mark.parametrize("bias", (True, False))
def test_a_linear_is_close_to_fp32(shape, bias):
    linear = linear_of(seeded(shape[1], shape[0]) * 0.02, seeded(shape[1]) if bias else None)
    quant = QuantizedLinear.of(linear)
    x = seeded(2, 9, shape[0], seed=1)
    found, expected = quant(x), linear(x)
    assert found.shape == expected.shape and found.dtype == torch.float32
    # each product of N(0, 1) times N(0, 0.02): both factors rounded to 8 bits
    assert (found - expected).square().mean().sqrt() <= 0.03 * 0.02 * shape[0] ** 0.5
    torch.testing.assert_close(found, quant.dequantized()(x), rtol=0, atol=0.08 * 0.02 * shape[0] ** 0.5 + 1e-6)


def test_the_largest_sums_do_not_overflow():
    x = torch.full((3, 512), 7.0)
    x[:, 0] = 0
    weight = torch.stack([torch.ones(512), -torch.ones(512)])
    found = QuantizedLinear.of(linear_of(weight))(x)
    torch.testing.assert_close(found, torch.tensor([[3577.0, -3577.0]] * 3), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("rows", (1, 2, 17))
def test_a_frame_does_not_depend_on_its_neighbours(rows):
    quant = QuantizedLinear.of(linear_of(seeded(24, 48), seeded(24)))
    x = seeded(rows, 48)
    x[-1] *= 1e4
    torch.testing.assert_close(quant(x)[:1], quant(x[:1]), rtol=1e-6, atol=1e-5)


def test_no_frames_and_other_dtypes():
    quant = QuantizedLinear.of(linear_of(seeded(6, 4), seeded(6)))
    assert quant(torch.zeros(2, 0, 4)).shape == (2, 0, 6)
    assert quant(torch.ones(1, 4, dtype=torch.bfloat16)).dtype == torch.float32


def _broken(linear, rows, **options):
    return lambda x: torch.zeros(len(x), linear.out_features)


def _missing(linear, rows, **options):
    raise AttributeError("'_OpNamespace' 'onednn' object has no attribute 'qlinear_pointwise'")


@pytest.mark.parametrize("product", (_broken, _missing))
def test_without_a_product_that_works_weights_become_fp32(monkeypatch, product):
    monkeypatch.setattr(quantized, "_IntegerProduct", product)
    best_method.cache_clear()
    try:
        assert best_method().name == "fp32 products"
        quant = QuantizedLinear.of(linear_of(seeded(6, 40), seeded(6)))
        x = seeded(3, 40)
        torch.testing.assert_close(quant(x), quant.dequantized()(x))
    finally:
        best_method.cache_clear()


def test_products_that_overflow_get_fewer_levels(monkeypatch):
    """As on CPUs without VNNI, where two products are added up in 16 bits."""

    class Overflows(quantized._IntegerProduct):
        def __call__(self, x):
            return super().__call__(x) if self._levels == 127 else super().__call__(x).clamp(-64, 64)

    if best_method().name == "fp32 products":
        pytest.skip("this torch has no product of integers")
    monkeypatch.setattr(quantized, "_IntegerProduct", Overflows)
    best_method.cache_clear()
    try:
        assert best_method().name == "int8 products, 128 levels"
    finally:
        best_method.cache_clear()


# ---- models

PRUNED = dict(layer_heads=[0, 2, 1], layer_ffn=[40, 0, 7], head_dim=8)
KINDS = {**MODELS, "pruned": dict(layout="large", **PRUNED), "pruned post-LN": dict(layout="base", **PRUNED)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_gives_the_logits_that_the_model_had(tmp_path, kind):
    path = finetuned(tmp_path, **KINDS[kind])
    exact, expected = load_ctc(path), quantize_(load_ctc(path))
    assert main(["quantize", str(path), str(tmp_path / "int8")]) == 0
    found = load_ctc(tmp_path / "int8")
    assert found.stored_dtype == "int8" and not found.training
    assert json.loads((tmp_path / "int8" / "config.json").read_text())["weights"] == {"dtype": "int8"}
    counts = torch.tensor([900, 700, 432, 500])
    wave, _ = random_audio(*counts.tolist())
    for point in exact.config.operating_points.points():
        logits, lengths = found(wave, counts, point)
        assert all(torch.equal(*pair) for pair in zip((logits, lengths), expected(wave, counts, point)))
        reference, _ = exact(wave, counts, point)
        for row, frames in enumerate(lengths.tolist()):
            error = (logits[row, :frames] - reference[row, :frames]).square().mean().sqrt()
            assert error <= 0.05 * reference[row, :frames].std()
            # an 8-bit step may turn where sums of another order end in another last bit
            alone, _ = found(wave[row : row + 1, : counts[row]], point=point)
            torch.testing.assert_close(alone[0], logits[row, :frames], rtol=0, atol=0.02 * float(reference.std()))


def test_every_linear_but_the_head_is_int8(tmp_path):
    model = quantize_(load_ctc(finetuned(tmp_path, **MODELS["stochastic"])))
    left = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert left == ["head"]
    state = model.state_dict()
    assert state["backbone.encoder.upsample.0.weight"].dtype == torch.int8
    integers = {name for name, value in state.items() if value.dtype == torch.int8}
    assert {f"{name}_scale" for name in integers} == {name for name in state if name.endswith("weight_scale")}
    assert all(state[f"{name}_scale"].shape == state[name].shape[:1] for name in integers)


def test_a_shared_layer_is_quantised_once(tmp_path):
    model = quantize_(load_ctc(finetuned(tmp_path, unique_layers=1)))
    linears = [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]
    layers = [name for name in linears if ".layers." in name]
    assert len(layers) == 6 and all(name.startswith("backbone.encoder.layers.0.") for name in layers)


def test_dequantised_weights_are_those_of_the_integers(tmp_path):
    model = quantize_(load_ctc(finetuned(tmp_path, **MODELS["stochastic"])))
    state = model.state_dict()
    plain = dequantize_(copy.deepcopy(model))
    assert isinstance(plain.backbone.encoder.upsample, Unsqueeze) and plain.stored_dtype == "float32"
    names = [name for name in state if not name.endswith("_scale")]
    assert list(plain.state_dict()) == names
    for name, value in plain.state_dict().items():
        expected = state[name]
        if expected.dtype == torch.int8:
            expected = expected.float() * state[f"{name}_scale"][:, None]
        assert torch.equal(value, expected)


@pytest.mark.parametrize("factor", (2, 3, 4))
def test_unsqueeze_takes_its_blocks_at_every_factor(factor):
    unsqueeze = Unsqueeze(12, 4, residual=True).requires_grad_(False)
    unsqueeze[0].bias.copy_(seeded(48))
    x = seeded(2, 5, 12)
    whole = WholeUnsqueeze(unsqueeze, unsqueeze[0])
    torch.testing.assert_close(whole(x, factor, 5 * factor - 1), unsqueeze(x, factor, 5 * factor - 1))
    assert list(whole.state_dict()) == list(unsqueeze.state_dict())


def test_the_317_million_layout_fits_into_340_mib():
    config = encoder_config(
        conv_feature_layers="[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512, 2, 2)] * 2",
        extractor_norm="layer",
        conv_bias=True,
        encoder_layers=24,
        dim=1024,
        ffn_dim=4096,
        heads=16,
    )
    with torch.device("meta"):
        model = CtcModel(config, [str(index) for index in range(32)])
        before = sum(value.numel() * value.element_size() for value in model.state_dict().values())
        quantized.shape_quantized_(model)
    after = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    assert 1203 <= before / 2**20 < 1204 and after <= 339 * 2**20 and before / after > 3.55


# ---- what is refused


def test_what_is_quantised_already(tmp_path, capsys):
    path = finetuned(tmp_path)
    assert main(["quantize", path, str(tmp_path / "int8")]) == 0
    assert "19 Linears" in capsys.readouterr().out
    for verb in (["quantize"], ["export"], ["export", "--dtype", "bfloat16"]):
        assert main([*verb, str(tmp_path / "int8"), str(tmp_path / "again")]) == 2
        assert f"{tmp_path / 'int8'}: its weights are int8 already" in capsys.readouterr().err
    with pytest.raises(ValueError, match="the model is quantised already"):
        quantize_(load_ctc(tmp_path / "int8"))
    assert not (tmp_path / "again").exists()


def test_checkpoints_that_cannot_be_quantised(tmp_path, capsys):
    assert main(["quantize", pretrained(tmp_path / "pre.pt"), str(tmp_path / "out")]) == 2
    assert "a pre-training checkpoint ('w2v2_light'), which has no CTC head" in capsys.readouterr().err
    gated = finetuned(tmp_path, layout="large", prune_units=["heads"])
    assert main(["quantize", gated, str(tmp_path / "out")]) == 2
    assert "the model has gates; remove what they closed first" in capsys.readouterr().err
    with pytest.raises(ValueError, match="the model has gates, and cannot be quantised; remove what they closed first"):
        quantize_(load_ctc(gated))
    assert main(["quantize", str(tmp_path / "none.pt"), str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


def test_a_model_does_not_overwrite_itself(tmp_path, capsys):
    export_folder(finetuned(tmp_path), tmp_path / "model")
    assert main(["quantize", str(tmp_path / "model"), f"{tmp_path}/model/"]) == 2
    assert "OUT is MODEL, whose float32 weights would be lost" in capsys.readouterr().err
    assert load_ctc(tmp_path / "model").stored_dtype == "float32"


def test_the_dtype_of_a_folder_is_that_of_the_model(tmp_path):
    model = load_ctc(finetuned(tmp_path))
    with pytest.raises(ValueError, match="dtype: found 'int8', but the weights are float32; quantise them first"):
        write_folder(model, tmp_path / "out", dtype="int8")
    with pytest.raises(ValueError, match="dtype: found 'float32', but the weights are int8; export the model"):
        write_folder(quantize_(model), tmp_path / "out", dtype="float32")


@pytest.fixture(scope="module")
def made_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("int8")
    export_folder(finetuned(folder), folder / "model", dtype="int8")
    return folder / "model"


def rewritten(made_once, out, change):
    """The folder with its tensors changed."""
    from safetensors.torch import load_file, save_file

    model = read_folder(made_once)
    write_folder(model, out, dtype="int8")
    tensors = load_file(str(out / "model.safetensors"))
    change(tensors)
    save_file(tensors, str(out / "model.safetensors"))
    return out


FC1 = "backbone.encoder.layers.1.fc1.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(f"{FC1}_scale"), "fc1.weight_scale' is missing"),
        (
            lambda t: t.update({FC1: t[FC1].float()}),
            "fc1.weight': found torch.float32, expected a tensor of torch.int8",
        ),
        (lambda t: t.update({FC1: t[FC1].int()}), "fc1.weight': found torch.int64, expected a tensor of torch.int8"),
        (
            lambda t: t.update({"head.weight": t["head.weight"].to(torch.int8)}),
            "found torch.int8, expected .* of floats",
        ),
        (lambda t: t[f"{FC1}_scale"].fill_(torch.nan), "fc1.weight_scale' has NaN or infinite values"),
        (lambda t: t.update({f"{FC1}_scale": torch.ones(3)}), r"fc1.weight_scale': found shape \(3,\)"),
    ],
)
def test_folders_that_do_not_fit(made_once, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load_ctc(rewritten(made_once, tmp_path / "out", change))


def test_a_sentencepiece_model_goes_along(tmp_path):
    (tmp_path / "spm.model").write_bytes(b"pieces")
    export_folder(finetuned(tmp_path), tmp_path / "fp32", sentencepiece=tmp_path / "spm.model")
    assert main(["quantize", str(tmp_path / "fp32"), str(tmp_path / "int8")]) == 0
    assert (tmp_path / "int8" / "sentencepiece.model").read_bytes() == b"pieces"


WITHOUT = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("fairseq", "hydra", "omegaconf", "torchaudio", "transformers"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
import torch
from fairseq_w2v2_light.cli.main import main
from fairseq_w2v2_light.runtime.load import load_ctc
from fairseq_w2v2_light.runtime.prepare import prepare_
from fairseq_w2v2_light.runtime.streaming import StreamingRecognizer

assert main(["quantize", sys.argv[1], "int8"]) == 0
model = load_ctc("int8")
assert prepare_(model) == "int8" and model(torch.zeros(1, 900))[0].isfinite().all()
recognizer = StreamingRecognizer.from_checkpoint("int8")
recognizer.accept(torch.randn(900) * 0.1)
print(recognizer.finish().seconds)
"""


def test_it_all_works_without_fairseq(tmp_path):
    command = [sys.executable, "-c", WITHOUT, finetuned(tmp_path, layout="large", **STREAMING)]
    env = {**os.environ, "PYTHONPATH": str(user_dir().parent)}
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.splitlines()[-1] == str(900 / 16000)
