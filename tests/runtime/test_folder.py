"""Model folders: the model that was written comes back, and nothing in a folder is trusted."""

import json
import os
import struct
import subprocess
import sys

import pytest
import torch
from tiny_checkpoints import MODELS, STOCHASTIC, finetuned, random_audio

from fairseq_w2v2_light.export.folder import export_folder
from fairseq_w2v2_light.nn.config import EncoderConfig
from fairseq_w2v2_light.nn.operating_point import OperatingPointSpace
from fairseq_w2v2_light.paths import user_dir
from fairseq_w2v2_light.runtime.config_json import network_from_dict, network_to_dict
from fairseq_w2v2_light.runtime.folder import is_model_folder, read_folder, save_weights, write_folder
from fairseq_w2v2_light.runtime.load import load_ctc
from fairseq_w2v2_light.runtime.operating import record


@pytest.fixture(scope="module")
def made_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folder")
    export_folder(finetuned(folder, **STOCHASTIC), folder / "model")
    return folder / "model"


@pytest.fixture
def model_folder(made_once, tmp_path):
    """A model folder for the test to change."""
    write_folder(read_folder(made_once), tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder, *keys, value):
    """Sets one key of config.json, by the names on the way to it."""
    config = json.loads((folder / "config.json").read_text())
    section = config
    for key in keys[:-1]:
        section = section[key]
    section[keys[-1]] = value
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("kind", MODELS)
def test_a_folder_gives_the_logits_of_its_checkpoint(tmp_path, kind):
    path = finetuned(tmp_path, **MODELS[kind])
    expected = load_ctc(path)
    export_folder(path, tmp_path / "model")
    assert sorted(os.listdir(tmp_path / "model")) == ["README.md", "config.json", "model.safetensors", "tokens.txt"]
    found = load_ctc(tmp_path / "model")
    counts = torch.tensor([900, 700, 432, 500])
    wave, _ = random_audio(*counts.tolist())
    for point in expected.config.operating_points.points():
        assert all(torch.equal(*pair) for pair in zip(found(wave, counts, point), expected(wave, counts, point)))
    assert torch.equal(found(wave[:1])[0], expected(wave[:1])[0])
    own = [(model.symbols, model.normalize, model.sample_rate, model.point) for model in (found, expected)]
    assert own[0] == own[1] and found.config == expected.config
    assert not found.training and not any(parameter.requires_grad for parameter in found.parameters())


def test_a_folder_of_a_folder_is_the_same(made_once, tmp_path):
    export_folder(made_once, tmp_path / "copy")
    for name in ("config.json", "model.safetensors", "tokens.txt"):
        assert (tmp_path / "copy" / name).read_bytes() == (made_once / name).read_bytes()


def test_bfloat16_is_half_as_large(made_once, tmp_path):
    export_folder(made_once, tmp_path / "half", dtype="bfloat16")
    model, exact = read_folder(tmp_path / "half"), read_folder(made_once)
    assert model.stored_dtype == "bfloat16" and exact.stored_dtype == "float32"
    assert torch.equal(model.head.weight, exact.head.weight.bfloat16().float())
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (tmp_path / "half", made_once)]
    assert sizes[0] < 0.7 * sizes[1]  # of so small a model, a third is names


def test_a_shared_layer_is_stored_once(tmp_path):
    export_folder(finetuned(tmp_path, unique_layers=1), tmp_path / "one")
    names = read_folder(tmp_path / "one").state_dict()
    assert {name.split(".")[3] for name in names if ".layers." in name} == {"0"}


def test_the_card_and_the_configuration_say_how_it_was_made(made_once):
    about = json.loads((made_once / "config.json").read_text())["about"]
    assert about["training"] == {"criterion": "ctc", "updates": 3, "seed": 7}
    assert [point["point"] for point in about["operating_points"]][:2] == ["s1q1k1", "s1q1k2"]
    assert about["operating_points"][0]["macs"] > about["operating_points"][-1]["macs"] > 0
    card = (made_once / "README.md").read_text()
    for text in ("| s2q2k2 | ", "- updates: 3", "w2v2-light transcribe", f"{about['parameters'] / 1e6:.2f} M"):
        assert text in card


@pytest.mark.parametrize("dtype, kept", [("float32", 3), ("bfloat16", 1), ("int8", 0)])
def test_what_a_folder_says_is_kept_where_it_still_holds(made_once, tmp_path, dtype, kept):
    export_folder(made_once, tmp_path / "model")
    entries = [("s1q1k1", 5.0, "float32"), ("s1q2k1", 6.0, "bfloat16"), ("s1q1-2-1k1", 7.0, "float32")]
    record(tmp_path / "model", [dict(point=point, wer=wer, dtype=kind) for point, wer, kind in entries])
    edit_config(tmp_path / "model", "about", "note", value="mine")
    edit_config(tmp_path / "model", "about", "parameters", value=1)
    export_folder(tmp_path / "model", tmp_path / "again", dtype=dtype)
    about = json.loads((tmp_path / "again" / "config.json").read_text())["about"]
    assert about["note"] == "mine" and about["parameters"] > 1
    points = {entry["point"]: entry for entry in about["operating_points"]}
    assert sum("wer" in entry for entry in points.values()) == kept
    assert points["s1q1k1"]["macs"] > 0 and points["s1q1k1"].get("wer") == (5.0 if dtype == "float32" else None)
    assert ("s1q1-2-1k1" in points) == (dtype == "float32")
    assert points["s1q2k1"].get("wer") == (None if dtype == "int8" else 6.0)


def test_a_configuration_survives_json():
    config = EncoderConfig(
        conv_layers=((16, 10, 5), (8, 3, 2)),
        layer_map=(0, 1, 0, 1),
        operating_points=OperatingPointSpace((1, 2), (1,), (1, 2), 4, per_layer=True, chunk=(0, 4)),
        unsqueeze_factor=2,
        extractor_norm="layer",
        layer_heads=(2, 0),
        conv_norm_dims=(16, 16),
        dropout=0.1,
    )
    assert network_from_dict(json.loads(json.dumps(network_to_dict(config))), "network") == config


WITHOUT = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("fairseq", "hydra", "omegaconf", "torchaudio", "transformers"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
from fairseq_w2v2_light.cli.main import main
from fairseq_w2v2_light.runtime.load import load_ctc

assert main(["export", sys.argv[1], sys.argv[2]]) == 0
print(load_ctc(sys.argv[2]).point)
"""


def test_export_needs_no_fairseq(tmp_path):
    command = [sys.executable, "-c", WITHOUT, finetuned(tmp_path, operating_point="s2q1k2", **STOCHASTIC), "out"]
    env = {**os.environ, "PYTHONPATH": str(user_dir().parent)}
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.splitlines()[-1] == "s2q1k2"


# ---- what is not trusted


@pytest.mark.parametrize(
    "keys, value, message",
    [
        (["format"], "other", "format: found 'other', expected 'fairseq_w2v2_light'"),
        (["version"], 2, "version: found 2, expected 1 to 1; a newer fairseq_w2v2_light wrote it"),
        (["version"], True, "version: found True"),
        (["extra"], 1, "'extra': unknown key"),
        (["about"], [], r"about: found \[\], expected an object"),
        (["weights", "dtype"], "float8", "weights.dtype: found 'float8', expected one of float32, bfloat16"),
        (["weights", "dtype"], ["float32"], "weights.dtype: found"),
        (["weights", "file"], "../../secret.safetensors", "weights.file: unknown key"),
        (["ctc", "tokens"], "/etc/passwd", "ctc.tokens: unknown key"),
        (["ctc", "normalize"], 1, "ctc.normalize: found 1, expected bool"),
        (["ctc", "sample_rate"], 0, "ctc.sample_rate: found 0"),
        (["ctc", "operating_point"], "s9q1k1", "not trained with squeeze factor 9"),
        (["ctc", "operating_point"], "../x", "operating point '../x'"),
        (["network"], None, "network: found None, expected an object"),
        (["network", "dim"], "32", "network.dim: found '32', expected int"),
        (["network", "dim"], 10**30, "network.dim: found 1000000000000000000000000000000, expected 1 to"),
        (["network", "dim"], 33, "heads do not divide"),
        (["network", "unheard"], 1, "network.unheard: unknown key"),
        (["network", "activation"], "eval", "activation_fn: found 'eval'"),
        (["network", "layer_map"], [0] * 5000, "network.layer_map: found 5,000 entries, expected at most 1,000"),
        (["network", "layer_map"], [0, 2, 0], r"layer_map: found \[0, 2, 0\], expected the stored layer"),
        (["network", "layer_map"], [], r"layer_map: found \[\]"),
        (["network", "conv_layers"], [[16, -3, 5]], "conv_layers: found .* expected positive"),
        (["network", "conv_layers"], [[16, 3]], r"network.conv_layers\[0\]: found \[16, 3\], expected a list of 3"),
        (["network", "operating_points", "depth"], 9, "operating_points.depth: found 9, but layer_map has 3 layers"),
        (["network", "operating_points", "squeeze"], [0], "squeeze_factors: found"),
        (["network", "ffn_dim"], 49, r"fc1.weight': found shape \(48, 32\), but the configuration asks for \(49, 32\)"),
    ],
)
def test_a_configuration_that_is_wrong(model_folder, keys, value, message):
    edit_config(model_folder, *keys, value=value)
    with pytest.raises(ValueError, match=message) as error:
        load_ctc(model_folder)
    assert str(model_folder) in str(error.value)


@pytest.mark.parametrize(
    "text, message",
    [
        (b"", "not JSON"),
        (b"[1]", "found a list, expected an object"),
        (b"[" * 100_000, "not JSON"),
        (b"\xff\xfe{}", "no UTF-8 text"),
        (b'{"architectures": ["Wav2Vec2ForCTC"]}', "a Hugging Face model becomes a checkpoint of ours"),
    ],
)
def test_a_configuration_that_is_none(model_folder, text, message):
    (model_folder / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=message):
        load_ctc(model_folder)


def test_missing_files(model_folder):
    (model_folder / "tokens.txt").unlink()
    with pytest.raises(FileNotFoundError, match="tokens.txt: no such file; expected a model folder"):
        load_ctc(model_folder)
    (model_folder / "config.json").unlink()
    assert not is_model_folder(model_folder)
    with pytest.raises(ValueError, match="a folder; give the checkpoint file in it"):
        load_ctc(model_folder)


def test_labels_that_do_not_fit(model_folder):
    (model_folder / "tokens.txt").write_text("<s>\nA\n\nB\n")
    with pytest.raises(ValueError, match="tokens.txt:3: found an empty line"):
        load_ctc(model_folder)
    (model_folder / "tokens.txt").write_text("<s>\nA\n")
    with pytest.raises(ValueError, match=r"'head.weight': found shape \(8, 32\).* asks for \(2, 32\)"):
        load_ctc(model_folder)


def test_links_that_lead_out_of_the_folder(model_folder, tmp_path):
    (tmp_path / "secret.txt").write_text("password\n")
    (model_folder / "tokens.txt").unlink()
    (model_folder / "tokens.txt").symlink_to("../secret.txt")
    with pytest.raises(ValueError, match="tokens.txt: a link that leads out of the folder"):
        load_ctc(model_folder)


def lying_header(data):
    """A safetensors file whose header promises more than there is."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header["head.weight"]["data_offsets"][1] += 1 << 40
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"",
        lambda data: data[:100],
        lambda data: data[:-10],
        lambda data: struct.pack("<Q", 1 << 62) + data[8:],
        lying_header,
        lambda data: b"\x80\x02cos\nsystem\n.",
    ],
)
def test_weights_that_are_not_whole(model_folder, change):
    file = model_folder / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ValueError, match="model.safetensors: not a complete safetensors file"):
        load_ctc(model_folder)


def test_weights_that_are_not_finite(made_once, tmp_path):
    model = read_folder(made_once)
    model.head.weight[1, 2] = torch.nan
    write_folder(model, tmp_path / "broken")
    with pytest.raises(ValueError, match="'head.weight' has NaN or infinite values"):
        load_ctc(tmp_path / "broken")


def test_a_dictionary_beside_a_folder_is_refused(made_once, tmp_path):
    with pytest.raises(ValueError, match="a model folder has its own labels; leave out --dictionary"):
        load_ctc(made_once, tmp_path / "dict.ltr.txt")


# ---- writing


def test_an_earlier_export_is_replaced_and_anything_else_is_not(made_once, tmp_path):
    model, out = read_folder(made_once), tmp_path / "out"
    write_folder(model, out, {"note": 1})
    write_folder(model, out, {"note": 2})
    assert json.loads((out / "config.json").read_text())["about"] == {"note": 2}
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="out: the folder holds 'thesis.tex' and would be replaced"):
        write_folder(model, out)
    with pytest.raises(ValueError, match="thesis.tex: a file, expected the name of a folder"):
        write_folder(model, out / "thesis.tex")
    assert (out / "thesis.tex").read_text() == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_failure_leaves_what_was_there(made_once, tmp_path):
    model, out = read_folder(made_once), tmp_path / "out"
    write_folder(model, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(FileNotFoundError):
        write_folder(model, out, sentencepiece=tmp_path / "missing.model")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    with pytest.raises(ValueError, match="dtype: found 'int3', expected one of float32, bfloat16"):
        write_folder(model, out, dtype="int3")


def test_others_may_read_it_as_the_umask_says(made_once):
    mask = os.umask(0)
    os.umask(mask)
    assert {entry.name: entry.stat().st_mode & 0o777 for entry in made_once.iterdir()} == {
        entry.name: 0o666 & ~mask for entry in made_once.iterdir()
    }


def test_weights_that_cannot_be_written_are_named(tmp_path):
    with pytest.raises(OSError, match="nowhere: model.safetensors cannot be written: .*os error 2"):
        save_weights({"weight": torch.zeros(2)}, tmp_path / "nowhere" / "model.safetensors")


def test_a_sentencepiece_model_is_kept(made_once, tmp_path):
    (tmp_path / "spm.model").write_bytes(b"pieces")
    export_folder(made_once, tmp_path / "out", sentencepiece=tmp_path / "spm.model")
    assert (tmp_path / "out" / "sentencepiece.model").read_bytes() == b"pieces"
    with pytest.raises(FileNotFoundError, match="no.model: no such sentencepiece model"):
        export_folder(made_once, tmp_path / "out", sentencepiece=tmp_path / "no.model")


def test_gates_are_to_be_pruned_first(tmp_path):
    path = finetuned(tmp_path, layout="large", prune_units=["heads"])
    with pytest.raises(ValueError, match="the model has gates; remove what they closed first: w2v2-light prune"):
        export_folder(path, tmp_path / "out")
