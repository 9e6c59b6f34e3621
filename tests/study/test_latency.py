"""The stated latency against networks: which samples do their frames depend on?"""

import json

import pytest
import torch
from tiny_checkpoints import LAYOUTS, SHAPE, container, ctc_model, save_checkpoint, save_ctc

from fairseq_w2v2_light.cli.main import main
from fairseq_w2v2_light.models import W2V2LightConfig, W2V2LightModel
from fairseq_w2v2_light.models.checkpoint import load_encoder
from fairseq_w2v2_light.nn import Backbone, OperatingPoint, encoder_config
from fairseq_w2v2_light.nn.counts import count_macs
from fairseq_w2v2_light.nn.frontend import receptive_field
from fairseq_w2v2_light.study.cost import cost, load_subject
from fairseq_w2v2_light.study.latency import algorithmic_latency

# receptive field 30 samples, hop 20
SMALL = "[(6, 10, 5), (6, 3, 2), (6, 2, 2)]"
STOCK = "[(4, 10, 5)] + [(4, 3, 2)] * 4 + [(4, 2, 2)] * 2"


def network(**changes):
    """A streaming network with random weights (norms and biases too), in float64."""
    keys = dict(
        conv_feature_layers=SMALL,
        extractor_norm="layer",
        encoder_layers=2,
        dim=8,
        ffn_dim=12,
        heads=2,
        conv_pos=4,
        conv_pos_groups=2,
        chunk_frames=(4,),
        left_context_frames=8,
    )
    torch.manual_seed(0)
    model = Backbone(encoder_config(**{**keys, **changes})).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def dependence(model, samples, point=None):
    """(frames, samples): the gradient of a random projection of each frame with respect to each sample."""
    hop = receptive_field(model.config.conv_layers)[1]
    frames = samples // hop
    generator = torch.Generator().manual_seed(1)
    wave = torch.randn(1, samples, dtype=torch.float64, generator=generator).repeat(frames, 1).requires_grad_()
    y = model.encode(wave, point=point)[0].x
    assert y.shape[:2] == (frames, frames)
    weights = torch.randn(y.size(-1), dtype=torch.float64, generator=generator)
    # one frame of each row, so that row t's gradient is that of frame t
    (y.diagonal(dim1=0, dim2=1).transpose(0, 1) @ weights).sum().backward()
    return wave.grad


def assert_causal_to_the_sample(model, samples, point=None):
    """No frame hears a sample at or beyond the stated latency; the first frame of a chunk hears the one before."""
    stated = algorithmic_latency(model.config, point)
    hop = receptive_field(model.config.conv_layers)[1]
    chunk = model.config.operating_points.check(point or OperatingPoint()).chunk
    gradient = dependence(model, samples, point)
    tight = 0
    for frame in range(len(gradient)):
        end = hop * frame + stated.total
        assert not gradient[frame, end:].any(), f"frame {frame} hears a sample {stated.total} or more after its first"
        if frame % chunk == 0 and end <= samples:
            assert gradient[frame, end - 1] != 0, f"frame {frame} does not hear the last sample that it waits for"
            tight += 1
    assert tight >= 2


@pytest.mark.parametrize(
    "point, changes",
    [
        ("s1q1k1c4", {}),
        ("s1q1k1c4", {"norm_first": True, "conv_bias": True}),
        ("s1q1k1c4", {"encoder_layers": 5}),
        ("s1q1k1c1", {"chunk_frames": (1,)}),
        ("s1q1k1c4", {"left_context_frames": 0}),
        ("s1q1k1c4", {"lookahead_frames": 3, "encoder_layers": 4}),
        ("s1q1k1c2", {"chunk_frames": (2,), "lookahead_frames": 5}),
        ("s2q1k1c4", {"squeeze_factors": (1, 2)}),
        ("s2q1k1c4", {"squeeze_factors": (2,), "squeeze_tail": "drop", "unsqueeze_residual": False}),
        ("s1q2k2c4", {"query_pools": (2,), "kv_pools": (2,), "lookahead_frames": 2}),
        ("s2q2k1c8", {"squeeze_factors": (2,), "query_pools": (2,), "chunk_frames": (8,), "lookahead_frames": 4}),
        ("s1q1k1c4", {"encoder_layers": 4, "unique_layers": 2, "attention_map_every": 2, "lookahead_frames": 2}),
        ("s1q1k2c4", {"kv_pools": (1, 2), "norm_first": True, "lookahead_frames": 4}),
    ],
)
def test_no_frame_hears_beyond_the_latency_and_some_hear_up_to_it(point, changes):
    assert_causal_to_the_sample(network(**changes), 20 * 21 + 7, OperatingPoint.parse(point))


@pytest.mark.parametrize("point", ["s1q1k1c4", "s1q1k1c6", "s1q1k1c12"])
def test_every_chunk_of_a_dynamic_model(point):
    model = network(chunk_frames=(4, 6, 12), lookahead_frames=2)
    assert_causal_to_the_sample(model, 20 * 30, OperatingPoint.parse(point))


@pytest.mark.parametrize("recipe, milliseconds", [("240ms", 240), ("480ms", 480), ("960ms", 960)])
def test_the_recipes_hear_as_far_as_their_name_says(recipe, milliseconds):
    """The recipe's frontend shapes, chunk, left context and depth, with few channels."""
    config = load_subject(f"distillation/streaming_{recipe}", []).network
    model = network(
        conv_feature_layers=STOCK,
        chunk_frames=config.operating_points.chunk,
        left_context_frames=config.left_context,
        lookahead_frames=config.lookahead,
        conv_pos=config.conv_pos,
        norm_first=config.norm_first,
    )
    assert [layer[1:] for layer in model.config.conv_layers] == [layer[1:] for layer in config.conv_layers]
    assert algorithmic_latency(config).total == 16 * milliseconds == algorithmic_latency(model.config).total
    assert_causal_to_the_sample(model, 2 * 16 * milliseconds + 2000)


@pytest.mark.parametrize("changes", [{"chunk_frames": ()}, {"chunk_frames": (0, 4)}])
def test_without_a_chunk_the_last_sample_is_heard_by_the_first_frame(changes):
    model = network(**changes)
    assert algorithmic_latency(model.config) is None
    hop, samples = 20, 600
    if not model.config.streams:
        samples += 10
    gradient = torch.autograd.functional.jacobian(
        lambda wave: model.encode(wave)[0].x[0, 0].sum(), torch.randn(1, samples, dtype=torch.float64)
    )
    assert gradient[0, samples // hop * hop - 1] != 0


def test_parts_add_up():
    config = network(conv_feature_layers=STOCK, chunk_frames=(24,), lookahead_frames=6).config
    found = algorithmic_latency(config)
    assert (found.frontend, found.positions, found.chunk, found.lookahead) == (320, 0, 23 * 320, 6 * 320)
    assert found.total == 30 * 320
    waits = [found.total - frame * 320 for frame in range(24)]
    assert found.mean == sum(waits) / 24


# the command line


def printed(capsys, *arguments):
    assert main(["cost", *arguments]) == 0
    return capsys.readouterr().out


def test_the_480_ms_recipe_says_so_with_its_breakdown(capsys):
    table = printed(capsys, "distillation/streaming_480ms", "--latency")
    assert table.splitlines()[0] == "light_ctc at s1q1k1c24: algorithmic latency 480.0 ms"
    rows = {line[:18].strip(): line[18:].split() for line in table.splitlines()}
    assert rows["frontend window"][:2] == ["320", "20.0"] and rows["positions"][:2] == ["0", "0.0"]
    assert rows["chunk"][:2] == ["7,360", "460.0"] and rows["look-ahead"][:2] == ["0", "0.0"]
    assert rows["total"][:2] == ["7,680", "480.0"] and rows["mean"][:2] == ["4,000", "250.0"]
    assert "400 samples (25.0 ms), 80 samples (5.0 ms) of it before the frame" in table
    assert "causal: 64 frames (1280.0 ms) of the past" in table
    assert "its other chunks" not in table and "note:" not in table


def test_a_dynamic_model_lists_every_chunk_its_default_first(capsys):
    result = json.loads(printed(capsys, "distillation/streaming_dynamic", "--latency", "--json"))
    assert [entry["operating_point"] for entry in result["points"]] == ["s1q1k1c48", "s1q1k1c24", "s1q1k1c12"]
    assert [entry["ms"]["total"] for entry in result["points"]] == [960.0, 480.0, 240.0]
    assert result["unbounded"] == result["advice"] == []
    table = printed(capsys, "distillation/streaming_dynamic", "--latency")
    assert table.index("latency 960.0 ms") < table.index("its other chunks") < table.index("s1q1k1c24")


def test_one_operating_point_of_it(capsys):
    table = printed(capsys, "distillation/streaming_dynamic", "--latency", "--operating-point", "s1q1k1c12")
    assert "at s1q1k1c12: algorithmic latency 240.0 ms" in table and "s1q1k1c24" not in table


def test_look_ahead_counts(capsys):
    table = printed(capsys, "distillation/streaming_480ms", "model.lookahead_frames=6", "--latency")
    assert "algorithmic latency 600.0 ms" in table and "6 frames after the chunk" in table


def test_why_an_offline_model_has_no_latency(capsys):
    table = printed(capsys, "pretraining/w2v2_light_base", "--latency")
    assert "at s1q1k1: algorithmic latency unbounded" in table
    assert "attention: a frame hears the whole utterance, in each of 12 layers" in table
    assert "frontend: extractor_mode=default, a GroupNorm over the whole utterance" in table
    assert "a centred kernel of 128 taps hears 63 frames (1260.0 ms) ahead" in table
    assert "start from a model that was trained with extractor_mode=layer_norm" in table
    assert "train with model.chunk_frames=[24]" in table and "task.normalize" not in table
    result = json.loads(printed(capsys, "pretraining/w2v2_light_base", "--latency", "--json"))
    assert result["points"][0]["samples"] is None and len(result["unbounded"]) == 3


def test_normalised_audio_is_a_reason_too(capsys):
    table = printed(capsys, "distillation/tiny", "--latency")
    assert "audio: task.normalize=true" in table and "--input-level" in table and "GroupNorm" not in table
    table = printed(capsys, "pretraining/w2v2_light_tiny", "model.chunk_frames=[24]", "--latency")
    assert "latency 480.0 ms" in table and "note: task.normalize is true" in table


def test_a_model_trained_for_chunks_and_whole_utterances(capsys):
    table = printed(capsys, "distillation/streaming_480ms", "model.chunk_frames=[0,24]", "--latency")
    assert "at s1q1k1: algorithmic latency unbounded" in table and "--operating-point s1q1k1c24" in table
    assert "positions:" not in table and "s1q1k1c24                  480.0" in table


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["distillation/streaming_480ms", "--operating-point", "s1q1k1c12"], "not trained with chunk 12"),
        (["pretraining/w2v2_light_base", "model.chunk_frames=[24]"], "extractor_mode: found 'default', a GroupNorm"),
        (["distillation/streaming_480ms", "model.squeeze_factors=[5]"], "chunk_frames: 24 frames are no multiple of 5"),
    ],
)
def test_bad_input_gets_a_message(arguments, message, capsys):
    assert main(["cost", *arguments, "--latency"]) == 2
    assert message in capsys.readouterr().err


# what streaming costs


def test_the_480_ms_student_is_s3_with_fewer_taps():
    """128 taps of positions become 65; the rest is S3 of a teacher trained on LV-60k."""
    shape = ["model.extractor_mode=layer_norm", "model.conv_bias=true", "model.layer_norm_first=true"]
    offline = cost(load_subject("distillation/distillw2v2_s3", shape))
    streaming = cost(load_subject("distillation/streaming_480ms", []))
    fewer = {
        part: offline["parameters_by_part"][part] - count for part, count in streaming["parameters_by_part"].items()
    }
    assert fewer.pop("positions") == (384 * 384 // 16 + 1) * (128 - 65) and not any(fewer.values())
    assert streaming["operating_point"] == "s1q1k1c24"
    assert streaming["operating_points"] == ["s1q1k1c24"]


def test_a_shorter_chunk_costs_more_with_look_ahead():
    """Every chunk runs its look-ahead frames again."""
    points = [OperatingPoint(chunk=chunk) for chunk in (12, 24, 48)]
    ffn, without = (
        [count_macs(subject.network, 16 * 9600, point)["ffn"] for point in points]
        for subject in (
            load_subject("distillation/streaming_dynamic", [f"model.lookahead_frames={frames}"]) for frames in (6, 0)
        )
    )
    assert ffn[0] > ffn[1] > ffn[2] > without[0] == without[1] == without[2]


@pytest.fixture(scope="module")
def offline_checkpoint(tmp_path_factory):
    """A pre-trained offline model of ours that could stream."""
    cfg = W2V2LightConfig(**SHAPE, **LAYOUTS["large"])
    path = tmp_path_factory.mktemp("offline") / "offline.pt"
    return save_checkpoint(path, container(cfg, "w2v2_light"), W2V2LightModel(cfg).state_dict())


def test_an_offline_checkpoint_gets_causal_positions(offline_checkpoint):
    """The kernel that training gives it: 5 of 8 taps."""
    assert load_encoder(offline_checkpoint).cfg.model.conv_pos == 8
    start = f"model.w2v_path={offline_checkpoint}"
    chunk = "model.chunk_frames=[4]"
    for subject in (
        load_subject("finetuning/tiny", [start, chunk]),
        load_subject(offline_checkpoint, [chunk, "model.lookahead_frames=4"]),
    ):
        assert (subject.network.conv_pos, subject.network.operating_points.chunk) == (5, (4,))
    assert load_subject("finetuning/tiny", [start]).network.conv_pos == 8
    assert load_subject(offline_checkpoint, [chunk, "model.conv_pos=6"]).network.conv_pos == 6
    assert load_subject("distillation/streaming_tiny", [start, "model.chunk_frames=[8]"]).network.left_context == 300


def test_a_streaming_checkpoint_keeps_its_positions(tmp_path, offline_checkpoint):
    model = ctc_model(offline_checkpoint, chunk_frames=[4], left_context_frames=8)
    path = save_ctc(tmp_path / "streaming.pt", model)
    subject = load_subject(path, ["model.chunk_frames=[8]"])
    assert (subject.network.conv_pos, subject.network.left_context) == (5, 8)
    assert cost(load_subject(path, []), 1.0)["operating_point"] == "s1q1k1c4"
    assert main(["cost", path, "--latency"]) == 0
