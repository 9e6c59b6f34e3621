"""Streaming as a user trains it: stock fairseq-hydra-train, w2v2-light infer, and the runtime on what came out."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from noise_corpus import SMALL_RUN, TINY_PRETRAINING, write_noise_corpus

from fairseq_w2v2_light import compat
from fairseq_w2v2_light.cli.infer import infer
from fairseq_w2v2_light.nn.positions import causal_weights
from fairseq_w2v2_light.paths import config_dir, user_dir
from fairseq_w2v2_light.runtime.streaming import StreamingRecognizer

TINY = [
    *TINY_PRETRAINING,
    "model.extractor_mode=layer_norm",
]
POSITIONS = "w2v_encoder.w2v_model.encoder.pos_conv.0.weight_"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_noise_corpus(tmp_path_factory.mktemp("noise"), 8)


def train(config, corpus, save_dir, *overrides):
    """Trains with a recipe; returns the last checkpoint and what was printed."""
    path = os.pathsep.join([str(user_dir().parent), os.environ.get("PYTHONPATH", "")])
    command = [
        str(Path(sys.executable).with_name("fairseq-hydra-train")),
        f"common.user_dir={user_dir()}",
        f"task.data={corpus}",
        "task.normalize=false",
        f"checkpoint.save_dir={save_dir}",
        f"hydra.run.dir={save_dir}/hydra",
        *SMALL_RUN,
        *overrides,
        "--config-dir",
        str(config.parent),
        "--config-name",
        config.stem,
    ]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    output = result.stdout + result.stderr
    assert result.returncode == 0, output[-3000:]
    return save_dir / "checkpoint_last.pt", output


def state(path):
    compat.allow_checkpoint_types()
    return torch.load(str(path), map_location="cpu")


@pytest.fixture(scope="module")
def offline(corpus, tmp_path_factory):
    recipe = config_dir("pretraining") / "light_stochastic_tiny.yaml"
    return train(recipe, corpus, tmp_path_factory.mktemp("offline"), *TINY, "optimization.max_update=2")[0]


@pytest.fixture(scope="module")
def streaming(corpus, offline, tmp_path_factory):
    """An offline checkpoint, fine-tuned for two chunk sizes: two updates, and two more after a resumption."""
    recipe, folder = config_dir("finetuning") / "tiny.yaml", tmp_path_factory.mktemp("streaming")
    overrides = [f"model.w2v_path={offline}", "model.chunk_frames=[12,24]", "model.left_context_frames=48"]
    _, first = train(recipe, corpus, folder, *overrides, "optimization.max_update=2")
    checkpoint, second = train(recipe, corpus, folder, *overrides, "optimization.max_update=4")
    assert "the positions' 8 taps became 5 causal ones" in first
    assert "Loaded checkpoint" in second
    return checkpoint


def test_the_resumed_model_streams_on(streaming, offline):
    saved = state(streaming)
    encoder = saved["cfg"]["model"]["w2v_args"]["model"]
    assert (list(encoder["chunk_frames"]), encoder["left_context_frames"], encoder["conv_pos"]) == ([12, 24], 48, 5)
    assert saved["optimizer_history"][-1]["num_updates"] == 4
    before = state(offline)["model"]
    g, v = causal_weights(*(before[f"encoder.pos_conv.0.weight_{part}"] for part in "gv"))
    after = saved["model"]
    assert after[POSITIONS + "g"].shape == g.shape and after[POSITIONS + "v"].shape == v.shape
    # four updates away from the converted weights, and trained
    assert 0 < (after[POSITIONS + "v"] - v).abs().max() < 0.02


@pytest.fixture(scope="module")
def talkative(streaming, corpus):
    """The same checkpoint with a head that spells something, as a trained one would."""
    saved = state(streaming)
    generator = torch.Generator().manual_seed(0)
    saved["model"]["w2v_encoder.proj.weight"].normal_(std=3.0, generator=generator)
    saved["model"]["w2v_encoder.proj.bias"].zero_()
    saved["model"]["w2v_encoder.proj.bias"][1:4] = -50.0
    path = streaming.with_name("talkative.pt")
    torch.save(saved, str(path))
    return path


@pytest.mark.parametrize("point", ("s1q1k1c12", "s2q2k1c12", ""))
def test_the_stream_says_what_infer_says(talkative, corpus, tmp_path, point):
    overrides = [f"task.data={corpus}", f"common_eval.path={talkative}", f"common_eval.results_path={tmp_path}"]
    (result,) = infer(overrides + ([f"decoding.operating_point={point}"] if point else []))
    assert result["sentences"] == 8
    (hypotheses,) = Path(tmp_path).rglob("hypo.word*")
    expected = {}
    for line in hypotheses.read_text().splitlines():
        text, _, index = line.rpartition("(None-")
        expected[int(index.rstrip(")"))] = " ".join(text.split())
    assert len(expected) == 8 and max(map(len, expected.values())) > 5

    recognizer = StreamingRecognizer.from_checkpoint(talkative, point, endpointing=None)
    assert recognizer.chunk_samples == 320 * (12 if point else 24)
    for index in range(8):
        wave, _ = soundfile.read(str(corpus / f"{index}.wav"), dtype="float32")
        for start in range(0, len(wave), 999):
            recognizer.accept(wave[start : start + 999])
        assert recognizer.finish().text == expected[index]


def test_infer_refuses_a_chunk_that_was_not_trained(streaming, corpus):
    with pytest.raises(ValueError, match=r"s1q1k1c36.*not trained with chunk 36.*\[12, 24\]"):
        infer([f"task.data={corpus}", f"common_eval.path={streaming}", "decoding.operating_point=s1q1k1c36"])


def test_pretraining_with_chunks(corpus, tmp_path):
    recipe = config_dir("pretraining") / "light_stochastic_tiny.yaml"
    overrides = [*TINY, "model.chunk_frames=[24]", "model.left_context_frames=48", "model.lookahead_frames=12"]
    checkpoint, output = train(recipe, corpus, tmp_path, *overrides, "optimization.max_update=2")
    saved = state(checkpoint)
    assert list(saved["cfg"]["model"]["chunk_frames"]) == [24] and saved["cfg"]["model"]["conv_pos"] == 8
    assert saved["model"]["encoder.pos_conv.0.weight_g"].shape == (1, 1, 8)
    assert all(bool(torch.isfinite(value).all()) for value in saved["model"].values())
    assert "done training" in output
