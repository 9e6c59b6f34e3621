"""Other implementations with our weights: the same logits, or a reason why there are none."""

import sys

import pytest
import torch
from tiny_checkpoints import MODELS, STOCHASTIC, STREAMING, finetuned

from fairseq_w2v2_light.nn import OperatingPoint
from fairseq_w2v2_light.runtime.load import load_ctc
from fairseq_w2v2_light.runtime.prepare import prepare_
from fairseq_w2v2_light.runtime.quantized import quantize_
from fairseq_w2v2_light.study.peers import PEERS, hugging_face, onnx_runtime, onnx_runtime_int8, stock_fairseq

UNSHARED_MAPS = dict(layout="large", layer_map="0,1,0", normalize=True)


def needs(peer):
    """Skips the test where a peer's packages are missing."""
    if peer == "huggingface":
        sys.modules.setdefault("torchaudio", None)
        pytest.importorskip("transformers", reason="Hugging Face's classes: pip install transformers")
    if peer.startswith("onnx"):
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package, reason="export to ONNX: pip install onnx onnxscript onnxruntime")


def tiny(folder, normalize=False, **keys):
    return load_ctc(finetuned(folder, task={"normalize": normalize}, **keys))


@pytest.mark.parametrize("peer", ["fairseq", "huggingface", "onnx"])
@pytest.mark.parametrize("keys", [MODELS["base"], UNSHARED_MAPS], ids=["base", "shared layers, normalised"])
@torch.no_grad()
def test_a_peer_has_our_logits_of_one_utterance_and_of_several(tmp_path, peer, keys):
    needs(peer)
    model = tiny(tmp_path, **keys)
    other = PEERS[peer](model)
    for shape in ((1, 1200), (3, 801)):
        wave = 2 * torch.randn(*shape) + 0.5
        expected = model(wave)[0]
        assert other(wave).shape == expected.shape
        assert float((other(wave) - expected).abs().max()) <= 1e-4


@torch.no_grad()
def test_a_stochastic_model_runs_as_its_peers_at_points_that_they_have(tmp_path):
    model = tiny(tmp_path, layout="base", **STOCHASTIC)
    wave, point = torch.randn(1, 1200), OperatingPoint.parse("s1q1k1")
    assert float((stock_fairseq(model)(wave) - model(wave)[0]).abs().max()) <= 1e-4
    with pytest.raises(ValueError, match="stock fairseq cannot express this model: operating point s1q2k1 pools"):
        stock_fairseq(model, OperatingPoint.parse("s1q2k1"))
    with pytest.raises(ValueError, match="squeeze factor 3"):
        stock_fairseq(model, OperatingPoint.parse("s3q1k1"))
    needs("huggingface")
    assert float((hugging_face(model, point)(wave) - model(wave, point=point)[0]).abs().max()) <= 1e-4


@torch.no_grad()
def test_sew_is_a_peer_of_hugging_face_but_not_of_fairseq(tmp_path):
    sew = dict(squeeze_factors=[2], unsqueeze_residual=False, squeeze_tail="drop", conv_pos=7, projection_hidden_dim=24)
    model = tiny(tmp_path, name="stochastic_sew", **sew)
    with pytest.raises(ValueError, match="stock fairseq cannot express this model: .*squeeze"):
        stock_fairseq(model)
    needs("huggingface")
    wave = torch.randn(1, 1200)
    assert float((hugging_face(model)(wave) - model(wave)[0]).abs().max()) <= 1e-4


@torch.no_grad()
def test_onnxruntime_runs_every_point_with_as_many_threads_as_torch_and_in_int8(tmp_path):
    needs("onnx")
    model, point, wave = tiny(tmp_path, **MODELS["stochastic"]), OperatingPoint.parse("s2q1k2"), torch.randn(2, 1200)
    expected, other = model(wave, point=point)[0], onnx_runtime(model, point)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert float((other(wave) - expected).abs().max()) <= 1e-4
            assert other._session.get_session_options().intra_op_num_threads == count
    finally:
        torch.set_num_threads(threads)
    error = onnx_runtime_int8(model, point)(wave) - expected
    assert 1e-5 < float(error.abs().max()) < float(expected.abs().max())


@pytest.mark.parametrize(
    "keys, reason",
    [
        (dict(layout="large", **STREAMING), "it is a streaming model"),
        (MODELS["shared layers"], r"layers reuse attention maps \(attention_map_every=2\)"),
        (dict(layout="base", layer_heads=[4, 2, 4]), r"its layers have \[2, 4\] attention heads"),
        (dict(layout="base", prune_units=["ffn"], ctc_keys={"feature_grad_mult": 1.0}), "it has gates"),
        (dict(layout="base", project_features=True, encoder_embed_dim=16), "it has no projection"),
    ],
)
def test_a_peer_says_what_it_lacks(tmp_path, keys, reason):
    with pytest.raises(ValueError, match=f"stock fairseq cannot express this model: .*{reason}"):
        stock_fairseq(tiny(tmp_path, **keys))


@pytest.mark.parametrize("change", [quantize_, lambda model: prepare_(model, "float32")], ids=["int8", "prepared"])
def test_a_model_that_has_no_plain_weights_any_more_is_refused(tmp_path, change):
    model = tiny(tmp_path, **MODELS["base"])
    change(model)
    with pytest.raises(ValueError, match="load the model that it was made from"):
        stock_fairseq(model)


@pytest.mark.parametrize(
    "peer, package, reason",
    [
        ("fairseq", "fairseq.models.wav2vec.wav2vec2", "stock fairseq: not installed here .*: pip install"),
        ("huggingface", "transformers", "Hugging Face: not installed here .*: pip install transformers safetensors"),
        ("onnx", "onnxruntime", "export to ONNX needs packages .*onnxruntime"),
    ],
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, peer, package, reason):
    if peer == "onnx":
        needs(peer)
    model = tiny(tmp_path, **MODELS["base"])
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=reason):
        PEERS[peer](model)
