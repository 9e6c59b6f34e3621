"""light_ctc from every kind of checkpoint and from a recipe; stock wav2vec_ctc from ours."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from fairseq import models
from fairseq.models.wav2vec.wav2vec2 import Wav2Vec2Config
from omegaconf import OmegaConf

from fairseq_w2v2_light.models import StochasticSEWConfig, W2V2LightConfig

STOCHASTIC = dict(squeeze_factors=[1, 2], query_pools=[1, 2], kv_pools=[1, 2])
SAMPLES = 900


def build(name="light_ctc", dictionary=None, cfg=None, tiny=None, **keys):
    """A CTC model as fairseq's training builds it; also the cfg that its checkpoint would hold."""
    if cfg is None:
        cfg = OmegaConf.create(
            {
                "_name": name,
                "normalize": False,
                "data": "/nowhere",
                "ddp_backend": "legacy_ddp",
                "apply_mask": False,
                **({"operating_point_seed": 7} if name == "light_ctc" else {}),
                **keys,
            }
        )
    task = SimpleNamespace(target_dictionary=dictionary or tiny.letters())
    model = models.build_model(cfg, task)
    return model.eval()


def encoder_of(model):
    return model.w2v_encoder.w2v_model


def logits(model, source, padding_mask=None):
    with torch.no_grad():
        return model(source=source, padding_mask=padding_mask)["encoder_out"]


def ctc_cfg(model):
    """cfg.model of a checkpoint of this CTC model, as Trainer.state_dict writes it."""
    cfg = model.cfg
    values = OmegaConf.to_container(cfg, enum_to_str=True)
    return {key: value for key, value in values.items() if not str(value).startswith("${")}


@pytest.fixture
def stock_checkpoint(tiny, tmp_path):
    light, stock = tiny.pair(layout="large")
    cfg = tiny.container(Wav2Vec2Config(**{**tiny.config, **tiny.layouts["large"]}), "wav2vec2")
    return SimpleNamespace(path=tiny.save(tmp_path / "stock.pt", cfg, stock.state_dict()), model=light)


@pytest.fixture
def light_checkpoint(tiny, tmp_path):
    keys = {**STOCHASTIC, "unique_layers": 1, "attention_map_every": 2}
    light = tiny.light(layout="large", **keys)
    cfg = tiny.container(W2V2LightConfig(**{**tiny.config, **tiny.layouts["large"], **keys}), "w2v2_light")
    return SimpleNamespace(path=tiny.save(tmp_path / "light.pt", cfg, light.state_dict()), model=light)


@pytest.fixture
def sew_checkpoint(tiny, tmp_path):
    keys = {**tiny.config, "conv_pos": 7, "projection_hidden_dim": 24, **STOCHASTIC, "query_pools": [1]}
    sew = tiny.sew(**keys)
    cfg = tiny.container(StochasticSEWConfig(**keys), "stochastic_sew")
    return SimpleNamespace(path=tiny.save(tmp_path / "sew.pt", cfg, sew.state_dict()), model=sew)


@pytest.fixture(params=("stock", "light", "sew"))
def checkpoint(request):
    return request.getfixturevalue(f"{request.param}_checkpoint")


@pytest.mark.parametrize("name", ("light_ctc", "wav2vec_ctc"))
def test_fine_tuning_starts_from_the_pretrained_encoder(tiny, checkpoint, name):
    model = build(name, tiny=tiny, w2v_path=checkpoint.path)
    source, padding_mask = tiny.audio(SAMPLES, 500)
    with torch.no_grad():
        expected = checkpoint.model.extract_features(source, padding_mask)["x"]
        found = encoder_of(model).extract_features(source, padding_mask)["x"]
    if name == "wav2vec_ctc" and not hasattr(encoder_of(model), "config"):  # a stock encoder: its padded rows differ
        expected, found = expected[:1], found[:1]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert logits(model, source, padding_mask).shape == (expected.size(1), 2, len(tiny.letters()))
    assert not [key for key in model.state_dict() if "quantizer" in key or "final_proj" in key]


def test_stock_models_become_w2v2_light(tiny, stock_checkpoint):
    model = build(tiny=tiny, w2v_path=stock_checkpoint.path)
    assert type(encoder_of(model)).__name__ == "W2V2LightModel"
    assert model.cfg.w2v_args.model._name == "w2v2_light"
    assert model.cfg.w2v_args.model.squeeze_factors == [1]


@pytest.mark.parametrize("name", ("light_ctc", "wav2vec_ctc"))
def test_fine_tuning_keys_reach_the_encoder(tiny, light_checkpoint, name):
    keys = dict(mask_prob=0.33, mask_channel_prob=0.2, layerdrop=0.15, dropout=0.07, feature_grad_mult=0.5)
    model = build(name, tiny=tiny, w2v_path=light_checkpoint.path, **keys)
    encoder = encoder_of(model)
    assert (encoder.mask_prob, encoder.mask_channel_prob, encoder.feature_grad_mult) == (0.33, 0.2, 0.5)
    assert encoder.config.layerdrop == 0.15 and encoder.config.dropout == 0.07
    assert encoder.config.layer_map == (0, 0, 0) and encoder.config.attention_map_every == 2


@pytest.mark.parametrize("name", ("light_ctc", "wav2vec_ctc"))
def test_every_parameter_gets_a_gradient_in_fine_tuning(tiny, light_checkpoint, name):
    model = build(name, tiny=tiny, w2v_path=light_checkpoint.path, feature_grad_mult=1.0, layerdrop=0.3).train()
    for update in range(4):
        model.set_num_updates(update)
        model.zero_grad(set_to_none=True)
        model(source=tiny.audio(SAMPLES)[0], padding_mask=None)["encoder_out"].square().sum().backward()
        assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []


def test_the_trainer_s_update_number_reaches_the_encoder(tiny, light_checkpoint):
    model = build(tiny=tiny, w2v_path=light_checkpoint.path).train()
    points = set()
    for update in range(30):
        model.set_num_updates(update)
        assert encoder_of(model).num_updates == update
        points.add(str(encoder_of(model).current_operating_point()))
    assert len(points) == 8


# operating points


def test_one_point_for_fine_tuning_and_inference(tiny, light_checkpoint):
    model = build(tiny=tiny, w2v_path=light_checkpoint.path, operating_point="s2q1k2")
    source, _ = tiny.audio(SAMPLES)
    with torch.no_grad():
        expected = light_checkpoint.model.extract_features(source, operating_point="s2q1k2")["x"]
        torch.testing.assert_close(encoder_of(model).extract_features(source)["x"], expected)
    for update in range(5):
        model.train().set_num_updates(update)
        assert str(encoder_of(model).current_operating_point()) == "s2q1k2"


def test_a_fixed_checkpoint_becomes_stochastic_again(tiny, light_checkpoint, tmp_path):
    fixed = build(tiny=tiny, w2v_path=light_checkpoint.path, operating_point="s2q1k2")
    path = tiny.save(tmp_path / "fixed.pt", ctc_cfg(fixed), fixed.state_dict(), dictionary=tiny.letters())
    assert str(encoder_of(build(tiny=tiny, w2v_path=path)).operating_point) == "s2q1k2"
    assert encoder_of(build(tiny=tiny, w2v_path=path, operating_point="stochastic")).operating_point is None
    with pytest.raises(ValueError, match="kv_pools: found factors .* stay at the operating point s2q1k2 .*=stochastic"):
        build(tiny=tiny, w2v_path=path, kv_pools=[1, 2, 4])
    again = build(tiny=tiny, w2v_path=path, kv_pools=[1, 2, 4], operating_point="stochastic")
    assert encoder_of(again).check_operating_point("s1q1k4")
    narrow = build(tiny=tiny, w2v_path=path, squeeze_factors=[2], query_pools=[1], kv_pools=[2])
    assert str(encoder_of(narrow).operating_point) == "s2q1k2"


def test_fewer_factors_keep_the_unsqueeze_weights(tiny, light_checkpoint):
    model = build(tiny=tiny, w2v_path=light_checkpoint.path, squeeze_factors=[1], kv_pools=[2])
    encoder = encoder_of(model)
    assert encoder.config.operating_points.squeeze == (1,) and encoder.config.operating_points.key_value == (2,)
    assert encoder.config.unsqueeze_factor == 2
    assert encoder.encoder.upsample[0].weight.shape == (64, 32)


def test_a_new_pooling_factor_can_be_fine_tuned(tiny, light_checkpoint):
    model = build(tiny=tiny, w2v_path=light_checkpoint.path, kv_pools=[1, 2, 4])
    assert encoder_of(model).check_operating_point("s1q1k4")


@pytest.mark.parametrize(
    "keys, words",
    (
        ({"operating_point": "s3q1k1"}, ("s3q1k1", "not trained with squeeze factor 3", "[1, 2]")),
        ({"operating_point": "s1q1k4"}, ("not trained with key-value pooling 4",)),
        ({"operating_point": "s2"}, ("operating point 's2'",)),
        ({"squeeze_factors": [1, 3]}, ("squeeze_factors: found 3", "up to 2")),
        ({"query_pools": [0]}, ("query_pools: found [0]",)),
    ),
)
def test_points_that_the_checkpoint_was_not_trained_for(tiny, light_checkpoint, keys, words):
    with pytest.raises(ValueError) as error:
        build(tiny=tiny, w2v_path=light_checkpoint.path, **keys)
    for word in words:
        assert word in str(error.value)


# saved and built again


@pytest.mark.parametrize("name", ("light_ctc", "wav2vec_ctc"))
def test_a_checkpoint_is_built_from_its_cfg_alone(tiny, light_checkpoint, tmp_path, name):
    from fairseq import checkpoint_utils

    model = build(name, tiny=tiny, w2v_path=light_checkpoint.path)
    path = tiny.save(tmp_path / "ctc.pt", ctc_cfg(model), model.state_dict(), dictionary=tiny.letters())
    (tmp_path / "light.pt").unlink()
    state = checkpoint_utils.load_checkpoint_to_cpu(path)
    again = build(cfg=state["cfg"].model, tiny=tiny)
    again.load_state_dict(state["model"], strict=True)
    source, padding_mask = tiny.audio(SAMPLES, 500)
    torch.testing.assert_close(logits(again, source, padding_mask), logits(model, source, padding_mask))
    assert encoder_of(again).config == encoder_of(model).config


def test_a_chosen_point_is_in_the_saved_checkpoint(tiny, light_checkpoint, tmp_path):
    from fairseq import checkpoint_utils

    model = build(tiny=tiny, w2v_path=light_checkpoint.path, operating_point="s2q2k1")
    path = tiny.save(tmp_path / "ctc.pt", ctc_cfg(model), model.state_dict(), dictionary=tiny.letters())
    again = build(cfg=checkpoint_utils.load_checkpoint_to_cpu(path)["cfg"].model, tiny=tiny)
    assert str(encoder_of(again).operating_point) == "s2q2k1"


# from fine-tuned checkpoints


@pytest.mark.parametrize("name", ("light_ctc", "wav2vec_ctc"))
@pytest.mark.parametrize("encoder", ("stock", "light"))
def test_from_a_fine_tuned_checkpoint_with_its_head(tiny, request, tmp_path, name, encoder):
    first = build(name, tiny=tiny, w2v_path=request.getfixturevalue(f"{encoder}_checkpoint").path)
    path = tiny.save(tmp_path / "ctc.pt", ctc_cfg(first), first.state_dict(), dictionary=tiny.letters())
    second = build(tiny=tiny, w2v_path=path)
    source, _ = tiny.audio(SAMPLES)
    torch.testing.assert_close(logits(second, source), logits(first, source), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("other", ("ABD|", "ABCD|", "BAC|"))
def test_another_dictionary_gets_a_new_head(tiny, light_checkpoint, tmp_path, other):
    first = build(tiny=tiny, w2v_path=light_checkpoint.path)
    path = tiny.save(tmp_path / "ctc.pt", ctc_cfg(first), first.state_dict(), dictionary=tiny.letters())
    second = build(dictionary=tiny.letters(other), w2v_path=path)
    assert second.w2v_encoder.proj.weight.size(0) == 4 + len(other)
    rows = min(4 + len(other), len(first.w2v_encoder.proj.weight))
    assert not torch.equal(second.w2v_encoder.proj.weight[:rows], first.w2v_encoder.proj.weight[:rows])


def test_weights_are_copied_not_shared_with_the_checkpoint(tiny, light_checkpoint):
    first = build(tiny=tiny, w2v_path=light_checkpoint.path)
    second = build(tiny=tiny, w2v_path=light_checkpoint.path)
    with torch.no_grad():
        encoder_of(first).layer_norm.weight.add_(1)
    assert not torch.equal(encoder_of(first).layer_norm.weight, encoder_of(second).layer_norm.weight)


def test_fairseq_s_reader_is_put_back(tiny, light_checkpoint):
    from fairseq import checkpoint_utils

    before = checkpoint_utils.load_checkpoint_to_cpu
    build(tiny=tiny, w2v_path=light_checkpoint.path)
    assert checkpoint_utils.load_checkpoint_to_cpu is before
    with pytest.raises(ValueError):
        build(tiny=tiny, w2v_path=light_checkpoint.path, squeeze_factors=[9])
    assert checkpoint_utils.load_checkpoint_to_cpu is before


# from a recipe


def write_recipe(tiny, path, name="w2v2_light", normalize=False, **changes):
    model = {**tiny.config, **tiny.layouts["large"], **changes, "_name": name}
    recipe = {
        "common": {"seed": 3},
        "task": {"_name": "audio_pretraining", "data": "???", "normalize": normalize},
        "model": {**model, "operating_point_seed": "${common.seed}"} if name != "wav2vec2" else model,
    }
    path.write_text("# @package _global_\n" + json.dumps(recipe))
    return str(path)


@pytest.mark.parametrize("name", ("w2v2_light", "stochastic_sew", "wav2vec2"))
def test_from_scratch(tiny, tmp_path, name):
    model = build(tiny=tiny, recipe=write_recipe(tiny, tmp_path / "recipe.yaml", name))
    source, _ = tiny.audio(SAMPLES)
    assert logits(model, source).shape[1:] == (1, 8)
    assert encoder_of(model).config.depth == 3
    again = build(cfg=OmegaConf.create(ctc_cfg(model)), tiny=tiny)
    again.load_state_dict(copy.deepcopy(model.state_dict()), strict=True)
    torch.testing.assert_close(logits(again, source), logits(model, source))


def test_recipe_overrides(tiny, tmp_path):
    recipe = write_recipe(tiny, tmp_path / "recipe.yaml")
    changes = {"encoder_layers": 6, "unique_layers": 2, "squeeze_factors": [1, 4]}
    model = build(tiny=tiny, recipe=recipe, recipe_overrides=changes, operating_point="s4q1k1")
    config = encoder_of(model).config
    assert config.layer_map == (0, 0, 0, 1, 1, 1) and config.unsqueeze_factor == 4
    assert str(encoder_of(model).operating_point) == "s4q1k1"


def test_from_scratch_squeeze_factors_can_be_larger_than_the_recipe_s(tiny, tmp_path):
    """There are no pre-trained unsqueeze weights to respect."""
    model = build(tiny=tiny, recipe=write_recipe(tiny, tmp_path / "recipe.yaml"), squeeze_factors=[1, 2, 3])
    assert encoder_of(model).config.unsqueeze_factor == 3


@pytest.mark.parametrize(
    "changes, message",
    (
        ({"encoder_layer": 6}, "recipe_overrides: 'encoder_layer' is no key of w2v2_light"),
        ({"unique_layers": 7}, "unique_layers: found 7, .*encoder_layers=3"),
        ({"unique_layers": "two"}, "recipe_overrides: model.unique_layers=two: "),
    ),
)
def test_recipe_overrides_that_cannot_be(tiny, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        build(tiny=tiny, recipe=write_recipe(tiny, tmp_path / "recipe.yaml"), recipe_overrides=changes)


def test_a_recipe_that_does_not_exist(tiny):
    with pytest.raises(FileNotFoundError, match="recipe 'pretraining/nothing': .*pretraining/"):
        build(tiny=tiny, recipe="pretraining/nothing")


@pytest.mark.parametrize("text", ("a: [1", "just text", "model: {_name: nothing}", "[1, 2]", ""))
def test_a_recipe_that_is_not_one(tiny, tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="recipe '.*recipe.yaml'"):
        build(tiny=tiny, recipe=str(path))


def test_a_recipe_of_another_model(tiny, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {_name: transformer_lm}")
    with pytest.raises(ValueError, match="describes a 'transformer_lm', expected one of w2v2_light, stochastic_sew"):
        build(tiny=tiny, recipe=str(path))


# bad checkpoints


def test_neither_checkpoint_nor_recipe(tiny):
    with pytest.raises(ValueError, match="neither model.w2v_path .* nor model.recipe"):
        build(tiny=tiny)


def test_missing_checkpoint(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match="model.w2v_path: .*nothing.pt"):
        build(tiny=tiny, w2v_path=str(tmp_path / "nothing.pt"))


@pytest.mark.parametrize("content", (b"", b"not a checkpoint", b"PK\x03\x04 broken zip"))
def test_a_file_that_is_no_checkpoint(tiny, tmp_path, content):
    path = tmp_path / "file.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="model.w2v_path: .*file.pt.* checkpoint"):
        build(tiny=tiny, w2v_path=str(path))


@pytest.mark.parametrize("content", ({}, {"weights": torch.ones(2)}, [1, 2], torch.ones(3), {"model": {}, "cfg": None}))
def test_a_torch_file_that_is_no_checkpoint(tiny, tmp_path, content):
    path = tmp_path / "file.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match="model.w2v_path: .*file.pt.* checkpoint"):
        build(tiny=tiny, w2v_path=str(path))


def test_a_truncated_checkpoint(tiny, light_checkpoint, tmp_path):
    path = tmp_path / "half.pt"
    content = open(light_checkpoint.path, "rb").read()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="model.w2v_path: .*half.pt.* checkpoint"):
        build(tiny=tiny, w2v_path=str(path))


def test_a_checkpoint_of_a_diverged_run(tiny, light_checkpoint, tmp_path):
    cfg = tiny.container(W2V2LightConfig(**tiny.config), "w2v2_light")
    weights = {**light_checkpoint.model.state_dict(), "layer_norm.bias": torch.tensor([float("nan")])}
    path = tiny.save(tmp_path / "nan.pt", cfg, weights)
    with pytest.raises(ValueError, match="model.w2v_path: .*nan.pt: parameter 'layer_norm.bias' has NaN"):
        build(tiny=tiny, w2v_path=path)


def test_a_checkpoint_of_another_model(tiny, tmp_path):
    path = tiny.save(tmp_path / "lm.pt", {"_name": "transformer_lm"}, {"decoder.weight": torch.ones(2)})
    with pytest.raises(ValueError, match="model.w2v_path: '.*lm.pt' .* model 'transformer_lm'; .*wav2vec2"):
        build(tiny=tiny, w2v_path=path)


def test_a_fine_tuned_checkpoint_of_another_encoder(tiny, tmp_path):
    cfg = {"_name": "wav2vec_ctc", "w2v_args": {"model": {"_name": "data2vec_audio"}}}
    path = tiny.save(tmp_path / "other.pt", cfg, {"x": torch.ones(2)})
    with pytest.raises(ValueError, match="other.pt'.*encoder is not a wav2vec 2.0"):
        build(tiny=tiny, w2v_path=path)


def test_the_wrong_normalisation(tiny, light_checkpoint):
    message = "task.normalize: found True, but the encoder was pre-trained with False; set task.normalize=false"
    with pytest.raises(ValueError, match=message):
        build(tiny=tiny, w2v_path=light_checkpoint.path, normalize=True)


def test_random_weights_take_any_normalisation(tiny, tmp_path):
    recipe = write_recipe(tiny, tmp_path / "recipe.yaml", normalize=True)
    for normalize in (True, False):
        model = build(tiny=tiny, recipe=recipe, normalize=normalize)
        assert model.cfg.w2v_args.task.normalize == normalize
