"""Students of pruned teachers, whose layers are unequal."""

import pytest
import torch
from fairseq import checkpoint_utils
from tiny_checkpoints import LAYOUTS, ctc_model

from fairseq_w2v2_light.compress.student import StudentSpec, make_student
from fairseq_w2v2_light.models.checkpoint import load_encoder
from fairseq_w2v2_light.models.w2v2_light import network_config

SHARED = dict(unique_layers=3, attention_map_every=2)


@pytest.fixture(scope="module")
def pruned(make, tmp_path_factory):
    """Paths of pruned CTC checkpoints of six layers."""
    folder = tmp_path_factory.mktemp("pruned")
    return {
        "base": make.pruned(folder / "base.pt"),
        "large": make.pruned(folder / "large.pt", **LAYOUTS["large"]),
        "shared": make.pruned(folder / "shared.pt", **LAYOUTS["large"], **SHARED),
    }


@pytest.fixture(params=("base", "large", "shared"))
def teacher(request, pruned):
    return pruned[request.param]


def encoder(path):
    """The network's configuration and the weights."""
    start = load_encoder(path)
    return network_config(start.cfg.model), start.model


def logits(path):
    (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([str(path)])
    source = torch.randn(2, 900, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(source=source, padding_mask=None)["encoder_out"]


def layers_of(weights, index):
    prefix = f"encoder.layers.{index}."
    return {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_teachers_are_unequal(pruned):
    for path in pruned.values():
        config, _ = encoder(path)
        assert len(set(config.layer_ffn)) > 1 and config.head_dim == 8 and config.norm_dim == 32 > config.dim
    assert len(set(encoder(pruned["base"])[0].layer_heads)) > 1


def test_a_student_with_all_layers_is_its_teacher(teacher, tmp_path):
    report = make_student(teacher, tmp_path / "student.pt", StudentSpec(layers="every:1"))
    assert all(new == 0 for _, _, new, _ in report.parts.values())
    assert torch.equal(logits(tmp_path / "student.pt"), logits(teacher))


@pytest.mark.parametrize("layers, depths", [("every:2", (0, 2, 4)), ("5,1", (5, 1))])
def test_the_layers_that_are_copied_keep_their_shapes(pruned, tmp_path, layers, depths):
    report = make_student(pruned["base"], tmp_path / "student.pt", StudentSpec(layers=layers))
    (source, weights), (found, copied) = encoder(pruned["base"]), encoder(tmp_path / "student.pt")
    assert found.layer_heads == tuple(source.layer_heads[depth] for depth in depths)
    assert found.layer_ffn == tuple(source.layer_ffn[depth] for depth in depths)
    assert all(equal(layers_of(copied, index), layers_of(weights, depth)) for index, depth in enumerate(depths))
    assert all(new == 0 for _, _, new, _ in report.parts.values())
    logits(tmp_path / "student.pt")


def test_depths_of_a_shared_teacher(pruned, tmp_path):
    """3 stored layers serve 6 depths: 0-1, 2-3 and 4-5."""
    make_student(pruned["shared"], tmp_path / "student.pt", StudentSpec(layers="4,5,2,3"))
    (source, weights), (found, copied) = encoder(pruned["shared"]), encoder(tmp_path / "student.pt")
    for index, stored in enumerate((2, 2, 1, 1)):
        assert (found.heads_of(index), found.ffn_of(index)) == (source.heads_of(stored), source.ffn_of(stored))
        assert equal(layers_of(copied, index), layers_of(weights, stored))


@pytest.mark.parametrize("spec", [dict(unique_layers=2), dict(overrides={"layer_map": "0,1,1,0"})])
def test_a_shared_student(pruned, tmp_path, spec):
    """The shapes are those of its stored layers."""
    make_student(pruned["base"], tmp_path / "student.pt", StudentSpec(layers="4,1", layers_n=4, **spec))
    (source, weights), (found, copied) = encoder(pruned["base"]), encoder(tmp_path / "student.pt")
    assert found.layer_ffn == (source.layer_ffn[4], source.layer_ffn[1])
    assert equal(layers_of(copied, 0), layers_of(weights, 4)) and not layers_of(copied, 2)


def test_further_layers_are_as_before_pruning(pruned, tmp_path):
    make_student(pruned["base"], tmp_path / "student.pt", StudentSpec(layers="4,1", layers_n=3))
    (source, weights), (found, copied) = encoder(pruned["base"]), encoder(tmp_path / "student.pt")
    assert found.layer_heads == (source.layer_heads[4], source.layer_heads[1], 4)
    assert found.layer_ffn == (source.layer_ffn[4], source.layer_ffn[1], 48)
    assert equal(layers_of(copied, 1), layers_of(weights, 1))


def test_another_ffn(pruned, tmp_path):
    make_student(pruned["base"], tmp_path / "student.pt", StudentSpec(layers="every:2", ffn=24))
    (source, weights), (found, copied) = encoder(pruned["base"]), encoder(tmp_path / "student.pt")
    assert (found.ffn_dim, found.layer_ffn, found.layer_heads) == (24, (), source.layer_heads[::2])
    name = "encoder.layers.{}.self_attn.q_proj.weight"
    assert torch.equal(copied[name.format(1)], weights[name.format(2)])
    assert copied["encoder.layers.1.fc1.weight"].shape == (24, source.dim)


def test_other_heads_start_with_new_attention(pruned, tmp_path):
    """Even where as many channels are attended to."""
    (source, weights) = encoder(pruned["base"])
    channels = source.layer_heads[0] * 8
    overrides = {"head_dim": str(channels)}
    make_student(pruned["base"], tmp_path / "student.pt", StudentSpec(layers="0", heads=1, overrides=overrides))
    found, copied = encoder(tmp_path / "student.pt")
    assert (found.heads, found.layer_heads, found.head_dim, found.layer_ffn) == (1, (), channels, source.layer_ffn[:1])
    name = "encoder.layers.0.self_attn.q_proj.weight"
    assert copied[name].shape == weights[name].shape and not torch.equal(copied[name], weights[name])
    assert torch.equal(copied["encoder.layers.0.fc1.weight"], weights["encoder.layers.0.fc1.weight"])


def test_another_width_starts_anew(pruned, tmp_path):
    spec = StudentSpec(width=16, ffn=24, heads=2, layers_n=2, overrides={"conv_pos_groups": "4"})
    report = make_student(pruned["base"], tmp_path / "student.pt", spec)
    found, _ = encoder(tmp_path / "student.pt")
    assert (found.dim, found.ffn_dim, found.heads, found.head_size) == (16, 24, 2, 8)
    assert not any((found.layer_heads, found.layer_ffn, found.head_dim, found.norm_dim, found.conv_pos_group_dims))
    assert report.parts["frontend"][2] == 0
    logits(tmp_path / "student.pt")


def test_another_frontend_starts_anew(pruned, tmp_path):
    overrides = {"conv_feature_layers": "[(14, 10, 5), (14, 3, 2), (14, 2, 2)]"}
    make_student(pruned["large"], tmp_path / "student.pt", StudentSpec(layers="0", overrides=overrides))
    assert encoder(tmp_path / "student.pt")[0].conv_norm_dims == ()


def test_overrides_win(pruned, tmp_path):
    overrides = {"layer_heads": "[1,2]", "layer_ffn": "[0,8]", "head_dim": "4", "norm_dim": "0"}
    make_student(pruned["base"], tmp_path / "student.pt", StudentSpec(layers="0,1", heads=3, overrides=overrides))
    found, _ = encoder(tmp_path / "student.pt")
    assert (found.layer_heads, found.layer_ffn, found.head_dim, found.norm_dim) == ((1, 2), (0, 8), 4, 0)


def test_a_streaming_student(pruned, tmp_path):
    """The same as a model that was made to stream by fine-tuning."""
    spec = StudentSpec(layers="every:1", overrides={"chunk_frames": "[4]", "left_context_frames": "8"})
    make_student(pruned["large"], tmp_path / "student.pt", spec)
    trained = ctc_model(pruned["large"], chunk_frames=[4], left_context_frames=8)
    (student,), _, _ = checkpoint_utils.load_model_ensemble_and_task([str(tmp_path / "student.pt")])
    assert equal(trained.state_dict(), student.state_dict())
    assert trained.w2v_encoder.w2v_model.config == student.w2v_encoder.w2v_model.config


def test_heads_that_do_not_divide_the_width(pruned, tmp_path):
    width = encoder(pruned["base"])[0].dim
    spec = StudentSpec(layers="0", heads=width - 1)
    message = f"--width {width} is not divisible by {width - 1} attention heads; set --heads .* model.head_dim .*have 8"
    with pytest.raises(ValueError, match=message):
        make_student(pruned["base"], tmp_path / "student.pt", spec)


def test_layers_with_unequal_heads_that_are_to_share_attention_maps(pruned, tmp_path):
    heads = encoder(pruned["base"])[0].layer_heads
    first, second = next((a, b) for a in range(6) for b in range(6) if heads[a] != heads[b])
    overrides = {"attention_map_every": "2"}
    message = rf"--layers '{first},{second}': the student's layers 0, 1 share attention maps .*or give --heads"
    with pytest.raises(ValueError, match=message):
        spec = StudentSpec(layers=f"{first},{second}", overrides=overrides)
        make_student(pruned["base"], tmp_path / "student.pt", spec)
    spec = StudentSpec(layers=f"{first},{second}", heads=1, overrides=overrides)
    make_student(pruned["base"], tmp_path / "student.pt", spec)
