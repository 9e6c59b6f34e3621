"""ONNX folders: onnxruntime gives the logits of the model, whatever the batch and the lengths."""

import contextlib
import io
import json
import os
import re
import sys

import numpy as np
import pytest
import soundfile
import torch
from tiny_checkpoints import STOCHASTIC as POINTS
from tiny_checkpoints import finetuned

from fairseq_w2v2_light.cli.main import main
from fairseq_w2v2_light.compress.prune import prune_checkpoint
from fairseq_w2v2_light.nn.config import PRUNE_UNITS, encoder_config
from fairseq_w2v2_light.nn.operating_point import OperatingPoint
from fairseq_w2v2_light.runtime.ctc import CtcModel
from fairseq_w2v2_light.runtime.folder import write_folder
from fairseq_w2v2_light.runtime.load import load_ctc
from fairseq_w2v2_light.runtime.recognizer import GreedyDecoder
from fairseq_w2v2_light.runtime.text import Labels

for name in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(name, reason="ONNX: pip install onnx onnxscript onnxruntime")

from fairseq_w2v2_light.export import onnx as onnx_export  # noqa: E402
from fairseq_w2v2_light.export.onnx import export_onnx, open_session  # noqa: E402

LETTERS = ["<s>", "<pad>", "</s>", "<unk>", "A", "B", "C", "|"]
LARGE = dict(extractor_norm="layer", conv_bias=True, norm_first=True)
STOCHASTIC = dict(squeeze_factors=(1, 2), query_pools=(1, 2), kv_pools=(1, 2))
# encoder, normalize, operating point, int8
MODELS = {
    "base": (dict(conv_pos=8), True, "", False),
    "shared": (dict(LARGE, unique_layers=1, attention_map_every=2, **STOCHASTIC), False, "s2q2k2", False),
    "SEW": (
        dict(STOCHASTIC, squeeze_factors=(1, 2, 3), squeeze_tail="drop", unsqueeze_residual=False),
        False,
        "s2q1k2",
        False,
    ),
    "streaming": (dict(LARGE, chunk_frames=(4,), left_context_frames=8, lookahead_frames=2), False, "", False),
    "int8": (dict(LARGE, dim=64, ffn_dim=128), True, "", True),
    "shared int8": (
        dict(LARGE, dim=64, ffn_dim=128, unique_layers=1, squeeze_factors=(1, 2, 3), query_pools=(1, 2)),
        False,
        "s2q2k1",
        True,
    ),
}


def ctc_model(normalize=False, symbols=LETTERS, **keys):
    """A tiny model with random norms and biases; no two of its layers are alike."""
    generator = torch.Generator().manual_seed(0)
    shape = dict(
        conv_feature_layers="[(16, 10, 5), (16, 3, 2), (16, 2, 2)]",
        extractor_norm="group",
        encoder_layers=2,
        dim=32,
        ffn_dim=48,
        heads=4,
        conv_pos=7,
        conv_pos_groups=4,
    )
    model = CtcModel(encoder_config(**{**shape, **keys}), symbols, normalize)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            if parameter.dim() == 1 and name.endswith("weight"):
                parameter.add_(1)  # norms
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module", params=MODELS)
def written(request, tmp_path_factory):
    """(model at its point, folder, what export_onnx returned) of each kind."""
    keys, normalize, point, int8 = MODELS[request.param]
    model = ctc_model(normalize, **keys)
    folder = tmp_path_factory.mktemp("onnx") / "model"
    report = export_onnx(model, folder, point, int8)
    if point:
        model.point = OperatingPoint.parse(point)
    return model, folder, report


def audio(*samples):
    """(batch, samples) noise, also after the end of each row, and their lengths (batch,)."""
    wave = torch.randn(len(samples), max(samples), generator=torch.Generator().manual_seed(sum(samples))) + 0.3
    return wave, torch.tensor(samples)


def run(session, wave, lengths):
    logits, frames = session.run(None, {"wave": wave.numpy(), "lengths": lengths.numpy()})
    return torch.from_numpy(logits), frames.tolist()


@pytest.mark.parametrize(
    "samples", ((1333,), (30,), (49,), (2001, 30, 777, 1313), (50, 51), (990,) * 4), ids=lambda s: "-".join(map(str, s))
)
def test_a_batch_has_the_logits_of_its_utterances(written, samples):
    model, folder, report = written
    wave, lengths = audio(*samples)
    logits, frames = run(open_session(folder / "model.onnx", threads=1), wave, lengths)
    expected = [model(wave[row : row + 1, :count])[0][0] for row, count in enumerate(samples)]
    assert frames == [len(alone) for alone in expected] and logits.shape == (len(samples), max(frames), len(LETTERS))
    for row, alone in enumerate(expected):
        difference = (logits[row, : len(alone)] - alone).abs()
        if report.difference > 1e-4:  # int8
            assert difference.norm() <= 0.3 * alone.norm()
        else:
            assert difference.max() <= 1e-4


def test_the_folder_says_what_a_client_needs(written):
    model, folder, report = written
    assert sorted(os.listdir(folder)) == ["README.md", "config.json", "model.onnx", "tokens.txt"]
    assert report.bytes == sum(file.stat().st_size for file in folder.iterdir())
    assert (folder / "tokens.txt").read_text(encoding="utf-8").split("\n") == [*LETTERS, ""]
    config = json.loads((folder / "config.json").read_text())
    assert config["sample_rate"] == 16000 and config["normalize"] is model.normalize and config["blank"] == 0
    assert config["labels"] == {"kind": "letter", "count": 8, "never": [1, 2]} and config["hop"] == model.hop == 20
    assert config["operating_point"] == str(model.point) == str(report.point)
    session = open_session(folder / "model.onnx")
    for kind, values in (("inputs", session.get_inputs()), ("outputs", session.get_outputs())):
        assert {value.name: value.shape for value in values} == {
            name: value["shape"] for name, value in config[kind].items()
        }
        assert [value.type for value in values] == [
            {"float32": "tensor(float)", "int64": "tensor(int64)"}[value["dtype"]] for value in config[kind].values()
        ]


def test_the_file_holds_each_weight_once_and_no_paths(written):
    import onnx

    model, folder, report = written
    graph = onnx.load(str(folder / "model.onnx")).graph
    stored = sum(int(np.prod(value.dims)) for value in graph.initializer)
    parameters = sum(value.numel() for value in model.parameters())
    # scales and zero points of int8, constants
    assert stored <= parameters * 1.05 + 500
    assert os.path.dirname(onnx_export.__file__).encode() not in (folder / "model.onnx").read_bytes()
    int8 = [value for value in graph.initializer if value.data_type == onnx.TensorProto.INT8]
    matrices = [value for value in int8 if len(value.dims) == 2]
    linears = sum(isinstance(module, torch.nn.Linear) for module in model.modules())
    assert len(matrices) == (linears if report.difference > 1e-4 else 0)
    # nothing is left to compute from weights alone, at several depths or at a smaller squeeze factor
    names = {value.name for value in graph.initializer}
    assert not [node.name for node in graph.node if node.input and names.issuperset(node.input)]


def test_the_card_says_whether_padding_changes_logits(written):
    model, folder, report = written
    wave, lengths = audio(990)[0], torch.tensor([700])
    session = open_session(folder / "model.onnx", threads=1)
    alone, _ = run(session, wave[:, :700], lengths)
    padded, _ = run(session, wave, lengths)
    difference = (padded[:, : alone.size(1)] - alone).abs().max()
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert ("changes nothing in it" in card) == (difference < 1e-4)
    assert ("one scale for the whole batch" in card) == (difference > 1e-4) == (report.difference > 1e-4)


def test_the_program_of_the_readme_transcribes(written, tmp_path, monkeypatch):
    model, folder, report = written
    (program,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    wave = audio(3000)[0][0].numpy() * 0.1
    monkeypatch.chdir(folder)
    speech = tmp_path / "speech.wav"
    soundfile.write(speech, np.stack([wave, wave], axis=1), 16000, subtype="FLOAT")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(program.replace("speech.wav", str(speech)), {})
    logits, _ = run(open_session("model.onnx"), torch.from_numpy(wave)[None], torch.tensor([3000]))
    logits[..., [1, 2]] = -torch.inf
    best = torch.unique_consecutive(logits[0].argmax(-1)).tolist()
    assert printed.getvalue() == " ".join(Labels(LETTERS).text(best).split()) + "\n"
    assert printed.getvalue().strip()


@pytest.mark.parametrize(
    "symbols, best, text",
    (
        (LETTERS, "| A A <s> A | <s> | B | | C <unk> <s> |", "AA B C<unk>"),
        ([*LETTERS[:4], "\u2581", "\u2581A", "B"], "\u2581 \u2581A B <s> B \u2581 <s> \u2581", "ABB"),
        ([*LETTERS[:4], "one", "two"], "one <s> one two two", "one one two"),
    ),
    ids=("letter", "sentencepiece", "word"),
)
def test_the_program_of_the_readme_spells_as_the_runtime_does(tmp_path, monkeypatch, symbols, best, text):
    export_onnx(ctc_model(symbols=symbols, encoder_layers=1), tmp_path, check=False)
    (program,) = re.findall(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    indices = [symbols.index(symbol) for symbol in best.split()]
    logits = np.eye(len(symbols), dtype=np.float32)[indices][None]

    class Session:
        def __init__(self, path):
            pass

        def run(self, outputs, inputs):
            return logits, np.array([len(indices)])

    monkeypatch.setattr("onnxruntime.InferenceSession", Session)
    monkeypatch.chdir(tmp_path)
    soundfile.write("speech.wav", np.zeros(400), 16000)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(program, {})
    labels = Labels(symbols)
    words = labels.words(GreedyDecoder(labels).decode(logits[0]), 0.02)
    assert printed.getvalue() == " ".join(word.text for word in words) + "\n" == text + "\n"


def test_a_linear_that_did_not_become_int8_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "_freeze_linears", lambda module: None)
    message = r"model.onnx: 6 weights of Linears are still float32, backbone.encoder.layers.0.fc1.weight among them; .*"
    with pytest.raises(ValueError, match=message + "pip install -U onnxruntime, or export in float32"):
        export_onnx(ctc_model(unique_layers=1, dim=128, ffn_dim=128), tmp_path / "model", int8=True)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("layout, point", (("base", "s1q1k1"), ("large", "s2q1k2")))
def test_a_physically_pruned_checkpoint(tmp_path, layout, point):
    """Unequal heads, FFN and convolution widths, and fewer hidden channels than the norms count."""
    keys = dict(layout=layout, prune_units=list(PRUNE_UNITS), feature_grad_mult=1.0, **POINTS)
    path = finetuned(tmp_path, ctc_keys={"feature_grad_mult": 1.0}, **keys)
    state = torch.load(path, map_location="cpu", weights_only=False)
    generator = torch.Generator().manual_seed(0)
    for name, value in state["model"].items():
        if "gates." in name:
            value.copy_(torch.randn(value.shape, generator=generator) * 3)
    torch.save(state, path)
    prune_checkpoint(path, tmp_path / "pruned.pt")
    model = load_ctc(tmp_path / "pruned.pt")
    model.point = OperatingPoint.parse(point)
    config = model.config
    assert config.dim < config.norm_dim and len({*config.layer_ffn}) > 1
    export_onnx(model, tmp_path / "onnx", point)
    wave, lengths = audio(1333, 400, 777)
    logits, frames = run(open_session(tmp_path / "onnx" / "model.onnx", threads=1), wave, lengths)
    for row, (samples, count) in enumerate(zip(lengths.tolist(), frames)):
        torch.testing.assert_close(logits[row, :count], model(wave[row : row + 1, :samples])[0][0], atol=1e-4, rtol=0)


def test_large_weights_stand_beside_the_graph(tmp_path, monkeypatch):
    import onnx

    monkeypatch.setattr(onnx_export, "_LARGEST_FILE", 1000)
    model = ctc_model(encoder_layers=1)
    export_onnx(model, tmp_path / "model")
    assert sorted(os.listdir(tmp_path / "model"))[2:4] == ["model.onnx", "model.onnx.data"]
    graph = onnx.load(str(tmp_path / "model" / "model.onnx"), load_external_data=False).graph
    outside = [value for value in graph.initializer if value.external_data]
    assert outside and {
        entry.value for value in outside for entry in value.external_data if entry.key == "location"
    } == {"model.onnx.data"}
    os.rename(tmp_path / "model", tmp_path / "moved")
    wave, lengths = audio(500)
    logits, _ = run(open_session(tmp_path / "moved" / "model.onnx"), wave, lengths)
    torch.testing.assert_close(logits, model(wave)[0], atol=1e-4, rtol=0)


def test_a_graph_that_computes_something_else_is_not_kept(tmp_path, monkeypatch):
    write = onnx_export._write_graph

    def another(model, path, opset):
        model.head.bias += 0.01
        write(model, path, opset)
        model.head.bias -= 0.01

    monkeypatch.setattr(onnx_export, "_write_graph", another)
    with pytest.raises(
        ValueError, match=r"model.onnx: logits of 30 samples in a batch of \[30\] differ .* 0.01 .* 1e-04"
    ):
        export_onnx(ctc_model(encoder_layers=1), tmp_path / "model")
    assert not os.listdir(tmp_path)


def test_the_verb(tmp_path, capsys):
    write_folder(ctc_model(encoder_layers=1, **STOCHASTIC), tmp_path / "folder")
    source, out = str(tmp_path / "folder"), str(tmp_path / "onnx")
    assert main(["export", source, out, "--format", "onnx", "--dtype", "int8", "--operating-point", "s2q1k2"]) == 0
    assert "int8, operating point s2q1k2, 0." in capsys.readouterr().out
    assert json.loads((tmp_path / "onnx" / "config.json").read_text())["dtype"] == "int8"


@pytest.mark.parametrize(
    "arguments, message",
    (
        (["--dtype", "bfloat16"], "--dtype: found 'bfloat16', expected float32 or int8 with --format onnx"),
        (["--operating-point", "s3q1k1"], "the model was not trained with squeeze factor 3"),
        (["--sentencepiece", "x"], "--sentencepiece: is for --format folder, not for --format onnx"),
    ),
)
def test_what_the_verb_refuses(tmp_path, capsys, arguments, message):
    write_folder(ctc_model(encoder_layers=1), tmp_path / "folder")
    out = tmp_path / "onnx"
    assert main(["export", str(tmp_path / "folder"), str(out), "--format", "onnx", *arguments]) == 2
    assert message in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize(
    "change, message",
    (
        (lambda model: model.half(), r"parameter 'backbone.* is torch.float16 on cpu; expected torch.float32"),
        (lambda model: setattr(model, "prepared", True), r"the model was prepared for this machine; load it again"),
        (lambda model: None, r"the model has gates, .* w2v2-light prune"),
    ),
)
def test_models_that_cannot_be_exported(tmp_path, change, message):
    model = ctc_model(encoder_layers=1, prune_units=("heads",) if "gates" in message else ())
    change(model)
    with pytest.raises(ValueError, match=message):
        export_onnx(model, tmp_path / "model")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"not installed here: pip install onnxruntime$"):
        export_onnx(ctc_model(encoder_layers=1), tmp_path / "model")
