"""Models that stream: light_ctc from offline and streaming checkpoints, pre-training with chunks, what is refused."""

import logging
from types import SimpleNamespace

import pytest
import torch
from fairseq import checkpoint_utils, models
from fairseq.models.wav2vec.wav2vec2 import Wav2Vec2Config
from omegaconf import OmegaConf
from tiny_checkpoints import ctc_model, letters, perturb, save_ctc, without_references

from fairseq_w2v2_light.compress.student import StudentSpec, make_student
from fairseq_w2v2_light.models import W2V2LightConfig, W2V2LightModel
from fairseq_w2v2_light.nn.positions import causal_weights

POSITIONS = "encoder.pos_conv.0."
CHUNKS = dict(chunk_frames=[4], left_context_frames=8, lookahead_frames=4)
STOCHASTIC = dict(squeeze_factors=[1, 2], query_pools=[1, 2], kv_pools=[1, 2])
SAMPLES = (900, 500)


def encoder_of(model):
    return model.w2v_encoder.w2v_model


def encoder_weights(model):
    return encoder_of(model).state_dict()


def logits(model, source, padding_mask=None):
    with torch.no_grad():
        return model(source=source, padding_mask=padding_mask)["encoder_out"].transpose(0, 1)


@pytest.fixture
def checkpoint(tiny, tmp_path):
    """Makes a pre-training checkpoint; returns its path and its weights."""

    def make(layout="large", task=None, **keys):
        model = tiny.light(layout=layout, **keys)
        cfg = tiny.container(W2V2LightConfig(**{**tiny.config, **tiny.layouts[layout], **keys}), "w2v2_light")
        path = tiny.save(tmp_path / "pretrained.pt", cfg, model.state_dict(), task)
        return SimpleNamespace(path=path, weights=model.state_dict(), model=model)

    return make


@pytest.fixture
def stock_checkpoint(tiny, tmp_path):
    _, stock = tiny.pair(layout="large")
    cfg = tiny.container(Wav2Vec2Config(**{**tiny.config, **tiny.layouts["large"]}), "wav2vec2")
    path = tiny.save(tmp_path / "stock.pt", cfg, stock.state_dict())
    return SimpleNamespace(path=path, weights=stock.state_dict())


# ---- from an offline checkpoint


@pytest.mark.parametrize("kind", ("w2v2_light", "wav2vec2", "light_ctc"))
def test_positions_of_an_offline_checkpoint_become_causal(checkpoint, stock_checkpoint, kind, tmp_path, caplog):
    start = stock_checkpoint if kind == "wav2vec2" else checkpoint(**STOCHASTIC)
    path, head = start.path, None
    if kind == "light_ctc":
        tuned = ctc_model(start.path)
        perturb(tuned.w2v_encoder.proj)
        path, head = save_ctc(tmp_path / "tuned.pt", tuned, dictionary=letters()), tuned.w2v_encoder.proj.weight
    with caplog.at_level(logging.INFO):
        model = ctc_model(path, **CHUNKS)
    assert "streaming: the positions' 8 taps became 5 causal ones" in caplog.text

    g, v = causal_weights(*(start.weights[f"{POSITIONS}weight_{part}"] for part in "gv"))
    weights = encoder_weights(model)
    assert torch.equal(weights[POSITIONS + "weight_g"], g) and torch.equal(weights[POSITIONS + "weight_v"], v)
    for name, value in weights.items():
        if name not in (POSITIONS + "weight_g", POSITIONS + "weight_v"):
            assert torch.equal(value, start.weights[name]), name
    if head is not None:
        assert torch.equal(model.w2v_encoder.proj.weight, head)

    config = encoder_of(model).config
    assert (config.conv_pos, config.streams, config.operating_points.chunk) == (5, True, (4,))
    assert (config.left_context, config.lookahead, config.frontend_padding) == (8, 4, 10)
    saved = model.cfg.w2v_args.model
    assert (saved.conv_pos, list(saved.chunk_frames), saved.left_context_frames) == (5, [4], 8)


def test_other_contexts_are_the_checkpoints_defaults(checkpoint):
    config = encoder_of(ctc_model(checkpoint().path, chunk_frames=[12, 0, 60])).config
    assert (config.operating_points.chunk, config.left_context, config.lookahead) == ((12, 0, 60), 300, 0)


def test_without_chunks_nothing_changes(checkpoint, caplog):
    start = checkpoint()
    with caplog.at_level(logging.INFO):
        models_ = [
            ctc_model(start.path),
            ctc_model(start.path, chunk_frames=None),
            ctc_model(start.path, chunk_frames=[]),
        ]
    assert "streaming" not in caplog.text
    for model in models_:
        assert not encoder_of(model).config.streams
        assert all(torch.equal(value, start.weights[name]) for name, value in encoder_weights(model).items())


def test_a_saved_model_is_loaded_as_it_was(checkpoint, tmp_path):
    """Its own chunk_frames is not taken for a change of the encoder that it holds; positions are converted once."""
    model = ctc_model(checkpoint(**STOCHASTIC).path, **{**CHUNKS, "chunk_frames": [4, 8]})
    letters().save(str(tmp_path / "dict.ltr.txt"))
    task = {"_name": "audio_finetuning", "data": str(tmp_path), "labels": "ltr"}
    path = save_ctc(tmp_path / "ctc.pt", model, task, letters())
    source = torch.randn(1, 900)
    for overrides, point in (({}, "s1q1k1c8"), ({"operating_point": "s2q1k2c4"}, "s2q1k2c4")):
        (loaded,), _, _ = checkpoint_utils.load_model_ensemble_and_task([path], arg_overrides=overrides)
        assert str(encoder_of(loaded.eval()).current_operating_point()) == point
        encoder_of(model).operating_point = encoder_of(model).check_operating_point(point)
        assert torch.equal(logits(loaded, source), logits(model, source))


def test_a_recipe_s_positions_are_causal_from_the_start():
    overrides = {"extractor_mode": "layer_norm", "encoder_layers": 2, "encoder_embed_dim": 32, "conv_pos": 12}
    overrides.update(encoder_ffn_embed_dim=32, encoder_attention_heads=2, conv_pos_groups=4, unique_layers=0)
    overrides["conv_feature_layers"] = "[(8, 10, 5), (8, 3, 2), (8, 2, 2)]"
    keys = dict(recipe="pretraining/w2v2_light_tiny", recipe_overrides=overrides, normalize=False)
    config = encoder_of(ctc_model("", **keys, **CHUNKS)).config
    assert config.streams and config.conv_pos == 12
    with pytest.raises(ValueError, match=r"extractor_mode: found 'default'.*chunk_frames=\[4\]"):
        ctc_model("", **{**keys, "recipe_overrides": {**overrides, "extractor_mode": "default"}}, **CHUNKS)


# ---- from a streaming checkpoint


@pytest.mark.parametrize("name", ("light_ctc", "wav2vec_ctc"))
def test_a_streaming_checkpoint_goes_on_streaming(tiny, checkpoint, name, caplog):
    start = checkpoint(**CHUNKS)
    with caplog.at_level(logging.INFO):
        model = ctc_model(start.path, name)
    assert "causal" not in caplog.text
    config = encoder_of(model).config
    assert (config.operating_points.chunk, config.left_context, config.lookahead, config.conv_pos) == ((4,), 8, 4, 8)
    assert all(torch.equal(value, start.weights[name]) for name, value in encoder_weights(model).items())
    source, padding_mask = tiny.audio(*SAMPLES)
    with torch.no_grad():
        expected = start.model.extract_features(source, padding_mask)["x"]
        found = encoder_of(model).extract_features(source, padding_mask)["x"]
    assert torch.equal(found, expected)


def test_chunks_and_contexts_of_a_streaming_checkpoint_change_without_a_conversion(checkpoint, caplog):
    start = checkpoint(**CHUNKS)
    with caplog.at_level(logging.INFO):
        model = ctc_model(start.path, chunk_frames=[0, 12], left_context_frames=24, lookahead_frames=0)
    assert "causal" not in caplog.text
    config = encoder_of(model).config
    assert (config.operating_points.chunk, config.left_context, config.lookahead, config.conv_pos) == (
        (0, 12),
        24,
        0,
        8,
    )
    assert all(torch.equal(value, start.weights[name]) for name, value in encoder_weights(model).items())


@pytest.mark.parametrize("chunks", ([], [0]))
def test_there_is_no_way_back_to_an_offline_model(checkpoint, chunks):
    message = (
        r"model.chunk_frames: found no chunk, but the checkpoint is a streaming model.*offline checkpoint, or add 0"
    )
    with pytest.raises(ValueError, match=message):
        ctc_model(checkpoint(**CHUNKS).path, chunk_frames=chunks)


# ---- what cannot stream


def test_normalised_audio_is_refused_with_advice(checkpoint):
    normalised = checkpoint(task={"normalize": True}).path
    message = (
        r"task.normalize: found true.*model.chunk_frames=\[4\] asks for a streaming model, which cannot wait for its "
        r"end; set task.normalize=false .*--input-level"
    )
    with pytest.raises(ValueError, match=message):
        ctc_model(normalised, normalize=True, **CHUNKS)
    ctc_model(normalised, normalize=True)
    message = (
        r"task.normalize: found False, but the encoder was pre-trained with True; model.chunk_frames=\[4\] asks for a "
        r"streaming model, .*w2v2-light student .* --layers every:1 --input-level X"
    )
    with pytest.raises(ValueError, match=message) as error:
        ctc_model(normalised, **CHUNKS)
    assert "set task.normalize" not in str(error.value)
    with pytest.raises(ValueError, match="pre-trained with True; set task.normalize=true"):
        ctc_model(normalised)


def test_the_student_that_the_advice_makes_can_be_fine_tuned(checkpoint, tmp_path):
    normalised = checkpoint(task={"normalize": True}).path
    make_student(normalised, tmp_path / "student.pt", StudentSpec(layers="every:1", input_level=0.05))
    assert encoder_of(ctc_model(tmp_path / "student.pt", **CHUNKS)).config.streams


def test_pretraining_on_normalised_audio_is_refused(tiny):
    config = W2V2LightConfig(**{**tiny.config, **tiny.layouts["large"], **CHUNKS})
    tasks = [SimpleNamespace(cfg=SimpleNamespace(normalize=normalize)) for normalize in (True, False)]
    with pytest.raises(ValueError, match=r"task.normalize: found true.*model.chunk_frames=\[4\]"):
        W2V2LightModel.build_model(config, tasks[0])
    assert W2V2LightModel.build_model(config, tasks[1]).config is tasks[1].encoder_config


def test_group_norm_is_refused(tiny, checkpoint):
    message = r"extractor_mode: found 'default', a GroupNorm .*chunk_frames=\[4\].*extractor_mode=layer_norm"
    with pytest.raises(ValueError, match=message):
        ctc_model(checkpoint("base").path, **CHUNKS)
    with pytest.raises(ValueError, match=message):
        tiny.light(layout="base", **CHUNKS)


def test_chunks_without_a_whole_number_of_windows_are_refused(checkpoint):
    with pytest.raises(ValueError, match=r"chunk_frames: 6 frames are no multiple of 4, squeeze factor 2 times 2 of"):
        ctc_model(checkpoint(**STOCHASTIC).path, **{**CHUNKS, "chunk_frames": [6]})


# ---- training


def test_a_chunk_is_drawn_per_update_and_inference_hears_the_largest(tiny):
    model = tiny.light(layout="large", **{**CHUNKS, "chunk_frames": [4, 12, 8]}, squeeze_factors=[1, 2])
    drawn = {}
    for update in range(40):
        model.train().set_num_updates(update)
        drawn[str(model.current_operating_point())] = update
        assert model.current_operating_point() == model.current_operating_point()
    assert set(drawn) == {f"s{squeeze}q1k1c{chunk}" for squeeze in (1, 2) for chunk in (4, 8, 12)}
    assert str(model.eval().current_operating_point()) == "s1q1k1c12"
    source, _ = tiny.audio(900)
    assert model.extract_features(source)["operating_point"] == "s1q1k1c12"
    assert model.extract_features(source, operating_point="s2q1k1")["operating_point"] == "s2q1k1c12"


@pytest.mark.parametrize("every", (1, 2))
def test_pretraining_gives_every_parameter_a_gradient(tiny, every):
    keys = {**CHUNKS, **STOCHASTIC, "chunk_frames": [0, 4, 8], "attention_map_every": every, "encoder_layerdrop": 0.2}
    model = tiny.light(layout="large", dropout=0.1, attention_dropout=0.1, **keys).train()
    source, padding_mask = tiny.audio(*SAMPLES)
    for update in range(6):
        model.set_num_updates(update)
        model.zero_grad(set_to_none=True)
        mask = tiny.mask(2, 45)
        mask[1, 25:] = False
        mask[0, mask[0].nonzero().flatten()[int(mask[1].sum()) :]] = False
        output = model(source, padding_mask, mask_indices=mask)
        model.get_logits(output).float().logsumexp(-1).sum().backward()
        for name, parameter in model.named_parameters():
            # the quantiser's projection of features is not differentiable through its codes in every draw
            assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()), (update, name)


def test_fine_tuning_gives_every_parameter_a_gradient(tiny, checkpoint):
    start = checkpoint(**STOCHASTIC, unique_layers=1, attention_map_every=2)
    model = ctc_model(start.path, feature_grad_mult=1.0, layerdrop=0.2, **{**CHUNKS, "chunk_frames": [0, 4, 8]}).train()
    source, padding_mask = tiny.audio(*SAMPLES)
    for update in range(6):
        model.set_num_updates(update)
        model.zero_grad(set_to_none=True)
        output = model(source=source, padding_mask=padding_mask)
        valid = ~output["padding_mask"]
        output["encoder_out"].transpose(0, 1)[valid].square().sum().backward()
        missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        assert missing == []
        assert all(bool(torch.isfinite(parameter.grad).all()) for parameter in model.parameters())


@pytest.mark.parametrize("point", ("s1q1k1c4", "s2q2k1c8", "s1q1k2"))
def test_a_padded_batch_is_its_utterances_one_by_one(tiny, point):
    keys = {**CHUNKS, **STOCHASTIC, "chunk_frames": [0, 4, 8]}
    model = tiny.light(layout="large", **keys)
    lengths = (900, 333, 20, 610)
    source, padding_mask = tiny.audio(*lengths)
    source[padding_mask] = 9.0
    with torch.no_grad():
        batch = model.extract_features(source, padding_mask, operating_point=point)
        assert (~batch["padding_mask"]).sum(1).tolist() == [length // 20 for length in lengths]
        for row, length in enumerate(lengths):
            alone = model.extract_features(source[row : row + 1, :length], operating_point=point)
            torch.testing.assert_close(batch["x"][row, : length // 20], alone["x"][0], atol=1e-5, rtol=1e-5)
        squeezed = batch["layer_padding_mask"].size(1)
        assert all(layer[0].size(0) == squeezed for layer in batch["layer_results"])


def test_what_a_configuration_keeps(checkpoint):
    """The keys are plain lists and integers in a checkpoint, which the runtime reads without omegaconf."""
    model = ctc_model(checkpoint().path, **CHUNKS)
    values = without_references(OmegaConf.to_container(model.cfg, enum_to_str=True))
    assert values["chunk_frames"] == [4] and values["w2v_args"]["model"]["chunk_frames"] == [4]
    again = models.build_model(OmegaConf.create(values), SimpleNamespace(target_dictionary=letters()))
    assert encoder_of(again).config == encoder_of(model).config
