"""Linear CKA against its definition, and what layers make of their input against running them by hand."""

import math

import pytest
import torch
from tiny_checkpoints import SEW, SHARED, STOCHASTIC, STREAMING, finetuned, pretrained, random_audio

from fairseq_w2v2_light.export.folder import export_folder
from fairseq_w2v2_light.nn.backbone import Backbone
from fairseq_w2v2_light.nn.config import EncoderConfig
from fairseq_w2v2_light.nn.operating_point import OperatingPoint, OperatingPointSpace
from fairseq_w2v2_light.study.stability import (
    Changes,
    CrossCovariances,
    StudiedModel,
    as_record,
    format_stability,
    layer_states,
    linear_cka,
    load_model,
    noise,
    stability,
)

CONFIG = dict(
    conv_layers=((16, 10, 5), (16, 3, 2), (16, 2, 2)),
    extractor_norm="layer",
    dim=16,
    ffn_dim=24,
    heads=2,
    norm_first=True,
    conv_pos=4,
    conv_pos_groups=2,
    layer_map=(0, 1, 0),
)


def values(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(**changes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = Backbone(EncoderConfig(**{**CONFIG, **changes})).eval()
        for parameter in backbone.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return backbone.requires_grad_(False)


def studied(backbone, point="s1q1k1"):
    return StudiedModel("a", backbone, OperatingPoint.parse(point))


def some_audio(sample_rate):
    return [random_audio(samples, seed=samples)[0] for samples in (900, 400, 10, 1300)]


# ---- CKA


def cka_by_gram_matrices(x, y):
    """Equations 1 to 3 of arXiv 1905.00414 with linear kernels: HSIC of n x n matrices."""
    centre = torch.eye(len(x), dtype=x.dtype) - 1 / len(x)

    def hsic(one, other):
        return (one @ one.T @ centre @ other @ other.T @ centre).trace() / (len(x) - 1) ** 2

    return float(hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt())


def test_cka_equals_its_definition_with_gram_matrices():
    x = values(40, 7) + 3
    y = torch.tanh(x @ values(7, 5, seed=1)) - 1
    assert linear_cka(x, y) == pytest.approx(cka_by_gram_matrices(x, y), abs=1e-12)
    assert 0.2 < linear_cka(x, y) < 0.98


def test_cka_does_not_see_rotations_scales_and_shifts_but_other_linear_maps():
    x, y = values(60, 8), values(60, 8) + values(60, 8, seed=1)
    rotation = torch.linalg.qr(values(8, 8, seed=2))[0]
    stretch = torch.diag(torch.tensor([30.0, 1, 1, 1, 1, 1, 1, 1], dtype=torch.float64))
    before = linear_cka(x, y)
    assert linear_cka(x @ rotation, y) == pytest.approx(before, abs=1e-12)
    assert linear_cka(1e-3 * x, 50 * y + 7) == pytest.approx(before, abs=1e-12)
    assert linear_cka(y, x) == pytest.approx(before, abs=1e-12)
    assert abs(linear_cka(x @ stretch, y) - before) > 0.1


def test_cka_of_the_same_is_one_and_of_independent_ones_small():
    x = values(5000, 6)
    assert linear_cka(x, x) == 1.0
    assert linear_cka(x, values(5000, 6, seed=1)) < 0.01


def test_cka_of_pieces_is_that_of_the_whole_far_from_zero_too():
    x, y = values(90, 5).float() + 1000, values(90, 4, seed=1).float()
    y[:, 0] += x[:, 0] - 1000
    sums = CrossCovariances([(0, 0), (1, 1), (0, 1)])
    for start, end in ((0, 1), (1, 30), (30, 30), (30, 90)):
        sums.add([x[start:end], y[start:end]])
    found = sums.strengths()
    value = found[0, 1] / math.sqrt(found[0, 0] * found[1, 1])
    assert value == pytest.approx(cka_by_gram_matrices((x - 1000).double(), y.double()), abs=1e-6)
    assert sums.frames == 90


def test_cka_of_a_constant_is_undefined():
    x = values(30, 4)
    constant = torch.full((30, 3), 0.1)
    rounded = constant + 1e-8 * values(30, 3).float()
    for other in (constant, torch.zeros(30, 3), rounded):
        assert math.isnan(linear_cka(x, other)) and math.isnan(linear_cka(other, other))
    assert math.isnan(linear_cka(x[:1], x[:1])) and math.isnan(linear_cka(x[:0], x[:0]))


def test_cka_of_small_numbers_is_that_of_large_ones():
    x, y = values(30, 4), values(30, 4) + values(30, 4, seed=1)
    assert linear_cka(1e-15 * x, 1e12 * y) == pytest.approx(linear_cka(x, y), abs=1e-12)


def test_unequal_numbers_of_frames_are_refused():
    with pytest.raises(ValueError, match=r"found \[3, 4\] frames"):
        linear_cka(values(3, 2), values(4, 2))


# ---- changes


def test_means_of_changes():
    before = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]])
    after = torch.tensor([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]])
    changes = Changes()
    changes.add([before[:1], after[:1]])
    changes.add([before[1:], after[1:]])
    # the frame of zeros has no direction
    assert changes.mean("cosine", 0) == pytest.approx(0.5)
    assert changes.mean("relative_change", 0) == pytest.approx((0 + math.sqrt(5)) / 2)
    assert changes.mean("distance", 0) == pytest.approx((0 + math.sqrt(5) + 1) / 3)
    zeros = Changes()
    zeros.add([torch.zeros(2, 3), torch.ones(2, 3)])
    assert math.isnan(zeros.mean("cosine", 0)) and math.isnan(zeros.mean("relative_change", 0))


# ---- states


@pytest.mark.parametrize("norm_first", [True, False])
def test_states_are_what_enters_and_leaves_each_layer(norm_first):
    backbone = network(norm_first=norm_first)
    wave, _ = random_audio(700)
    states = layer_states(backbone, wave, OperatingPoint())
    assert len(states) == 4 and {state.shape for state in states} == {states[0].shape}
    x = backbone.project(backbone.normalise(backbone.features(wave)[0]))
    x = x + backbone.encoder.pos_conv(x)
    x = x if norm_first else backbone.encoder.norm(x)
    for state, stored in zip(states, (0, 1, 0)):
        torch.testing.assert_close(state, x[0])
        x = backbone.encoder.layers[stored](x).x
    torch.testing.assert_close(states[-1], x[0])


@pytest.mark.parametrize("point, changes", [("s1q1k1", {}), ("s2q2k1", {}), ("s2q1k1", {"squeeze_tail": "drop"})])
def test_only_valid_frames_count(point, changes):
    space = OperatingPointSpace((1, 2), (1, 2), (1, 2), 3)
    backbone = network(operating_points=space, unsqueeze_factor=2, **changes)
    point = OperatingPoint.parse(point)
    wave, _ = random_audio(900, 400, 650)
    batch = layer_states(backbone, wave, point, torch.tensor([900, 400, 650]))
    alone = [layer_states(backbone, wave[row : row + 1, :size], point) for row, size in enumerate((900, 400, 650))]
    for state, *parts in zip(batch, *alone):
        torch.testing.assert_close(state, torch.cat(parts), atol=1e-5, rtol=1e-5)


def test_frames_of_a_stream_without_the_copies_of_its_look_ahead(tmp_path):
    model = load_model(pretrained(tmp_path / "a.pt", layout="large", **STREAMING))
    assert model.point.chunk == 4
    states = layer_states(model.backbone, random_audio(900)[0], model.point)
    frames = model.backbone.config.frames(900)
    assert [len(state) for state in states] == [frames] * 4


# ---- models


def test_a_result_says_what_its_layers_do():
    backbone = network()
    result = stability(studied(backbone), some_audio)
    states = [
        torch.cat(parts)
        for parts in zip(*(layer_states(backbone, w, OperatingPoint()) for w in some_audio(0) if w.size(1) > 100))
    ]
    assert result.frames == len(states[0]) and result.seconds == 2600 / 16000
    assert [layer.stored for layer in result.layers] == [0, 1, 0]
    assert (result.unique_layers, result.attention_maps, result.norm) == (2, 3, "pre-LN")
    for one in range(4):
        for other in range(4):
            assert result.matrix[one][other] == pytest.approx(linear_cka(states[one], states[other]), abs=1e-9)
    for layer, before, after in zip(result.layers, states, states[1:]):
        assert layer.cka == result.matrix[layer.depth][layer.depth + 1]
        assert layer.cosine == pytest.approx(float(torch.cosine_similarity(before, after).mean()), abs=1e-5)
        assert layer.distance == pytest.approx(float((after - before).norm(dim=1).mean()), rel=1e-5)
    assert result.mean("cosine") == pytest.approx(sum(layer.cosine for layer in result.layers) / 3)


def test_little_memory_hears_the_audio_more_often_and_finds_the_same():
    heard = []

    def waves(rate):
        heard.append(rate)
        return some_audio(rate)

    model = studied(network())
    whole, parts = stability(model, waves), stability(model, waves, memory=3 * 8 * 16 * 16)
    assert len(heard) == 1 + 4
    assert as_record(whole) == as_record(parts)


def test_a_layer_that_pruning_emptied_changes_nothing():
    backbone = network(layer_heads=(2, 0), layer_ffn=(24, 0), head_dim=8)
    result = stability(studied(backbone), some_audio)
    empty = result.layers[1]
    assert (empty.cka, empty.relative_change, empty.distance) == (1.0, 0.0, 0.0)
    assert empty.cosine == pytest.approx(1, abs=1e-9)
    assert result.layers[0].relative_change > 0.01


def test_what_is_undefined_is_said():
    """A post-LN network whose norms give their bias alone."""
    backbone = network(norm_first=False)
    backbone.encoder.layer_norm.weight.zero_()
    result = stability(studied(backbone), some_audio)
    assert math.isnan(result.layers[0].cka) and math.isnan(result.matrix[0][0])
    assert as_record(result)["layers"][0]["cka"] is None and as_record(result)["matrix"][0][0] is None
    assert "undefined" in format_stability([result], "noise")


def test_outputs_and_audio_that_cannot_be_compared():
    backbone = network()
    with pytest.raises(ValueError, match="a: none of the audio is long enough"):
        stability(studied(backbone), lambda rate: [torch.zeros(1, 20)])
    backbone.encoder.layers[0].fc2.bias.fill_(float("inf"))
    with pytest.raises(ValueError, match="a: gives NaN or infinite outputs"):
        stability(studied(backbone), some_audio)


def test_noise_is_always_the_same():
    one, other = list(noise(1000)), list(noise(1000))
    assert all(torch.equal(*pair) for pair in zip(one, other)) and [wave.shape for wave in one] == [(1, 10000)] * 5
    assert not torch.equal(one[0], one[1])


@pytest.mark.parametrize(
    "keys",
    [
        dict(layout="base"),
        dict(layout="large", **SHARED),
        dict(layout="large", ctc="wav2vec_ctc"),
        dict(name="stochastic_sew", **SEW, ctc_keys={"operating_point": "s2q1k2"}),
    ],
)
def test_a_checkpoint_and_its_folder_are_as_stable(tmp_path, keys):
    path = finetuned(tmp_path, **keys)
    export_folder(path, tmp_path / "folder")
    one, other = (load_model(str(source), name="a") for source in (path, tmp_path / "folder"))
    assert one.trained and not one.normalizes
    assert as_record(stability(one, some_audio)) == as_record(stability(other, some_audio))
    assert str(one.point) == (keys.get("ctc_keys") or {}).get("operating_point", "s1q1k1")


def test_an_int8_folder_is_nearly_as_stable(tmp_path):
    path = finetuned(tmp_path, layout="large")
    export_folder(path, tmp_path / "folder", dtype="int8")
    one, other = (stability(load_model(str(source)), some_audio) for source in (path, tmp_path / "folder"))
    assert one.mean("cosine") == pytest.approx(other.mean("cosine"), abs=0.01)
    assert one.mean("cosine") != other.mean("cosine")


@pytest.mark.parametrize("name", ["wav2vec2", "w2v2_light"])
def test_pre_training_checkpoints(tmp_path, name):
    keys = STOCHASTIC if name == "w2v2_light" else {}
    path = pretrained(tmp_path / "a.pt", name=name, layout="base", **keys)
    result = stability(load_model(path, point="s2q2k1" if keys else ""), some_audio)
    assert (len(result.layers), result.norm) == (3, "post-LN")
    assert result.operating_point == ("s2q2k1" if keys else "s1q1k1")
    assert all(0 < layer.cka <= 1 for layer in result.layers)


def test_a_model_that_normalizes_hears_quiet_audio_as_loud(tmp_path):
    path = pretrained(tmp_path / "a.pt", layout="large")
    state = torch.load(path, weights_only=False)
    state["cfg"]["task"]["normalize"] = True
    torch.save(state, path)
    model = load_model(path)
    assert model.normalizes
    loud, quiet = (stability(model, lambda rate, scale=scale: [scale * random_audio(900)[0]]) for scale in (1, 0.5))
    assert loud.mean("distance") == pytest.approx(quiet.mean("distance"), rel=1e-3)


def test_a_recipe_has_random_weights_that_are_always_the_same():
    before = torch.random.get_rng_state()
    one, other = (load_model("pretraining/light_stochastic_tiny", ["model.unique_layers=2"]) for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert not one.trained and one.backbone.config.unique_layers == 2
    assert all(torch.equal(*pair) for pair in zip(one.backbone.parameters(), other.backbone.parameters()))


def test_models_that_cannot_be_studied(tmp_path):
    path = pretrained(tmp_path / "a.pt")
    with pytest.raises(ValueError, match="a.pt': its weights fit the network that it has; leave out model.x=1"):
        load_model(path, ["model.x=1"])
    with pytest.raises(ValueError, match="a.pt: .*not trained with squeeze factor 9"):
        load_model(path, point="s9q1k1")
    with pytest.raises(ValueError, match="light_stochastic_tiny: .*not trained with squeeze factor 9"):
        load_model("pretraining/light_stochastic_tiny", point="s9q1k1")
    with pytest.raises(FileNotFoundError, match="recipe 'nothing': no such file or name"):
        load_model("nothing")
    state = torch.load(path, weights_only=False)
    state["model"]["encoder.layer_norm.weight"][0] = float("nan")
    torch.save(state, tmp_path / "nan.pt")
    with pytest.raises(ValueError, match="nan.pt: parameter 'encoder.layer_norm.weight' has NaN"):
        load_model(str(tmp_path / "nan.pt"))
