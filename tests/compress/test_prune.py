"""Physical pruning: the smaller model computes what the gated one does, and is an ordinary checkpoint."""

from types import SimpleNamespace

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.criterions import build_criterion
from omegaconf import OmegaConf
from tiny_checkpoints import (
    LAYOUTS,
    SHAPE,
    container,
    ctc_model,
    letters,
    perturb,
    random_audio,
    save_checkpoint,
    save_ctc,
)

from fairseq_w2v2_light.compress.prune import kept_units, prune_checkpoint, prune_weights
from fairseq_w2v2_light.criterions.light_prune import LightPruneConfig
from fairseq_w2v2_light.models import StochasticSEWConfig, StochasticSEWModel, W2V2LightConfig, W2V2LightModel
from fairseq_w2v2_light.models.checkpoint import load_encoder
from fairseq_w2v2_light.nn.config import PRUNE_UNITS
from fairseq_w2v2_light.nn.counts import count_parameters
from fairseq_w2v2_light.nn.streaming import Stream
from fairseq_w2v2_light.runtime.load import load_ctc
from fairseq_w2v2_light.study.cost import cost, load_subject

QUIET = dict(dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, encoder_layerdrop=0.0, feature_grad_mult=1.0)
TINY = {**SHAPE, **QUIET, "prune_units": list(PRUNE_UNITS)}
SEW = {**TINY, "projection_hidden_dim": 24, "conv_pos": 7}
OPEN, CLOSED = 20.0, -20.0


def set_gates(model, seed=0):
    """Gates that are closed, open, and in between."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.gates.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 3


def gated(layout="base", kind="w2v2_light", **changes):
    """A model with random weights (norms and biases too) and gates."""
    torch.manual_seed(0)
    if kind == "w2v2_light":
        model = W2V2LightModel(W2V2LightConfig(**{**TINY, **LAYOUTS[layout], **changes}))
    else:
        model = StochasticSEWModel(StochasticSEWConfig(**{**SEW, **LAYOUTS[layout], **changes}))
    perturb(model, torch.Generator().manual_seed(0))
    set_gates(model)
    return model.eval()


def kept_of(model):
    return kept_units(model.config, model.gates.decided())


def pruned(model):
    """The smaller model, loaded strictly."""
    weights, changes = prune_weights(model.state_dict(), model.config, kept_of(model))
    small = type(model)(OmegaConf.merge(OmegaConf.structured(model.cfg), {**changes, "operating_point_seed": 7}))
    small.load_state_dict(weights, strict=True)
    return small.eval()


def assert_same_frames(model, small, point=None, audio=None, tolerance=1e-5):
    """On a padded batch; what the smaller one has no channel for is zero."""
    source, padding = random_audio(1000, 777, 650) if audio is None else audio
    with torch.no_grad():
        expected = model.extract_features(source, padding, operating_point=point)
        found = small.extract_features(source, padding, operating_point=point)
    index = kept_of(model).hidden.index
    torch.testing.assert_close(found["x"], expected["x"][..., index], atol=tolerance, rtol=1e-5)
    closed = [channel for channel in range(model.config.dim) if channel not in index]
    assert not expected["x"][..., closed].any()
    for ours, theirs in zip(found["layer_results"], expected["layer_results"]):
        torch.testing.assert_close(ours[0], theirs[0][..., index], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours[2], theirs[2][..., index], atol=1e-5, rtol=1e-5)


# the same outputs


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("units", [*((unit,) for unit in PRUNE_UNITS), PRUNE_UNITS], ids="-".join)
def test_pruned_is_masked(layout, units):
    model = gated(layout, prune_units=list(units))
    small = pruned(model)
    gates = [gate.decided() for gate in model.gates.modules() if hasattr(gate, "decided") and gate is not model.gates]
    assert any(((gate > 0) & (gate < 1)).any() for gate in gates) and any((gate == 0).any() for gate in gates)
    assert small.gates is None and count(small) < count(model) - count(model.gates)
    assert_same_frames(model, small)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_without_padding_too():
    model = gated()
    assert_same_frames(model, pruned(model), audio=random_audio(1000, 1000))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tail", ("keep", "drop"))
def test_shared_layers_and_maps_at_squeezed_and_pooled_points(layout, tail):
    shared = dict(encoder_layers=4, unique_layers=2, layer_map="cycle", attention_map_every=2)
    points = dict(squeeze_factors=[1, 2, 4], query_pools=[1, 2], kv_pools=[1, 2], squeeze_tail=tail)
    model = gated(layout, **shared, **points)
    small = pruned(model)
    assert small.config.layer_heads[0] == small.config.layer_heads[1] < 4
    for point in ("s1q1k1", "s1q2k1", "s2q1k2", "s4q2k2"):
        assert_same_frames(model, small, point)


def test_streaming_chunk_by_chunk():
    model = gated("large", chunk_frames=[4], left_context_frames=8, lookahead_frames=2)
    small = pruned(model)
    assert_same_frames(model, small)
    wave = random_audio(20 * 14)[0]
    outputs = []
    for backbone in (model, small):
        stream = Stream(backbone)
        first = stream.samples_needed(stream.start())
        chunk, state = stream.step(wave[:, :first], stream.start())
        outputs.append(torch.cat([chunk, stream.finish(wave[:, first:], state)], dim=1))
    assert outputs[0].shape[:2] == (1, 14)
    torch.testing.assert_close(outputs[1], outputs[0][..., kept_of(model).hidden.index], atol=1e-5, rtol=1e-5)


def contrast(model, mask):
    """The logits of pre-training, with the same negatives in every call."""
    torch.manual_seed(3)
    source, padding = random_audio(1000, 900)
    with torch.no_grad():
        return model(source, padding, mask_indices=mask)


@pytest.mark.parametrize("kind", ("w2v2_light", "stochastic_sew"))
@pytest.mark.parametrize(
    "changes",
    [dict(), dict(quantize_targets=False), dict(target_glu=True), dict(codebook_negatives=2), dict(conv_bias=True)],
    ids=str,
)
def test_pre_training_predicts_the_same(kind, changes):
    model = gated(kind=kind, **changes)
    small = pruned(model)
    frames = model.config.frames(1000)
    mask = torch.zeros(2, frames, dtype=torch.bool)
    mask[:, 3:11] = True
    expected, found = contrast(model, mask), contrast(small, mask)
    torch.testing.assert_close(found["x"], expected["x"], atol=1e-5, rtol=1e-5)
    if model.quantizer is not None:
        torch.testing.assert_close(found["prob_perplexity"], expected["prob_perplexity"])


# single parts


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("units", (["conv"], ["conv", "hidden"], ["heads", "ffn"], PRUNE_UNITS), ids="-".join)
def test_a_model_without_projection_needs_none(layout, units):
    model = gated(layout, encoder_embed_dim=16, prune_units=list(units))
    small = pruned(model)
    assert model.post_extract_proj is None and small.post_extract_proj is None
    assert (small.config.dim < 16) == ("hidden" in units)
    assert_same_frames(model, small)


@pytest.mark.parametrize("channels", (9, 1, 0))
def test_one_gets_a_projection_where_the_frontend_stays_wider(channels):
    model = gated(encoder_embed_dim=16, prune_units=["hidden"])
    model.gates.hidden.log_alpha.data[channels:] = CLOSED
    small = pruned(model)
    assert tuple(small.post_extract_proj.weight.shape) == (small.config.dim, 16)
    assert small.config.dim <= max(channels, 1) and small.config.features_dim == 16
    assert_same_frames(model, small)


@pytest.mark.parametrize("channels", (1, 0))
def test_few_channels_without_projection(channels):
    model = gated(encoder_embed_dim=16)
    open_first(model.gates.hidden, channels)
    small = pruned(model)
    assert small.config.dim == small.config.features_dim == 1
    assert_same_frames(model, small)


def test_masked_frames_without_projection():
    """The mask's vector has no gate before the encoder."""
    model = gated(encoder_embed_dim=16)
    small = pruned(model)
    mask = torch.zeros(2, model.config.frames(1000), dtype=torch.bool)
    mask[:, 3:11] = True
    torch.testing.assert_close(contrast(small, mask)["x"], contrast(model, mask)["x"], atol=1e-5, rtol=1e-5)


def open_first(gate, count):
    gate.log_alpha.data = torch.full_like(gate.log_alpha, CLOSED)
    gate.log_alpha.data[:count] = OPEN


def test_a_projection_stays_where_both_widths_happen_to_agree():
    model = gated()
    open_first(model.gates.conv["2"], 10)
    open_first(model.gates.hidden, 10)
    small = pruned(model)
    assert small.config.features_dim == small.config.dim == 10 and small.config.project_features
    assert_same_frames(model, small)


@pytest.mark.parametrize("layout, norms", [("base", 2), ("large", 0)])
def test_a_layer_that_loses_everything_is_passed_by(layout, norms):
    """Post-LN keeps its norms, which change what passes."""
    model = gated(layout)
    open_first(model.gates.heads["1"], 0)
    open_first(model.gates.ffn["1"], 0)
    small = pruned(model)
    assert small.config.layer_heads[1] == small.config.layer_ffn[1] == 0
    names = {name.split(".")[0] for name in small.encoder.layers[1].state_dict()}
    assert len(names) == norms and all(name.endswith("layer_norm") for name in names)
    assert_same_frames(model, small)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block", ("heads", "ffn"))
def test_blocks_go_one_by_one(layout, block):
    model = gated(layout)
    open_first(getattr(model.gates, block)["0"], 0)
    assert_same_frames(model, pruned(model))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("layer", range(3))
@pytest.mark.parametrize("channels", (1, 0))
def test_a_frontend_layer_keeps_one_channel_at_least(layout, layer, channels):
    model = gated(layout, conv_bias=True)
    open_first(model.gates.conv[str(layer)], channels)
    # a LayerNorm makes 300 times of a lone channel near zero, of its rounding errors, too
    model.feature_extractor.conv_layers[layer][0].bias.data[0] = 5.0
    small = pruned(model)
    assert small.config.conv_layers[layer][0] == 1
    assert_same_frames(model, small)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", (3, 1, 0))
def test_few_hidden_channels(layout, channels):
    model = gated(layout, squeeze_factors=[1, 2])
    open_first(model.gates.hidden, channels)
    small = pruned(model)
    assert small.config.dim == max(channels, 1) and small.config.norm_dim == 32 and small.config.head_size == 8
    # channels of the first of four groups of the positional convolution
    assert small.config.conv_pos_groups == 1 and small.config.conv_pos_group_dims == ()
    # the last LayerNorm enlarges rounding errors of so few channels; they are 1e-5 of the largest value, which is 6
    for point in ("s1q1k1", "s2q1k1"):
        assert_same_frames(model, small, point, tolerance=3e-5)


def test_groups_of_positions_are_padded_to_the_largest():
    model = gated()
    model.gates.hidden.log_alpha.data = torch.full((32,), CLOSED)
    model.gates.hidden.log_alpha.data[[0, 1, 2, 17, 24, 30]] = OPEN
    small = pruned(model)
    assert small.config.conv_pos_group_dims == (3, 1, 2)
    assert small.encoder.pos_conv[0].weight_v.shape[:2] == (9, 3)
    assert_same_frames(model, small)


def test_what_has_no_gates_stays_bit_by_bit():
    model = gated(prune_units=["heads"])
    weights, changes = prune_weights(model.state_dict(), model.config, kept_of(model))
    assert set(changes) == {"prune_units", "project_features", "layer_heads"}
    same = [name for name, value in model.state_dict().items() if "self_attn." not in name and "gates." not in name]
    assert same and all(torch.equal(weights[name], model.state_dict()[name]) for name in same)


def test_open_gates_remove_nothing():
    model = gated()
    for parameter in model.gates.parameters():
        parameter.data = torch.full_like(parameter, OPEN)
    weights, changes = prune_weights(model.state_dict(), model.config, kept_of(model))
    assert changes == {"prune_units": [], "project_features": False}
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in weights.items())


def test_a_deep_quantiser_cannot_lose_features():
    model = gated(quantizer_depth=2)
    with pytest.raises(ValueError, match="model.quantizer_depth: found more than 1"):
        pruned(model)
    model = gated(quantizer_depth=2, prune_units=["heads", "ffn", "hidden"])
    assert_same_frames(model, pruned(model))


# further training


@pytest.mark.parametrize("kind", ("w2v2_light", "stochastic_sew"))
def test_every_parameter_of_the_result_trains(kind):
    small = pruned(gated(kind=kind)).train()
    optimizer = torch.optim.Adam(small.parameters(), lr=1e-3)
    source, padding = random_audio(1000, 900)
    for _ in range(2):
        optimizer.zero_grad()
        small(source, padding)["x"].float().logsumexp(0).sum().backward()
        optimizer.step()
    assert all(parameter.grad is not None for parameter in small.parameters())
    for name, parameter in small.named_parameters():
        assert torch.isfinite(parameter).all(), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_pruned_model_can_be_pruned_again(layout):
    once = pruned(gated(layout, encoder_embed_dim=48, conv_pos_groups=4))
    again = W2V2LightModel(OmegaConf.merge(once.cfg, {"prune_units": list(PRUNE_UNITS)}))
    state = once.state_dict()
    again.upgrade_state_dict_named(state, "")
    again.load_state_dict(state, strict=True)
    assert_same_frames(again.eval(), once)
    set_gates(again, seed=1)
    twice = pruned(again)
    assert twice.config.norm_dim == 48 and twice.config.conv_norm_dims == (16, 16, 16)
    assert twice.config.dim < once.config.dim < 48
    assert_same_frames(again, twice)


# checkpoints


def save_gated(path, kind="w2v2_light", **changes):
    """A pre-training checkpoint with gates."""
    model = gated(kind=kind, **changes)
    return save_checkpoint(path, container(model.cfg, kind), model.state_dict())


def save_gated_ctc(path, start, name="light_ctc", **keys):
    """A CTC checkpoint around the gated checkpoint `start`, as trained by fairseq."""
    torch.manual_seed(1)
    model = ctc_model(start, name, feature_grad_mult=1.0, **keys)
    task = {"_name": "audio_finetuning", "labels": "ltr"}
    return save_ctc(path, model, task, letters())


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Gated checkpoints, and what is left of each."""
    folder = tmp_path_factory.mktemp("gated")
    gated_paths = SimpleNamespace(
        light=save_gated(folder / "light.pt"),
        sew=save_gated(folder / "sew.pt", "stochastic_sew", final_dim=0),
    )
    gated_paths.light_ctc = save_gated_ctc(folder / "light_ctc.pt", gated_paths.light)
    gated_paths.wav2vec_ctc = save_gated_ctc(folder / "wav2vec_ctc.pt", gated_paths.light, "wav2vec_ctc")
    gated_paths.with_heads = save_gated_ctc(folder / "heads.pt", gated_paths.light, keep_pretraining_heads=True)
    kinds = dict(vars(gated_paths))
    gated_paths.small = {kind: str(folder / f"small_{kind}.pt") for kind in kinds}
    gated_paths.reports = {kind: prune_checkpoint(path, gated_paths.small[kind]) for kind, path in kinds.items()}
    return gated_paths


CTC_KINDS = ("light_ctc", "wav2vec_ctc", "with_heads")


def load(path):
    (model,), cfg, _ = checkpoint_utils.load_model_ensemble_and_task([str(path)])
    return model.eval(), cfg


@pytest.mark.parametrize("kind", CTC_KINDS)
def test_the_runtime_reads_the_same_logits(paths, kind):
    source, padding = random_audio(1000, 777)
    lengths = (~padding).sum(1)
    big, small = load_ctc(getattr(paths, kind)), load_ctc(paths.small[kind])
    assert small.symbols == big.symbols and count(small) < 0.8 * count(big)
    (expected, frames), (found, found_frames) = big(source, lengths), small(source, lengths)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(frames, found_frames)


@pytest.mark.parametrize("kind", CTC_KINDS)
def test_fairseq_loads_the_same_logits(paths, kind):
    source, padding = random_audio(1000, 777)
    big, (small, cfg) = load(getattr(paths, kind))[0], load(paths.small[kind])
    assert cfg.model._name == "light_ctc" and cfg.task._name == "audio_ctc"
    with torch.no_grad():
        expected, found = (model(source=source, padding_mask=padding)["encoder_out"] for model in (big, small))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (small.w2v_encoder.w2v_model.final_proj is None) == (kind != "with_heads")


@pytest.mark.parametrize("kind", ("light", "sew"))
def test_a_pre_training_checkpoint_stays_one(paths, kind):
    big, small = load(getattr(paths, kind))[0], load(paths.small[kind])[0]
    assert type(small) is type(big) and small.gates is None
    # in "sew" it followed from encoder_embed_dim
    assert small.cfg.final_dim == (12 if kind == "light" else 32)
    mask = torch.zeros(2, big.config.frames(1000), dtype=torch.bool)
    mask[:, 3:11] = True
    torch.testing.assert_close(contrast(small, mask)["x"], contrast(big, mask)["x"], atol=1e-5, rtol=1e-5)


def test_the_state_is_that_of_no_update(paths):
    state = torch.load(paths.small["light_ctc"], map_location="cpu", weights_only=False)
    assert state["optimizer_history"][-1]["num_updates"] == 0 and state["last_optimizer_state"] is None
    assert list(state["task_state"]["target_dictionary"].symbols) == list(letters().symbols)
    model = state["cfg"]["model"]
    assert model["prune_units"] is None and model["w2v_args"]["model"]["prune_units"] == []
    assert not any("gates" in name for name in state["model"])


@pytest.mark.parametrize(
    "loss, name", [("ctc", "ctc"), ("contrastive", "light_contrastive"), ("distill", "light_distill")]
)
def test_its_criterion_needs_no_gates(paths, tmp_path, loss, name):
    state = torch.load(paths.light_ctc, map_location="cpu", weights_only=False)
    keys = OmegaConf.to_container(OmegaConf.structured(LightPruneConfig(loss=loss, zero_infinity=True)))
    state["cfg"]["criterion"] = {**keys, "_name": "light_prune", "sentence_avg": True}
    torch.save(state, tmp_path / "gated.pt")
    prune_checkpoint(tmp_path / "gated.pt", tmp_path / "small.pt")
    _, cfg = load(tmp_path / "small.pt")
    assert cfg.criterion._name == name and "target" not in cfg.criterion
    if loss == "ctc":
        dictionary = letters()
        task = SimpleNamespace(target_dictionary=dictionary, blank_symbol="<s>")
        assert build_criterion(cfg.criterion, task).zero_infinity


@pytest.mark.parametrize("name", ("light_ctc", "wav2vec_ctc"))
@pytest.mark.parametrize("kind", ("light", "light_ctc", "sew"))
def test_fine_tuning_starts_from_it(paths, name, kind):
    model = ctc_model(paths.small[kind], name, feature_grad_mult=1.0)
    encoder = load_encoder(paths.small[kind])
    for key, value in model.w2v_encoder.w2v_model.state_dict().items():
        assert torch.equal(value, encoder.model[key]), key
    source, padding = random_audio(1000, 777)
    model.train()(source=source, padding_mask=padding)["encoder_out"].sum().backward()
    trained = {key for key, value in model.named_parameters() if value.grad is not None}
    assert {key for key, _ in model.named_parameters()} == trained


def test_gates_on_a_pruned_checkpoint(paths, tmp_path):
    again = save_gated_ctc(tmp_path / "again.pt", paths.small["light_ctc"], prune_units=["heads", "conv"])
    state = torch.load(again, map_location="cpu", weights_only=False)
    for name, value in state["model"].items():
        if "log_alpha" in name:
            value.copy_(torch.where(torch.arange(len(value)) > 0, OPEN, CLOSED))
    torch.save(state, again)
    prune_checkpoint(again, tmp_path / "twice.pt")
    source = random_audio(1000)[0]
    expected, found = load_ctc(again)(source)[0], load_ctc(tmp_path / "twice.pt")(source)[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    once, twice = (load_encoder(path).cfg.model for path in (paths.small["light_ctc"], tmp_path / "twice.pt"))
    assert list(twice.layer_heads) == [max(heads - 1, 0) for heads in once.layer_heads]
    assert list(twice.layer_ffn) == list(once.layer_ffn) and twice.norm_dim == once.norm_dim == 32


@pytest.mark.parametrize("kind", ("light", "sew", *CTC_KINDS))
def test_cost_counts_what_is_stored(paths, kind):
    subject = load_subject(paths.small[kind], [])
    counted = cost(subject)
    state = torch.load(paths.small[kind], map_location="cpu", weights_only=False)["model"]
    running = ("running_mean", "running_var", "num_batches_tracked")
    stored = sum(value.numel() for name, value in state.items() if not name.endswith(running))
    assert counted["parameters"] == stored
    parts = count_parameters(subject.network, subject.vocabulary)
    if kind in ("light_ctc", "wav2vec_ctc"):
        assert parts == counted["parameters_by_part"]
    assert counted["macs"] < cost(load_subject(getattr(paths, kind), []))["macs"]


def test_points_maps_and_streaming_stay(tmp_path):
    keys = dict(chunk_frames=[4, 0], left_context_frames=8, squeeze_factors=[1, 2], unique_layers=2)
    path = save_gated(tmp_path / "stream.pt", layout="large", operating_point="s2q1k1c4", **keys)
    prune_checkpoint(path, tmp_path / "small.pt")
    before, after = load_encoder(path).cfg.model, load_encoder(tmp_path / "small.pt").cfg.model
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {
        "prune_units",
        "conv_feature_layers",
        "conv_norm_dims",
        "encoder_embed_dim",
        "norm_dim",
        "head_dim",
        "layer_heads",
        "layer_ffn",
        "conv_pos_group_dims",
    }


def test_half_precision_stays(paths, tmp_path):
    state = torch.load(paths.light_ctc, map_location="cpu", weights_only=False)
    state["model"] = {name: value if "log_alpha" in name else value.half() for name, value in state["model"].items()}
    torch.save(state, tmp_path / "half.pt")
    prune_checkpoint(tmp_path / "half.pt", tmp_path / "small.pt")
    weights = torch.load(tmp_path / "small.pt", map_location="cpu", weights_only=False)["model"]
    assert {value.dtype for value in weights.values()} == {torch.float16}
    source = random_audio(1000)[0]
    expected, found = load_ctc(paths.light_ctc)(source)[0], load_ctc(tmp_path / "small.pt")(source)[0]
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)


# what cannot be pruned


def damaged(path, target, change):
    state = torch.load(path, map_location="cpu", weights_only=False)
    change(state["model"])
    torch.save(state, target)
    return target


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda model: model["gates.hidden.log_alpha"].fill_(float("nan")), "'gates.hidden.log_alpha' has NaN"),
        (lambda model: model.pop("gates.ffn.1.log_alpha"), "'gates.ffn.1.log_alpha': found nothing, expected shape"),
        (lambda model: model.update(mask_emb=torch.ones(3)), r"'mask_emb': found \(3,\), expected shape \(32,\)"),
        (lambda model: model.update(adapter=torch.ones(3)), '"adapter"'),
    ],
)
def test_damaged_checkpoints(paths, tmp_path, change, message):
    path = damaged(paths.light, tmp_path / "bad.pt", change)
    with pytest.raises(ValueError, match=message) as raised:
        prune_checkpoint(path, tmp_path / "small.pt")
    assert "bad.pt" in str(raised.value) and not (tmp_path / "small.pt").exists()


def test_without_gates_there_is_nothing_to_decide(make, tmp_path):
    for stock in (False, True):
        path = make.pretrained(tmp_path / "plain.pt", stock)
        with pytest.raises(ValueError, match="plain.pt': found no gates .* train it with criterion light_prune first"):
            prune_checkpoint(path, tmp_path / "small.pt")


def test_the_source_is_not_overwritten(paths, tmp_path):
    link = tmp_path / "link.pt"
    link.symlink_to(paths.light)
    for target in (paths.light, link):
        with pytest.raises(ValueError, match="would overwrite its source"):
            prune_checkpoint(paths.light, target)


def test_a_folder_is_no_target(paths, tmp_path):
    with pytest.raises(ValueError, match="a folder; name the checkpoint to write"):
        prune_checkpoint(paths.light, tmp_path)
