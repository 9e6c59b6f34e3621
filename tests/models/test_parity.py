"""With every mechanism off, w2v2_light is fairseq's Wav2Vec2Model."""

import copy

import pytest
import torch

LAYOUTS = ("base", "large")
TOLERANCE = 1e-5


def difference(ours, stock):
    assert ours.shape == stock.shape
    return (ours - stock).abs().max().item()


def features(model, source, padding_mask=None, **options):
    with torch.no_grad():
        return model.extract_features(source, padding_mask, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_state_dict_names_and_shapes_are_stock(tiny, layout):
    light, stock = tiny.pair(layout=layout)
    ours, theirs = light.state_dict(), stock.state_dict()
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in theirs.items()}
    stock.load_state_dict(ours, strict=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_features_without_padding(tiny, layout):
    light, stock = tiny.pair(layout=layout)
    source, _ = tiny.audio(1237, 1237)
    ours, theirs = features(light, source), features(stock, source)
    assert difference(ours["x"], theirs["x"]) <= TOLERANCE
    assert difference(ours["features"], theirs["features"]) <= TOLERANCE
    assert ours["padding_mask"] is None and theirs["padding_mask"] is None


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("conv_pos", (3, 8, 95, 128))
def test_any_kernel_of_the_positions(tiny, layout, conv_pos):
    light, stock = tiny.pair(layout=layout, conv_pos=conv_pos)
    source, _ = tiny.audio(1000)
    assert difference(features(light, source)["x"], features(stock, source)["x"]) <= TOLERANCE


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layer_results(tiny, layout):
    light, stock = tiny.pair(layout=layout)
    source, _ = tiny.audio(901, 901)
    ours, theirs = features(light, source)["layer_results"], features(stock, source)["layer_results"]
    assert len(ours) == len(theirs) == 3
    for (x, attention, ffn), (stock_x, stock_attention, stock_ffn) in zip(ours, theirs):
        assert difference(x, stock_x) <= TOLERANCE
        assert difference(ffn, stock_ffn) <= TOLERANCE
        assert attention is None and stock_attention is None


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("layer", (0, 1, 2, 7))
def test_features_of_one_layer(tiny, layout, layer):
    light, stock = tiny.pair(layout=layout)
    source, _ = tiny.audio(700)
    ours, theirs = features(light, source, layer=layer), features(stock, source, layer=layer)
    assert difference(ours["x"], theirs["x"]) <= TOLERANCE
    assert len(ours["layer_results"]) == len(theirs["layer_results"])


def test_padded_batch_equals_stock_with_the_layer_norm_frontend(tiny):
    light, stock = tiny.pair(layout="large")
    source, padding_mask = tiny.audio(1501, 700, 33, 1100)
    ours, theirs = features(light, source, padding_mask), features(stock, source, padding_mask)
    assert torch.equal(ours["padding_mask"], theirs["padding_mask"])
    valid = ~ours["padding_mask"]
    assert difference(ours["x"][valid], theirs["x"][valid]) <= TOLERANCE


@pytest.mark.parametrize("layout", LAYOUTS)
def test_padded_batch_equals_stock_on_each_utterance_alone(tiny, layout):
    light, stock = tiny.pair(layout=layout)
    lengths = (1501, 700, 53, 1100)
    source, padding_mask = tiny.audio(*lengths)
    ours = features(light, source, padding_mask)
    for row, count in enumerate(lengths):
        alone = features(stock, source[row : row + 1, :count])["x"][0]
        assert (~ours["padding_mask"][row]).sum() == len(alone)
        assert difference(ours["x"][row, : len(alone)], alone) <= TOLERANCE


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_padding_mask_that_marks_nothing_changes_nothing(tiny, layout):
    light, _ = tiny.pair(layout=layout)
    source, _ = tiny.audio(800, 800)
    nothing = torch.zeros(source.shape, dtype=torch.bool)
    assert torch.equal(features(light, source, nothing)["x"], features(light, source)["x"])


def test_padding_that_is_shorter_than_a_frame(tiny):
    light, stock = tiny.pair(layout="large")
    source, padding_mask = tiny.audio(805, 801)
    ours, theirs = features(light, source, padding_mask), features(stock, source, padding_mask)
    assert difference(ours["x"], theirs["x"]) <= TOLERANCE


@pytest.mark.parametrize("layout", LAYOUTS)
def test_frontend_width_equal_to_the_encoder_needs_no_projection(tiny, layout):
    light, stock = tiny.pair(layout=layout, encoder_embed_dim=16)
    assert light.post_extract_proj is None and stock.post_extract_proj is None
    source, _ = tiny.audio(640)
    assert difference(features(light, source)["x"], features(stock, source)["x"]) <= TOLERANCE


@pytest.mark.parametrize("layout", LAYOUTS)
def test_double_precision(tiny, layout):
    light, stock = tiny.pair(layout=layout)
    source, _ = tiny.audio(900, 900, dtype=torch.float64)
    ours, theirs = features(light.double(), source)["x"], features(stock.double(), source)["x"]
    assert ours.dtype == torch.float64
    assert difference(ours, theirs) <= 1e-6  # stock computes norms of the frontend and GELU in fp32


@pytest.mark.parametrize("activation", ("relu", "gelu", "gelu_accurate", "tanh"))
def test_activations(tiny, activation):
    light, stock = tiny.pair(activation_fn=activation)
    source, _ = tiny.audio(600)
    assert difference(features(light, source)["x"], features(stock, source)["x"]) <= TOLERANCE


@pytest.mark.parametrize("layout", LAYOUTS)
def test_crop_to_a_multiple_and_required_length_multiple(tiny, layout):
    light, stock = tiny.pair(layout=layout, crop_seq_to_multiple=4, required_seq_len_multiple=8)
    source, padding_mask = tiny.audio(1501, 1501)
    ours, theirs = features(light, source), features(stock, source)
    assert ours["x"].size(1) % 4 == 0
    assert difference(ours["x"], theirs["x"]) <= TOLERANCE


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dropped_layers_at_equal_numpy_seed(tiny, layout):
    import numpy as np

    light, stock = tiny.pair(layout=layout, encoder_layerdrop=0.3, dropout_input=0.0)
    source, _ = tiny.audio(600, 600)
    counts = set()
    for seed in range(8):
        results = []
        for model in (light, stock):
            model.train()
            np.random.seed(seed)
            results.append(features(model, source))
        counts.add(len(results[0]["layer_results"]))
        assert len(results[0]["layer_results"]) == len(results[1]["layer_results"])
        assert difference(results[0]["x"], results[1]["x"]) <= TOLERANCE
    assert len(counts) > 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_quantize(tiny, layout):
    light, stock = tiny.pair(layout=layout)
    source, _ = tiny.audio(600, 600)
    with torch.no_grad():
        (ours, indices), (theirs, stock_indices) = light.quantize(source), stock.quantize(source)
    assert torch.equal(indices, stock_indices)
    assert difference(ours, theirs) <= TOLERANCE


@pytest.mark.parametrize("layout", LAYOUTS)
def test_given_masks_of_frames_and_channels(tiny, layout):
    light, stock = tiny.pair(layout=layout, mask_channel_prob=0.3, mask_channel_length=4)
    x = torch.randn(2, 20, 32)
    frames, channels = tiny.mask(2, 20), tiny.mask(2, 32)[:, None].expand(-1, 20, -1)
    ours, _ = light.apply_mask(x.clone(), None, frames, channels)
    theirs, _ = stock.apply_mask(x.clone(), None, frames, channels)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_can_be_copied(tiny, layout):
    light = tiny.light(layout=layout)
    source, _ = tiny.audio(600)
    twin = copy.deepcopy(light)
    assert torch.equal(features(twin, source)["x"], features(light, source)["x"])
