"""The fairseq models: operating points in training and inference, gradients, padding, bad input, half precision."""

import random

import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils

from fairseq_w2v2_light.criterions import LightContrastive

STOCHASTIC = dict(squeeze_factors=[1, 2, 3], query_pools=[1, 2], kv_pools=[1, 2, 3])
SAMPLES, FRAMES = 1215, 60


def features(model, source, padding_mask=None, **options):
    with torch.no_grad():
        return model.extract_features(source, padding_mask, **options)


def loss_of(model, source, mask_indices, seed=0, **options):
    torch.manual_seed(seed)
    criterion = LightContrastive(None, [0.1, 10.0], 0.0)
    inputs = {"source": source, "mask_indices": mask_indices, **options}
    return criterion(model, {"net_input": inputs, "id": torch.arange(len(source))})[0]


# operating points


def test_training_draws_one_point_an_update(tiny):
    model = tiny.light(**STOCHASTIC).train()
    points = []
    for update in range(40):
        model.set_num_updates(update)
        before = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()
        point = model.current_operating_point()
        assert model.current_operating_point() == point  # accumulation, recomputation
        assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
        assert (np.random.get_state()[1] == before[2]).all()
        points.append(str(point))
    assert len(set(points)) > 10

    again = tiny.light(seed=5, **STOCHASTIC).train()
    torch.manual_seed(99)
    for update in (17, 3, 39):
        again.set_num_updates(update)
        assert str(again.current_operating_point()) == points[update]


def test_the_seed_changes_the_draws(tiny):
    draws = []
    for seed in (1, 2):
        model = tiny.light(operating_point_seed=seed, **STOCHASTIC).train()
        draws.append([])
        for update in range(20):
            model.set_num_updates(update)
            draws[-1].append(str(model.current_operating_point()))
    assert draws[0] != draws[1]


def test_draws_of_a_saved_model_continue(tiny):
    model = tiny.light(**STOCHASTIC).train()
    model.set_num_updates(12)
    resumed = tiny.light(seed=3, **STOCHASTIC).train()
    resumed.load_state_dict(model.state_dict())
    resumed.set_num_updates(12)
    assert model.current_operating_point() == resumed.current_operating_point()


def test_inference_uses_the_least_reduction(tiny):
    model = tiny.light(**STOCHASTIC)
    model.set_num_updates(7)
    assert str(model.current_operating_point()) == "s1q1k1"
    assert features(model, tiny.audio(600)[0])["operating_point"] == "s1q1k1"


def test_inference_chooses_per_call(tiny):
    model = tiny.light(**STOCHASTIC)
    source, _ = tiny.audio(800)
    chosen = features(model, source, operating_point="s2q1k2")
    assert chosen["operating_point"] == "s2q1k2"
    assert features(model, source)["operating_point"] == "s1q1k1"  # nothing is remembered

    fixed = tiny.light(**STOCHASTIC, operating_point="s2q1k2")
    torch.testing.assert_close(features(fixed, source)["x"], chosen["x"], atol=0, rtol=0)
    assert str(fixed.train().current_operating_point()) == "s2q1k2"


def test_stochastic_in_words_is_the_default(tiny):
    model = tiny.light(**STOCHASTIC, operating_point="stochastic")
    assert model.operating_point is None


def test_fixed_squeeze_alone_is_not_stochastic(tiny):
    model = tiny.sew(squeeze_factors=[2], query_pools=[1], kv_pools=[1]).train()
    assert str(model.current_operating_point()) == str(model.eval().current_operating_point()) == "s2q1k1"


@pytest.mark.parametrize(
    "text, words",
    (
        ("s4q1k1", ("not trained with squeeze factor 4", "[1, 2, 3]")),
        ("s1q3k1", ("not trained with query pooling 3",)),
        ("s1q1k4", ("not trained with key-value pooling 4",)),
        ("s1q1-2k1", ("2 query pooling factors for 3 layers",)),
        ("s2", ("operating point 's2'", "s2q1k2")),
        ("S2Q1K1", ("operating point 'S2Q1K1'",)),
    ),
)
def test_points_that_the_model_cannot_run(tiny, text, words):
    model = tiny.light(**STOCHASTIC)
    for attempt in (
        lambda: features(model, tiny.audio(600)[0], operating_point=text),
        lambda: tiny.light(**STOCHASTIC, operating_point=text),
    ):
        with pytest.raises(ValueError) as error:
            attempt()
        for word in words:
            assert word in str(error.value)


# masks, and what resumes


def test_masks_of_an_update_depend_on_seed_update_and_call(tiny):
    model = tiny.light(encoder_layerdrop=0.3).train()
    source, _ = tiny.audio(SAMPLES, SAMPLES)

    def run(update, calls=1):
        model.set_num_updates(update)
        for _ in range(calls):
            torch.manual_seed(0)
            output = model(source)["x"].detach()
        return output

    first, second = run(5), run(6)
    np.random.seed(12345)
    assert torch.equal(run(5), first) and not torch.equal(first, second)
    np.random.seed(1)
    assert not torch.equal(run(7, calls=2), run(8)) and not torch.equal(run(9, calls=2), run(10))


def test_accumulation_steps_of_an_update_have_different_masks_and_one_point(tiny):
    model = tiny.light(**STOCHASTIC).train()
    source, _ = tiny.audio(SAMPLES, SAMPLES)
    model.set_num_updates(3)
    points, outputs = set(), []
    for _ in range(2):
        torch.manual_seed(0)
        output = model(source)
        points.add(output["operating_point"])
        outputs.append(output["x"])
    assert len(points) == 1
    assert not torch.equal(*outputs)


def test_numpy_s_global_generator_is_left_as_it_was_in_training(tiny):
    model = tiny.light(encoder_layerdrop=0.3).train()
    model.set_num_updates(3)
    np.random.seed(4)
    expected = np.random.random()
    np.random.seed(4)
    model(tiny.audio(SAMPLES)[0])
    assert np.random.random() == expected


# padding


@pytest.mark.parametrize("layout", ("base", "large"))
@pytest.mark.parametrize("squeeze_tail", ("keep", "drop"))
def test_padded_batch_equals_its_utterances_at_every_point(tiny, layout, squeeze_tail):
    model = tiny.light(layout=layout, squeeze_tail=squeeze_tail, encoder_layers=2, **STOCHASTIC)
    lengths = (801, 30, 49, 50, 333, 90)
    source, padding_mask = tiny.audio(*lengths)
    for point in map(str, model.config.operating_points.points()):
        batch = features(model, source, padding_mask, operating_point=point)
        assert batch["x"].shape[:2] == batch["padding_mask"].shape
        for row, count in enumerate(lengths):
            alone = features(model, source[row : row + 1, :count], operating_point=point)["x"][0]
            assert (~batch["padding_mask"][row]).sum() == len(alone)
            assert (batch["x"][row, : len(alone)] - alone).abs().max() <= 1e-5


# gradients


@pytest.mark.parametrize("build", ("light", "sew"))
@pytest.mark.parametrize(
    "changes",
    (
        {},
        {"unique_layers": 1},
        {"attention_map_every": 2},
        {"attention_map_every": 2, "unique_layers": 2, "layer_map": "cycle"},
        {"attention_map_every": 3, "encoder_layerdrop": 0.9},
        {"encoder_layerdrop": 0.9, "unique_layers": 1},
        {"unsqueeze_factor": 5},
        {"mask_prob": 0.65, "target_glu": True, "codebook_negatives": 2},
    ),
    ids=lambda changes: "-".join(f"{key}{value}" for key, value in changes.items()) or "plain",
)
def test_every_parameter_gets_a_gradient_at_every_point(tiny, build, changes):
    model = getattr(tiny, build)(**{**STOCHASTIC, "encoder_layerdrop": 0.0, **changes}).train()
    source, _ = tiny.audio(SAMPLES, SAMPLES)
    for index, point in enumerate(model.config.operating_points.points()):
        np.random.seed(index)
        model.zero_grad(set_to_none=True)
        loss_of(model, source, tiny.mask(2, FRAMES), operating_point=point).backward()
        without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        assert without == [], (str(point), without)


def test_idle_parameters_get_gradient_zero(tiny):
    model = tiny.light(**STOCHASTIC).train()
    source, _ = tiny.audio(SAMPLES, SAMPLES)
    loss_of(model, source, tiny.mask(2, FRAMES), operating_point="s1q1k1").backward()
    assert model.encoder.upsample[0].weight.grad.abs().max() == 0
    model.zero_grad(set_to_none=True)
    loss_of(model, source, tiny.mask(2, FRAMES), operating_point="s3q1k1").backward()
    assert model.encoder.upsample[0].weight.grad.abs().max() > 0


def test_heads_of_pretraining_are_idle_where_only_features_are_asked_for(tiny):
    model = tiny.light(**STOCHASTIC).train()
    source, _ = tiny.audio(SAMPLES, SAMPLES)
    model(source, mask=False, features_only=True, operating_point="s1q1k1")["x"].sum().backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []
    assert model.final_proj.weight.grad.abs().max() == 0


def test_keeping_idle_parameters_changes_neither_output_nor_gradient(tiny, monkeypatch):
    source, _ = tiny.audio(SAMPLES, SAMPLES)
    results = []
    for kept in (True, False):
        model = tiny.light(layout="large", attention_map_every=2, **STOCHASTIC).train()
        if not kept:
            monkeypatch.setattr(model, "_keep_idle_parameters", lambda x, features_only: x)
        loss = loss_of(model, source, tiny.mask(2, FRAMES), operating_point="s2q1k2")
        loss.backward()
        results.append((loss, {name: parameter.grad for name, parameter in model.named_parameters()}))
    assert torch.equal(results[0][0], results[1][0])
    for name, gradient in results[1][1].items():
        if gradient is not None:
            torch.testing.assert_close(results[0][1][name], gradient, atol=1e-5, rtol=1e-5)


def test_recomputed_activations_in_training(tiny):
    source, _ = tiny.audio(SAMPLES, SAMPLES)
    results = []
    for recompute in (False, True):
        model = tiny.light(
            layout="large", checkpoint_activations=recompute, dropout=0.1, encoder_layerdrop=0.3, **STOCHASTIC
        ).train()
        model.set_num_updates(11)
        calls = []
        model.encoder.layers[0].register_forward_pre_hook(lambda module, inputs, calls=calls: calls.append(inputs[2:4]))
        loss = loss_of(model, source, tiny.mask(2, FRAMES))
        loss.backward()
        results.append((loss, [parameter.grad for parameter in model.parameters()], calls))
    assert torch.equal(results[0][0], results[1][0])
    assert len(set(results[1][2])) <= 1
    for plain, recomputed in zip(results[0][1], results[1][1]):
        torch.testing.assert_close(plain, recomputed, atol=1e-5, rtol=1e-4)


def test_frozen_parameters_stay_frozen(tiny):
    model = tiny.light(encoder_layerdrop=0.3, **STOCHASTIC).train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert not model(tiny.audio(SAMPLES)[0])["x"].requires_grad


# bad input


@pytest.mark.parametrize("samples", (0, 1, 29))
def test_too_short_audio(tiny, samples):
    model = tiny.light()
    with pytest.raises(ValueError, match=f"audio of {samples} samples is too short: .* at least 30 samples"):
        features(model, torch.zeros(1, samples))
    with pytest.raises(ValueError, match=f"audio of {samples} samples is too short"):
        features(model, *tiny.audio(600, samples))


def test_too_short_audio_for_the_stock_frontend(tiny):
    model = tiny.light(conv_feature_layers="[(4, 10, 5)] + [(4, 3, 2)] * 4 + [(4, 2, 2)] * 2")
    with pytest.raises(ValueError, match=r"399 samples is too short: .* at least 400 samples \(25.0 ms at 16 kHz\)"):
        features(model, torch.zeros(1, 399))
    assert features(model, torch.randn(1, 400))["x"].shape == (1, 1, 32)


@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")))
def test_samples_that_are_not_finite(tiny, value):
    source, _ = tiny.audio(600, 600, 600)
    source[1, 7] = value
    with pytest.raises(ValueError, match=r"NaN or infinite samples in row\(s\) \[1\] of the batch"):
        features(tiny.light(), source)


@pytest.mark.parametrize(
    "changes, words",
    (
        ({"encoder_attention_heads": 5}, ("encoder_attention_heads: 5", "32")),
        ({"conv_pos_groups": 5}, ("conv_pos_groups: 5", "32 channels")),
        ({"layer_map": "0,1"}, ("layer_map '0,1'", "encoder_layers=3")),
        ({"unique_layers": 4}, ("unique_layers: found 4", "encoder_layers=3")),
        ({"conv_feature_layers": "[(4, 10)]"}, ("conv_feature_layers '[(4, 10)]'", "triple")),
        ({"squeeze_factors": [0]}, ("squeeze_factors: found [0]",)),
        ({"squeeze_factors": [1, 3], "unsqueeze_factor": 2}, ("squeeze_factors: found 3", "up to 2")),
        ({"squeeze_tail": "cut"}, ("squeeze_tail: found 'cut'", "'keep' or 'drop'")),
        ({"latent_vars": -3}, ("model.latent_vars: found -3", "1 or more")),
        ({"latent_groups": 5}, ("model.latent_groups: 5 groups do not divide the 12 channels",)),
        ({"latent_temp": [1.0]}, ("model.latent_temp: found [1.0]",)),
        ({"projection": "conv"}, ("model.projection: found 'conv'", "'linear' or 'mlp'")),
        ({"quantize_input": True}, ("model.quantize_input: found True", "expected False")),
        ({"pos_conv_depth": 5}, ("model.pos_conv_depth: found 5", "expected 1")),
        ({"layer_type": "conformer"}, ("model.layer_type: found conformer", "expected transformer")),
        ({"attention_map_every": 0}, ("attention_map_every: found 0",)),
        ({"activation_fn": "sigmoid"}, ("activation_fn: found 'sigmoid'",)),
    ),
)
def test_configurations_that_cannot_be(tiny, changes, words):
    with pytest.raises(ValueError) as error:
        tiny.light(**changes)
    for word in words:
        assert word in str(error.value)


def test_last_layer_cannot_be_cut_off(tiny):
    model = tiny.light()
    with pytest.raises(ValueError, match="last_layer=1.*encoder_layers"):
        model.remove_pretraining_modules(last_layer=1)
    assert model.final_proj is not None, "a refused call must leave the model as it was"


# checkpoints


def test_without_heads_the_pretrained_state_loads_strictly(tiny):
    for model in (tiny.light(), tiny.sew(**STOCHASTIC)):
        state = model.state_dict()
        model.remove_pretraining_modules()
        torch.nn.Module.load_state_dict(model, state, strict=True)
        assert not [name for name in model.state_dict() if "project_q" in name or "quantizer" in name]


@pytest.mark.parametrize("half", (False, True), ids=("fp32", "fp16"))
def test_checkpoint_of_a_shared_model_is_proportionally_small(tiny, tmp_path, half):
    sizes, parameters = [], []
    for unique_layers in (0, 1):
        model = tiny.light(encoder_layers=12, encoder_ffn_embed_dim=256, unique_layers=unique_layers)
        model = model.half() if half else model
        # what Trainer.save_checkpoint does before it writes
        state = {"model": {name: value.cpu() for name, value in model.state_dict().items()}}
        path = tmp_path / f"{unique_layers}.pt"
        checkpoint_utils.torch_persistent_save(state, str(path))
        sizes.append(path.stat().st_size)
        parameters.append(sum(parameter.numel() for parameter in model.parameters()))
        bytes_each = 2 if half else 4
        assert sizes[-1] < parameters[-1] * bytes_each + 400 * len(state["model"]) + 4000
    assert sizes[1] / sizes[0] == pytest.approx(parameters[1] / parameters[0], abs=0.06)


# half precision


@pytest.mark.parametrize("build", ("light", "sew"))
@pytest.mark.parametrize("layout", ("base", "large"))
def test_bfloat16_weights(tiny, build, layout):
    changes = {**tiny.layouts[layout], **STOCHASTIC, "attention_map_every": 2}
    model = getattr(tiny, build)(**changes)
    source, padding_mask = tiny.audio(SAMPLES, 700)
    expected = features(model, source, padding_mask, operating_point="s2q1k2")["x"]
    model = model.bfloat16().train()
    found = features(model, source.bfloat16(), padding_mask, operating_point="s2q1k2")["x"]
    assert found.dtype == torch.bfloat16
    valid = slice(0, 30)
    assert (found[:, valid].float() - expected[:, valid]).abs().mean() < 0.1
    mask = torch.zeros(2, FRAMES, dtype=torch.bool)
    mask[:, 3:12] = True
    with torch.backends.mkldnn.flags(enabled=False):  # torch 2.1's makes NaN of gradients of convolutions
        loss = loss_of(model, source.bfloat16(), mask, padding_mask=padding_mask, operating_point="s3q2k2")
        loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.bfloat16, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("layout", ("base", "large"))
def test_autocast(tiny, layout):
    model = tiny.light(layout=layout, attention_map_every=2, **STOCHASTIC).train()
    source, padding_mask = tiny.audio(SAMPLES, 700)
    mask = torch.zeros(2, FRAMES, dtype=torch.bool)
    mask[:, 3:12] = True
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, source, mask, padding_mask=padding_mask, operating_point="s2q2k3")
    loss.backward()
    assert loss.isfinite() and loss.dtype == torch.float32
    assert all(parameter.grad is not None for parameter in model.parameters())


# SEW


def test_sew_defaults(tiny):
    from fairseq_w2v2_light.models import StochasticSEWConfig
    from fairseq_w2v2_light.nn import parse_conv_layers, receptive_field

    config = StochasticSEWConfig()
    layers = parse_conv_layers(config.conv_feature_layers)
    assert len(layers) == 13 and layers[-1][0] == 512
    assert receptive_field(layers) == (400, 320)
    assert config.conv_pos == 31 and config.projection == "mlp"


@pytest.mark.parametrize(
    "widths, with_heads, without",
    (
        ((512, 2048, 12, 8), 46_378_911, 40_708_895),
        ((768, 3072, 12, 12), 96_339_103, 89_620_511),
        ((768, 3072, 24, 12), 181_393_567, 174_674_975),
    ),
    ids=("tiny", "small", "mid"),
)
def test_sew_parameter_counts(widths, with_heads, without):
    from fairseq_w2v2_light.models import StochasticSEWConfig, StochasticSEWModel

    dim, ffn, layers, heads = widths
    config = StochasticSEWConfig(
        encoder_embed_dim=dim,
        encoder_ffn_embed_dim=ffn,
        encoder_layers=layers,
        encoder_attention_heads=heads,
        quantize_targets=True,
        final_dim=256,
        squeeze_factors=[2],
        query_pools=[1],
        kv_pools=[1],
        squeeze_tail="drop",
    )
    with torch.device("meta"):
        model = StochasticSEWModel(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == with_heads
    model.remove_pretraining_modules()
    assert sum(parameter.numel() for parameter in model.parameters()) == without


def test_mlp_heads_have_sew_s_names(tiny):
    model = tiny.sew(**STOCHASTIC)
    for name in ("project_q", "final_proj"):
        assert {key[len(name) + 1 :] for key in model.state_dict() if key.startswith(f"{name}.")} == {
            "net.0.weight",
            "net.1.weight",
            "net.1.bias",
            "net.1.running_mean",
            "net.1.running_var",
            "net.1.num_batches_tracked",
            "net.3.weight",
            "net.3.bias",
        }


def test_mlp_heads_equal_torch_s_batch_norm():
    from fairseq_w2v2_light.nn.heads import ProjectionMLP

    torch.manual_seed(0)
    head = ProjectionMLP(6, 4, 10)
    norm = torch.nn.BatchNorm1d(10)
    reference = torch.nn.Sequential(head.net[0], norm, torch.nn.ReLU(), head.net[3])
    for _ in range(3):
        x = torch.randn(2, 7, 6)
        torch.testing.assert_close(head(x), reference(x.transpose(1, 2)).transpose(1, 2))
    torch.testing.assert_close(head.net[1].running_mean, norm.running_mean)
    torch.testing.assert_close(head.net[1].running_var, norm.running_var)
    assert head.net[1].num_batches_tracked == 3
    head.eval(), reference.eval()
    torch.testing.assert_close(head(x), reference(x.transpose(1, 2)).transpose(1, 2))


def test_mlp_heads_can_be_trained():
    """In place or not, the running statistics must not disturb the backward pass; two calls a step are usual."""
    from fairseq_w2v2_light.nn.heads import ProjectionMLP

    torch.manual_seed(0)
    head = ProjectionMLP(6, 4, 10)
    reference = torch.nn.Sequential(head.net[0], torch.nn.BatchNorm1d(10), torch.nn.ReLU(), head.net[3])
    gradients = []
    for module, order in ((head, lambda x: x), (reference, lambda x: x.transpose(1, 2))):
        torch.manual_seed(1)
        first, second = order(torch.randn(2, 7, 6)), order(torch.randn(2, 7, 6))
        module.zero_grad()
        (module(first).square().sum() + module(second).square().sum()).backward()
        gradients.append(head.net[0].weight.grad.clone())
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def test_sew_pre_trains_on_a_batch(tiny):
    model = tiny.sew(**STOCHASTIC).train()
    source, _ = tiny.audio(SAMPLES, SAMPLES, SAMPLES)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for update in range(3):
        model.set_num_updates(update)
        optimizer.zero_grad()
        loss_of(model, source, tiny.mask(3, FRAMES)).backward()
        optimizer.step()
    after = model.state_dict()
    for name in ("final_proj.net.0.weight", "project_q.net.3.weight", "final_proj.net.1.running_mean"):
        assert not torch.equal(before[name], after[name]), name
    model.eval()
    assert loss_of(model, source, tiny.mask(3, FRAMES)).isfinite()
