"""Gates and pruned widths in fairseq's models: w2v2_light, light_ctc and stock wav2vec_ctc."""

import copy
from types import SimpleNamespace

import pytest
import torch
from fairseq import checkpoint_utils, models
from omegaconf import OmegaConf
from tiny_checkpoints import ctc_model, save_ctc

from fairseq_w2v2_light.models import W2V2LightConfig
from fairseq_w2v2_light.models.w2v2_light import GATES_GROUP
from fairseq_w2v2_light.nn import OperatingPoint
from fairseq_w2v2_light.nn.streaming import Stream
from fairseq_w2v2_light.runtime.load import load_ctc
from fairseq_w2v2_light.runtime.streaming import StreamingRecognizer

UNITS = ["conv", "heads", "ffn", "hidden"]
SAMPLES = 900
PRUNED = dict(
    conv_feature_layers="[(5, 10, 5), (1, 3, 2), (16, 2, 2)]",
    encoder_layers=4,
    encoder_embed_dim=23,
    encoder_attention_heads=4,
    head_dim=8,
    layer_heads=[1, 0, 4, 0],
    layer_ffn=[0, 5, 48, 0],
    norm_dim=32,
    conv_norm_dims=[16, 16, 16],
    conv_pos_groups=3,
    conv_pos_group_dims=[8, 5, 10],
)
FINE_TUNING = dict(feature_grad_mult=1.0, freeze_finetune_updates=0)


def save(tiny, path, model, layout="large", **keys):
    cfg = tiny.container(W2V2LightConfig(**{**tiny.config, **tiny.layouts[layout], **keys}), "w2v2_light")
    return tiny.save(path, cfg, model.state_dict())


def checkpoint(tiny, path, seed=0, layout="large", **keys):
    """A pre-training checkpoint; with prune_units, gates that are half closed."""
    model = tiny.light(seed, layout=layout, **keys)
    if model.gates is not None:
        close_some(model)
    return save(tiny, path, model, layout, **keys)


def close_some(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.gates.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 3)


def encoder_of(model):
    return model.w2v_encoder.w2v_model


def logits(model, source, padding_mask=None):
    with torch.no_grad():
        return model(source=source, padding_mask=padding_mask)["encoder_out"]


def step(model, source, padding_mask=None):
    """One backward pass of a CTC model; names of the parameters without a gradient."""
    model.zero_grad(set_to_none=True)
    model(source=source, padding_mask=padding_mask)["encoder_out"].square().sum().backward()
    return [name for name, parameter in model.named_parameters() if parameter.grad is None]


def gate_gradients(model):
    return torch.cat([parameter.grad for parameter in encoder_of(model).gates.parameters()])


# ---- w2v2_light


def test_conv_gates_without_gradients_are_refused(tiny):
    with pytest.raises(ValueError) as error:
        tiny.light(feature_grad_mult=0.0, prune_units=UNITS)
    for word in ("model.feature_grad_mult: found 0", "prune_units", "'conv'", "set model.feature_grad_mult=1.0"):
        assert word in str(error.value)


def test_other_gates_need_no_gradient_in_the_frontend(tiny):
    model = tiny.light(feature_grad_mult=0.0, prune_units=["heads", "ffn", "hidden"]).train()
    model.extract_features(tiny.audio(SAMPLES)[0])["x"].square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.gates.parameters())


def test_gates_are_an_optimizer_group_of_their_own(tiny):
    model = tiny.light(prune_units=UNITS)
    marked = {name for name, parameter in model.named_parameters() if hasattr(parameter, "param_group")}
    assert marked == {name for name, _ in model.named_parameters() if name.startswith("gates.")}
    assert {parameter.param_group for parameter in model.gates.parameters()} == {GATES_GROUP}
    assert {parameter.param_group for parameter in model.half().gates.parameters()} == {GATES_GROUP}


def test_unknown_units(tiny):
    with pytest.raises(ValueError, match=r"prune_units: found \['convs'\], expected some of conv, heads, ffn, hidden"):
        tiny.light(prune_units=["convs"])


def test_without_units_there_are_no_gates(tiny):
    light, stock = tiny.pair()
    assert light.gates is None
    assert [name for name, _ in light.named_parameters()] and set(light.state_dict()) == set(stock.state_dict())
    assert not [parameter for parameter in light.parameters() if hasattr(parameter, "param_group")]


@pytest.mark.parametrize("layout", ("base", "large"))
def test_every_parameter_gets_a_gradient_at_every_point(tiny, layout):
    keys = dict(prune_units=UNITS, squeeze_factors=[1, 2], kv_pools=[1, 2], attention_map_every=2)
    model = tiny.light(layout=layout, encoder_layerdrop=0.4, mask_prob=0.5, **keys).train()
    for update in range(6):
        model.set_num_updates(update)
        model.zero_grad(set_to_none=True)
        result = model(*tiny.audio(SAMPLES, 700))
        result["x"].float().logsumexp(0).sum().backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("prune_units", (UNITS, ["conv"], ["heads"], ["ffn"], ["hidden"]))
def test_pretraining_with_gates_runs_and_is_finite(tiny, prune_units):
    model = tiny.light(prune_units=prune_units, mask_prob=0.5).train()
    close_some(model)
    result = model(*tiny.audio(SAMPLES, 700))
    result["x"].float().logsumexp(0).sum().backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("layout", ("base", "large"))
def test_a_plain_checkpoint_gets_open_gates(tiny, layout):
    plain = tiny.light(layout=layout)
    model = tiny.light(1, layout=layout, prune_units=UNITS)
    with torch.no_grad():
        for parameter in model.gates.parameters():
            parameter.copy_(type(model.gates.hidden)(1).log_alpha.expand_as(parameter))
    model.load_state_dict(plain.state_dict(), strict=True)
    source, padding_mask = tiny.audio(SAMPLES, 500)
    with torch.no_grad():
        found, expected = (part.extract_features(source, padding_mask)["x"] for part in (model, plain))
    torch.testing.assert_close(found, expected, atol=3e-6, rtol=1e-5)


def test_a_checkpoint_with_some_of_its_gates_missing_is_refused(tiny):
    model = tiny.light(prune_units=UNITS)
    state = {name: value for name, value in model.state_dict().items() if name != "gates.hidden.log_alpha"}
    with pytest.raises(RuntimeError, match="gates.hidden.log_alpha"):
        model.load_state_dict(state, strict=True)


# ---- light_ctc


@pytest.mark.parametrize("layout", ("base", "large"))
def test_fine_tuning_adds_open_gates_to_a_plain_checkpoint(tiny, tmp_path, layout):
    path = checkpoint(tiny, tmp_path / "plain.pt", layout=layout)
    plain = ctc_model(path)
    gated = ctc_model(path, prune_units=UNITS, **FINE_TUNING)
    assert encoder_of(gated).config.prune_units == tuple(UNITS) and encoder_of(plain).gates is None
    for value in encoder_of(gated).gates.decided():
        assert all(bool((part == 1).all()) for part in (value if isinstance(value, list) else [value]))
    gated.w2v_encoder.proj.load_state_dict(plain.w2v_encoder.proj.state_dict())
    source, padding_mask = tiny.audio(SAMPLES, 500)
    torch.testing.assert_close(
        logits(gated, source, padding_mask), logits(plain, source, padding_mask), atol=1e-5, rtol=1e-5
    )


def test_null_goes_on_with_the_gates_of_the_checkpoint(tiny, tmp_path):
    path = checkpoint(tiny, tmp_path / "gated.pt", prune_units=UNITS)
    model = ctc_model(path, **FINE_TUNING)
    state = torch.load(path, weights_only=False)["model"]
    found = encoder_of(model).gates.state_dict()
    assert found and all(torch.equal(value, state[f"gates.{name}"]) for name, value in found.items())
    assert (encoder_of(model).gates.decided().hidden == 0).any()


def test_the_same_units_in_another_order(tiny, tmp_path):
    path = checkpoint(tiny, tmp_path / "gated.pt", prune_units=UNITS)
    assert encoder_of(ctc_model(path, prune_units=UNITS[::-1], **FINE_TUNING)).gates is not None


@pytest.mark.parametrize("units", ([], ["heads"], UNITS[:3]))
def test_gates_of_a_checkpoint_stay_until_it_is_pruned(tiny, tmp_path, units):
    path = checkpoint(tiny, tmp_path / "gated.pt", prune_units=UNITS)
    with pytest.raises(ValueError) as error:
        ctc_model(path, prune_units=units, **FINE_TUNING)
    for word in (f"model.prune_units: found {units}", f"has gates on {UNITS}", "`w2v2-light prune`", "null"):
        assert word in str(error.value)


def test_conv_gates_without_gradients_are_refused_in_fine_tuning(tiny, tmp_path):
    path = checkpoint(tiny, tmp_path / "plain.pt")
    with pytest.raises(ValueError, match="model.feature_grad_mult: found 0"):
        ctc_model(path, prune_units=UNITS, feature_grad_mult=0.0)
    assert encoder_of(ctc_model(path, prune_units=["heads", "ffn"], feature_grad_mult=0.0)).gates.conv is None


def test_from_a_recipe(tiny, tmp_path):
    recipe = OmegaConf.create({"model": {**tiny.config, **tiny.layouts["large"], "_name": "w2v2_light"}})
    OmegaConf.save(recipe, str(tmp_path / "recipe.yaml"))
    model = ctc_model("", recipe=str(tmp_path / "recipe.yaml"), prune_units=UNITS, **FINE_TUNING)
    assert encoder_of(model).gates is not None


def test_frozen_updates_prune_nothing(tiny, tmp_path):
    path = checkpoint(tiny, tmp_path / "plain.pt")
    keys = dict(FINE_TUNING, freeze_finetune_updates=3)
    model = ctc_model(path, prune_units=UNITS, **keys).train()
    source, _ = tiny.audio(SAMPLES)
    for update in range(5):
        model.set_num_updates(update)
        without = step(model, source)
        frozen = {name for name in without if ".gates." in name}
        assert len(frozen) == (10 if update < 3 else 0)
    expected = logits(model.eval(), source)
    model.set_num_updates(0)
    model.train()
    torch.testing.assert_close(model(source=source, padding_mask=None)["encoder_out"].detach(), expected)


@pytest.mark.parametrize("layerdrop", (0.0, 0.5))
def test_every_parameter_gets_a_gradient_in_fine_tuning(tiny, tmp_path, layerdrop):
    path = checkpoint(tiny, tmp_path / "plain.pt", squeeze_factors=[1, 2], attention_map_every=2)
    model = ctc_model(path, prune_units=UNITS, layerdrop=layerdrop, **FINE_TUNING).train()
    total = 0
    for update in range(4):
        model.set_num_updates(update)
        assert step(model, *tiny.audio(SAMPLES, 500)) == []
        total = total + gate_gradients(model).abs()
    assert total.isfinite().all() and (total > 0).any()


def test_training_draws_other_gates_in_every_call(tiny, tmp_path):
    path = checkpoint(tiny, tmp_path / "gated.pt", prune_units=UNITS)
    model = ctc_model(path, **FINE_TUNING).train()
    source, _ = tiny.audio(SAMPLES)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model.set_num_updates(0)
        outputs.append(model(source=source, padding_mask=None)["encoder_out"])
    assert torch.equal(outputs[0], outputs[1]) and not torch.allclose(outputs[0], outputs[2])


def test_a_padded_batch_equals_its_utterances(tiny, tmp_path):
    model = ctc_model(checkpoint(tiny, tmp_path / "gated.pt", prune_units=UNITS, layout="base"), **FINE_TUNING)
    source, padding_mask = tiny.audio(SAMPLES, 500)
    batch = logits(model, source, padding_mask)
    alone = logits(model, source[1:, :500])
    torch.testing.assert_close(batch[: alone.size(0), 1:], alone, atol=1e-5, rtol=1e-5)


# ---- saved and loaded


@pytest.fixture(params=("gated", "pruned"))
def fine_tuned(request, tiny, tmp_path):
    """(CTC model, its checkpoint) with gates, or of unequal widths."""
    keys = dict(prune_units=UNITS) if request.param == "gated" else PRUNED
    model = ctc_model(checkpoint(tiny, tmp_path / "pretrained.pt", **keys), **FINE_TUNING)
    path = save_ctc(tmp_path / "ctc.pt", model, {"_name": "audio_finetuning"}, tiny.letters())
    (tmp_path / "pretrained.pt").unlink()
    return model, path


def test_fairseq_builds_it_from_its_checkpoint_alone(tiny, fine_tuned):
    model, path = fine_tuned
    state = checkpoint_utils.load_checkpoint_to_cpu(path)
    again = models.build_model(state["cfg"].model, SimpleNamespace(target_dictionary=tiny.letters())).eval()
    again.load_state_dict(copy.deepcopy(state["model"]), strict=True)
    source, padding_mask = tiny.audio(SAMPLES, 500)
    assert torch.equal(logits(again, source, padding_mask), logits(model, source, padding_mask))
    assert encoder_of(again).config == encoder_of(model).config


def test_the_runtime_computes_the_same_logits(tiny, fine_tuned):
    model, path = fine_tuned
    source, padding_mask = tiny.audio(SAMPLES, 500)
    with torch.no_grad():
        found, _ = load_ctc(path)(source, torch.tensor([SAMPLES, 500]))
    expected = logits(model, source, padding_mask).transpose(0, 1)
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1, :20], expected[1, :20], atol=1e-5, rtol=1e-5)


def test_fine_tuning_goes_on_from_it(tiny, fine_tuned):
    model, path = fine_tuned
    again = ctc_model(path, **FINE_TUNING)
    source, _ = tiny.audio(SAMPLES)
    torch.testing.assert_close(logits(again, source), logits(model, source), atol=1e-5, rtol=1e-5)
    assert step(again.train(), source) == []


def test_stock_fine_tuning_of_it(tiny, tmp_path):
    for name, keys in (("gated", dict(prune_units=UNITS)), ("pruned", PRUNED)):
        path = checkpoint(tiny, tmp_path / f"{name}.pt", **keys)
        model, ours = ctc_model(path, "wav2vec_ctc", **FINE_TUNING), ctc_model(path, **FINE_TUNING)
        source, _ = tiny.audio(SAMPLES)
        with torch.no_grad():
            found, expected = (encoder_of(part).extract_features(source)["x"] for part in (model, ours))
        assert torch.equal(found, expected)
        assert step(model.train(), source) == []


def test_stock_fine_tuning_needs_gradients_in_the_frontend_too(tiny, tmp_path):
    path = checkpoint(tiny, tmp_path / "gated.pt", prune_units=UNITS)
    with pytest.raises(ValueError, match="model.feature_grad_mult: found 0"):
        ctc_model(path, "wav2vec_ctc", feature_grad_mult=0.0)


def test_gates_of_a_half_precision_checkpoint_are_fp32(tiny, tmp_path):
    model = tiny.light(layout="large", prune_units=UNITS)
    close_some(model)
    before = copy.deepcopy(model.gates.state_dict())
    path = save(tiny, tmp_path / "half.pt", model.half(), prune_units=UNITS)
    again = encoder_of(ctc_model(path, **FINE_TUNING))
    assert all(torch.equal(value, before[name]) for name, value in again.gates.state_dict().items())


# ---- the widths of a pruned model


@pytest.mark.parametrize("layout", ("base", "large"))
def test_pruned_widths_pretrain(tiny, layout):
    model = tiny.light(layout=layout, mask_prob=0.5, **PRUNED).train()
    model(*tiny.audio(SAMPLES, 700))["x"].float().logsumexp(0).sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    again = tiny.light(1, layout=layout, **PRUNED)
    again.load_state_dict(model.state_dict(), strict=True)
    source, padding_mask = tiny.audio(SAMPLES, 500)
    with torch.no_grad():
        found, expected = (part.eval().extract_features(source, padding_mask)["x"] for part in (again, model))
    assert torch.equal(found, expected) and found.shape[-1] == 23


def test_blocks_that_are_gone_have_no_parameters(tiny):
    names = set(tiny.light(layout="large", **PRUNED).state_dict())
    assert not [name for name in names if name.startswith(("encoder.layers.3.", "encoder.layers.0.fc"))]
    assert not [name for name in names if name.startswith("encoder.layers.1.self_attn")]


def test_pruned_widths_stream(tiny):
    keys = dict(PRUNED, chunk_frames=[4], left_context_frames=8, lookahead_frames=4)
    model = tiny.light(layout="large", **keys)
    stream, (source, _) = Stream(model, OperatingPoint.parse("s1q1k1c4")), tiny.audio(SAMPLES)
    frames = stream.finish(source, stream.start())
    with torch.no_grad():
        expected = model.extract_features(source)["x"]
    torch.testing.assert_close(frames, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("keys", (dict(prune_units=UNITS), PRUNED), ids=("gated", "pruned"))
def test_the_runtime_streams_its_checkpoint(tiny, tmp_path, keys):
    """With weights laid out for the CPU where they can be, which those of gates cannot."""
    streaming = dict(keys, chunk_frames=[4], left_context_frames=8, lookahead_frames=4)
    model = ctc_model(checkpoint(tiny, tmp_path / "pretrained.pt", **streaming), **FINE_TUNING)
    path = save_ctc(tmp_path / "ctc.pt", model, {"_name": "audio_finetuning"}, tiny.letters())
    recognizer = StreamingRecognizer.from_checkpoint(path)
    source, _ = tiny.audio(SAMPLES)
    found = recognizer.stream.finish(source, recognizer.stream.start())
    with torch.no_grad():
        expected = encoder_of(model).extract_features(source)["x"]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_project_features_adds_the_linear(tiny):
    keys = dict(conv_feature_layers="[(16, 10, 5), (16, 3, 2), (32, 2, 2)]")
    assert tiny.light(**keys).post_extract_proj is None
    assert tiny.light(project_features=True, **keys).post_extract_proj.weight.shape == (32, 32)


@pytest.mark.parametrize(
    "keys, words",
    (
        ({"layer_heads": [1, 2]}, ("layer_heads: found 2 numbers", "4 stored layers")),
        ({"layer_ffn": [1] * 3}, ("layer_ffn: found 3 numbers",)),
        ({"layer_ffn": [-1, 1, 1, 1]}, ("layer_ffn: found [-1, 1, 1, 1]",)),
        ({"norm_dim": 22}, ("norm_dim: found 22, expected encoder_embed_dim=23",)),
        ({"conv_norm_dims": [16, 16, 15]}, ("conv_norm_dims: found 15 for frontend layer 2",)),
        ({"conv_pos_group_dims": [8, 5, 9]}, ("conv_pos_group_dims: found [8, 5, 9]", "encoder_embed_dim=23")),
        ({"head_dim": 0}, ("encoder_attention_heads: 4 heads do not divide encoder_embed_dim 23",)),
        ({"attention_map_every": 2}, ("layer_heads: stored layers [0, 1] share attention maps", "[1, 0] heads")),
    ),
)
def test_widths_that_cannot_be(tiny, keys, words):
    with pytest.raises(ValueError) as error:
        tiny.light(**{**PRUNED, **keys})
    for word in words:
        assert word in str(error.value)
