"""Hugging Face folders, without transformers: what cannot be expressed is refused, and nothing in them is trusted."""

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fairseq import checkpoint_utils
from tiny_checkpoints import finetuned, perturb

from fairseq_w2v2_light.cli.main import main
from fairseq_w2v2_light.export.folder import export_folder
from fairseq_w2v2_light.export.from_huggingface import from_huggingface
from fairseq_w2v2_light.export.huggingface import export_huggingface
from fairseq_w2v2_light.nn.config import EncoderConfig
from fairseq_w2v2_light.nn.operating_point import OperatingPointSpace
from fairseq_w2v2_light.paths import user_dir
from fairseq_w2v2_light.runtime.ctc import CtcModel
from fairseq_w2v2_light.runtime.load import load_ctc

pytest.importorskip("safetensors", reason="weights of folders: pip install safetensors")
SYMBOLS = ["<s>", "<pad>", "</s>", "<unk>", "A", "B", "|"]
PLAIN = dict(
    conv_layers=((16, 10, 5), (16, 3, 2), (16, 2, 2)),
    extractor_norm="layer",
    dim=32,
    ffn_dim=48,
    heads=4,
    conv_pos=8,
    conv_pos_groups=4,
    layer_map=(0, 1),
)
SEW = dict(
    operating_points=OperatingPointSpace((2,), depth=2),
    unsqueeze_factor=2,
    unsqueeze_residual=False,
    squeeze_tail="drop",
)


def tiny_model(symbols=SYMBOLS, **keys):
    torch.manual_seed(0)
    model = CtcModel(EncoderConfig(**{**PLAIN, **keys}), symbols).eval()
    perturb(model, torch.Generator().manual_seed(0))
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def made_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "model"
    export_huggingface(tiny_model(), folder)
    return folder


@pytest.fixture
def folder(made_once, tmp_path):
    """A Hugging Face folder for the test to change."""
    return Path(shutil.copytree(made_once, tmp_path / "model"))


def edit(file, **values):
    """Sets keys of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def tensors_of(folder):
    from safetensors.torch import load_file

    return load_file(str(folder / "model.safetensors"))


def save_tensors(tensors, file):
    from safetensors.torch import save_file

    save_file(tensors, str(file), metadata={"format": "pt"})


def refusal(folder, tmp_path):
    """The message of the verb, which must leave nothing behind."""
    before = sorted(os.listdir(tmp_path))
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        from_huggingface(folder, tmp_path / "out.pt")
    assert sorted(os.listdir(tmp_path)) == before
    return str(error.value)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        (dict(operating_points=OperatingPointSpace(query=(2,), depth=2)), "s1q2k1 pools queries or keys"),
        (dict(operating_points=OperatingPointSpace(key_value=(2,), depth=2)), "s1q1k2 pools queries or keys"),
        (dict(attention_map_every=2), "layers reuse attention maps (attention_map_every=2)"),
        (dict(operating_points=OperatingPointSpace(depth=2, chunk=(8,)), left_context=8), "it is a streaming model"),
        (dict(layer_heads=(4, 3)), "[3, 4] attention heads"),
        (dict(layer_heads=(3, 3)), "3 heads of 8 channels are not the 32 channels"),
        (dict(layer_ffn=(48, 0)), "the FFNs of its layers are [0, 48] wide"),
        (dict(layer_heads=(0, 0)), "[0] attention heads"),
        (dict(norm_dim=40), "LayerNorms are over 40 channels, not 32"),
        (dict(conv_norm_dims=(16, 20, 16)), "LayerNorms of the frontend are over [20] channels"),
        (dict(conv_pos_group_dims=(8, 8, 6, 10)), "unequal widths"),
        (dict(prune_units=("heads",)), "`w2v2-light prune` first"),
        ({**SEW, "norm_first": True}, "SEW has post-LN layers only"),
        ({**SEW, "unsqueeze_residual": True}, "(unsqueeze_residual=false)"),
        ({**SEW, "squeeze_tail": "keep"}, "(squeeze_tail=drop)"),
        ({**SEW, "dim": 16, "heads": 2, "project_features": True}, "SEW has no projection"),
    ],
)
def test_what_hugging_face_cannot_express_is_refused(tmp_path, keys, reason):
    with pytest.raises(ValueError, match="Hugging Face's (Wav2Vec2|SEW)ForCTC cannot express this model") as error:
        export_huggingface(tiny_model(**keys), tmp_path / "out")
    assert reason in str(error.value) and os.listdir(tmp_path) == []


def test_one_of_several_operating_points_is_to_be_chosen(tmp_path):
    model = tiny_model(**{**SEW, "operating_points": OperatingPointSpace((1, 2), key_value=(1, 2), depth=2)})
    with pytest.raises(ValueError, match="choose one of s1q1k1, s1q1k2, s2q1k1, s2q1k2"):
        export_huggingface(model, tmp_path / "out")
    with pytest.raises(ValueError, match="was not trained with squeeze factor 3"):
        export_huggingface(model, tmp_path / "out", "s3q1k1")
    assert export_huggingface(model, tmp_path / "one", "s1q1k1") == "Wav2Vec2ForCTC"
    assert export_huggingface(model, tmp_path / "two", "s2q1k1") == "SEWForCTC"


def test_widths_that_pruning_left_equal_are_written(tmp_path):
    model = tiny_model(layer_ffn=(20, 20), layer_heads=(4, 4), conv_layers=((7, 10, 5), (9, 3, 2), (5, 2, 2)))
    export_huggingface(model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["intermediate_size"], config["conv_dim"]) == (20, [7, 9, 5])
    from_huggingface(tmp_path / "out", tmp_path / "back.pt")
    wave = torch.randn(1, 600)
    torch.testing.assert_close(load_ctc(tmp_path / "back.pt")(wave)[0], model(wave)[0], atol=1e-5, rtol=0)


def test_weights_that_were_prepared_for_speed_are_refused(tmp_path):
    model = tiny_model()
    model.head = torch.nn.Identity()
    with pytest.raises(ValueError, match="quantised, or prepared for speed"):
        export_huggingface(model, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_a_label_that_stands_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="labels 4 and 7 are both 'A'"):
        export_huggingface(tiny_model([*SYMBOLS, "A"]), tmp_path / "out")


def test_an_earlier_export_is_replaced_and_anything_else_is_not(tmp_path):
    export_huggingface(tiny_model(), tmp_path / "out")
    export_huggingface(tiny_model(), tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "special_tokens_map.json",
        "tokenizer_config.json",
        "vocab.json",
    ]
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="the folder holds 'notes.txt'"):
        export_huggingface(tiny_model(), tmp_path / "out")


def test_options_of_another_format_are_refused(tmp_path, capsys):
    path = finetuned(tmp_path)
    for options, message in (
        (["--format", "hf", "--dtype", "bfloat16"], "--dtype: is for --format folder"),
        (["--operating-point", "s1q1k1"], "--operating-point: is for --format hf"),
    ):
        assert main(["export", path, str(tmp_path / "out"), *options]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_export_needs_neither_fairseq_nor_transformers(tmp_path):
    path = finetuned(tmp_path)
    script = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("fairseq", "hydra", "omegaconf", "torchaudio", "transformers"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
from fairseq_w2v2_light.cli.main import main

sys.exit(main(["export", {path!r}, {str(tmp_path / "hf")!r}, "--format", "hf"]))
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(user_dir()).parent)}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Wav2Vec2ForCTC" in result.stdout and (tmp_path / "hf" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(hidden_act="mish"), "hidden_act: found 'mish', expected one of gelu"),
        (dict(hidden_act=["gelu"]), "hidden_act: found ['gelu']"),
        (dict(feat_extract_activation="relu"), "feat_extract_activation: found 'relu', expected 'gelu'"),
        (dict(feat_extract_norm="batch"), "feat_extract_norm: found 'batch', expected 'group' or 'layer'"),
        (dict(layer_norm_eps=1e-3), "layer_norm_eps: found 0.001, expected 1e-05"),
        (dict(add_adapter=True), "add_adapter: found True, expected False"),
        (dict(adapter_attn_dim=16), "adapter_attn_dim: found 16, expected None"),
        (dict(conv_pos_batch_norm=True), "conv_pos_batch_norm: found True, expected False"),
        (dict(feat_proj_layer_norm=False), "feat_proj_layer_norm: found False, expected True"),
        (dict(position_embeddings_type="rotary"), "'position_embeddings_type': unknown key"),
        (dict(quantization_config={"bits": 8}), "'quantization_config': unknown key"),
        (dict(squeeze_factor=2), "squeeze_factor: Wav2Vec2 has no such key"),
        (dict(architectures=["WavLMForCTC"]), "architectures: found 'WavLMForCTC', expected one of Wav2Vec2ForCTC"),
        (dict(architectures=["Wav2Vec2ForSequenceClassification"]), "architectures: found 'Wav2Vec2ForSequence"),
        (dict(architectures=None), "architectures: found None"),
        (dict(architectures=[{}]), "architectures: found {}"),
        (dict(model_type="wav2vec2-conformer"), "model_type: found 'wav2vec2-conformer'"),
        (dict(auto_map={"AutoModel": "evil.Model"}), "auto_map: the model is code of the folder's own"),
        (dict(hidden_size="32"), "hidden_size: found '32', expected a number from 1"),
        (dict(hidden_size=True), "hidden_size: found True"),
        (dict(hidden_size=10**12), "hidden_size: found 1000000000000, expected a number from 1 to 1,000,000"),
        (
            dict(hidden_size=10**6, intermediate_size=10**6, num_conv_pos_embeddings=10**6, num_attention_heads=1),
            "expected rows of hidden_size=1000000",
        ),
        (dict(num_hidden_layers=10**9), "num_hidden_layers: found 1000000000, expected a number from 1 to 1,000"),
        (dict(num_hidden_layers=3), "parameter 'wav2vec2.encoder.layers.2.attention.q_proj.weight'"),
        (dict(num_hidden_layers=1), "parameter 'wav2vec2.encoder.layers.1.attention.k_proj.bias' has no place"),
        (dict(num_attention_heads=5), "5 heads do not divide encoder_embed_dim 32"),
        (dict(conv_dim=[16, 16]), "conv_kernel: found 3 numbers, expected 2"),
        (dict(conv_stride=[5, 2, 0]), "conv_stride: found [5, 2, 0], expected a list of positive numbers"),
        (dict(conv_dim="16"), "conv_dim: found '16'"),
        (dict(num_feat_extract_layers=4), "num_feat_extract_layers: found 4, but conv_dim has 3"),
        (dict(intermediate_size=64), "'encoder.layers.0.fc1.weight': found shape (48, 32), but config.json asks for"),
        (dict(vocab_size=9), "vocab_size: found 9, but lm_head has 7 rows"),
        (dict(layerdrop=float("nan")), "layerdrop: found nan, expected a number from 0 to 1"),
        (dict(conv_bias="yes"), "conv_bias: found 'yes', expected true or false"),
        (dict(pad_token_id=2), "pad_token_id=2, but the tokenizer's padding token has id 0"),
    ],
)
def test_a_configuration_of_another_network(folder, tmp_path, values, message):
    edit(folder / "config.json", **values)
    found = refusal(folder, tmp_path)
    assert message in found and str(folder) in found


def test_names_of_files_in_a_configuration_are_ignored(folder, tmp_path):
    edit(folder / "config.json", _name_or_path="../../etc/passwd", torch_dtype="float16", transformers_version="4.0")
    from_huggingface(folder, tmp_path / "out.pt")
    assert load_ctc(tmp_path / "out.pt").symbols == SYMBOLS


@pytest.mark.parametrize("name", ("config.json", "vocab.json", "preprocessor_config.json", "tokenizer_config.json"))
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b'{"a": ', "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "found a list, expected an object"),
    ],
)
def test_files_that_are_no_json_objects(folder, tmp_path, name, content, message):
    (folder / name).write_bytes(content)
    found = refusal(folder, tmp_path)
    assert message in found and str(folder / name) in found


@pytest.mark.parametrize("name", ("config.json", "vocab.json", "preprocessor_config.json"))
def test_a_missing_file_is_named(folder, tmp_path, name):
    (folder / name).unlink()
    assert f"{folder / name}: no such file" in refusal(folder, tmp_path)


def test_tokenizer_files_have_defaults(folder, tmp_path):
    for name in ("tokenizer_config.json", "special_tokens_map.json", "README.md"):
        (folder / name).unlink()
    from_huggingface(folder, tmp_path / "out.pt")
    assert load_ctc(tmp_path / "out.pt").symbols == SYMBOLS


def test_a_huge_configuration(folder, tmp_path):
    with open(folder / "config.json", "r+b") as file:
        file.truncate(1 << 40)  # sparse: takes no room
    assert "1,099,511,627,776 bytes, expected at most" in refusal(folder, tmp_path)


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        ({"<pad>": 0, "A": "1"}, "token 'A': found id '1', expected a number of 0 or more"),
        ({"<pad>": 0, "A": -1}, "token 'A': found id -1"),
        ({"<pad>": 0, "A": True}, "token 'A': found id True"),
        ({"<pad>": 0, "A": 0}, "tokens '<pad>' and 'A' have one id, 0"),
        ({"eng": {"<pad>": 0}}, "'eng' is a vocabulary of its own, one of several languages"),
        ({"<pad>": 0, "|": 4, " the": 5}, "token ' the' begins a word, and '|' ends one"),
        ({"<pad>": 0, "a\tb": 5}, "token 'a\\tb': a label of fairseq is a text without white space"),
        ({"<pad>": 0, "": 5}, "token '': a label of fairseq is a text without white space"),
        ({"<pad>": 0, "in between": 5, "|": 4}, "token 'in between'"),
        ({"<pad>": 0, "madeupword0000": 6}, "is 'madeupword0000' in a fairseq dictionary, which has that already"),
    ],
)
def test_vocabularies_that_make_no_dictionary(folder, tmp_path, vocabulary, message):
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    assert message in refusal(folder, tmp_path)


def test_labels_in_lower_case(folder, tmp_path):
    edit(folder / "tokenizer_config.json", do_lower_case=True)
    from_huggingface(folder, tmp_path / "out.pt")
    assert load_ctc(tmp_path / "out.pt").symbols == ["<s>", "<pad>", "</s>", "<unk>", "a", "b", "|"]
    edit(folder / "vocab.json", b=4)
    assert "tokens 'A' and 'b' have one id" in refusal(folder, tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(do_normalize=None), "do_normalize: found None, expected true or false"),
        (dict(sampling_rate="16k"), "sampling_rate: found '16k'"),
        (dict(feature_size=80), "feature_size: found 80, expected 1"),
        (dict(feature_extractor_type="WhisperFeatureExtractor"), "found 'WhisperFeatureExtractor'"),
    ],
)
def test_audio_of_another_kind(folder, tmp_path, values, message):
    edit(folder / "preprocessor_config.json", **values)
    assert message in refusal(folder, tmp_path)


def test_where_transformers_5_keeps_the_feature_extractor(folder, tmp_path):
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"feature_extractor": {**settings, "do_normalize": True}}))
    from_huggingface(folder, tmp_path / "out.pt")
    assert load_ctc(tmp_path / "out.pt").normalize
    (folder / "processor_config.json").write_text(json.dumps({"feature_extractor": "mine"}))
    assert "feature_extractor: found 'mine', expected an object" in refusal(folder, tmp_path)


def change(edit_tensors):
    def apply(folder):
        tensors = tensors_of(folder)
        edit_tensors(tensors)
        save_tensors(tensors, folder / "model.safetensors")

    return apply


def cut(size):
    def apply(folder):
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[:size])

    return apply


def lying_header(folder):
    header = json.dumps({"lm_head.weight": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 64)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (cut(0), "not a complete safetensors file"),
        (cut(7), "not a complete safetensors file"),
        (cut(200), "not a complete safetensors file"),
        (cut(-1), "not a complete safetensors file"),
        (lying_header, "not a complete safetensors file"),
        (change(lambda tensors: tensors.pop("lm_head.bias")), "parameter 'lm_head.bias' of Wav2Vec2ForCTC is missing"),
        (change(lambda tensors: tensors.update(extra=torch.zeros(1))), "parameter 'extra' has no place"),
        (change(lambda tensors: tensors["lm_head.bias"].fill_(float("nan"))), "parameter 'bias' has NaN"),
        (
            change(lambda tensors: tensors["wav2vec2.encoder.layer_norm.bias"].fill_(float("inf"))),
            "parameter 'encoder.layer_norm.bias' has NaN or infinite values",
        ),
        (
            change(lambda tensors: tensors.update({"lm_head.bias": torch.zeros(7, dtype=torch.int8)})),
            "parameter 'lm_head.bias': found torch.int8, expected floats",
        ),
        (
            change(lambda tensors: tensors.update({"lm_head.bias": torch.zeros(3)})),
            "'lm_head.bias': found shape (3,), expected (7,)",
        ),
        (
            change(lambda tensors: tensors.update({"lm_head.weight": torch.zeros(7, 31)})),
            "'lm_head.weight': found shape (7, 31), expected rows of hidden_size=32",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "no weights; expected model.safetensors"),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "tf_model.h5"),
            "tf_model.h5 is of another framework",
        ),
    ],
)
def test_weights_that_are_not_whole(folder, tmp_path, broken, message):
    broken(folder)
    assert message in refusal(folder, tmp_path)


@pytest.mark.parametrize(
    ("family", "became", "keys"),
    [("wav2vec2", "w2v2_light", {}), ("hubert", "w2v2_light", {}), ("sew", "stochastic_sew", SEW)],
)
def test_fairseq_loads_what_became_of_a_folder(tmp_path, family, became, keys):
    """A CTC model, and its encoder alone, whose heads of pre-training and mask vector start anew."""
    model, folder = tiny_model(**keys), tmp_path / "model"
    export_huggingface(model, folder)
    source = json.loads((folder / "config.json").read_text())["model_type"]
    tensors = {name.replace(f"{source}.", f"{family}.", 1): value for name, value in tensors_of(folder).items()}
    classes = {"wav2vec2": "Wav2Vec2", "hubert": "Hubert", "sew": "SEW"}
    edit(folder / "config.json", model_type=family, architectures=[f"{classes[family]}ForCTC"])
    save_tensors(tensors, folder / "model.safetensors")
    from_huggingface(folder, tmp_path / "ctc.pt")

    encoder = {name[len(family) + 1 :]: value for name, value in tensors.items() if name.startswith(family)}
    edit(folder / "config.json", architectures=[f"{classes[family]}Model"])
    save_tensors(encoder, folder / "model.safetensors")
    summary = from_huggingface(folder, tmp_path / "encoder.pt")
    assert "new: quantizer, project_q, final_proj, mask_emb" in summary

    wave = torch.randn(2, 700)
    (ctc,), _, task = checkpoint_utils.load_model_ensemble_and_task([str(tmp_path / "ctc.pt")])
    (alone,), cfg, _ = checkpoint_utils.load_model_ensemble_and_task([str(tmp_path / "encoder.pt")])
    assert task.target_dictionary.symbols == SYMBOLS and cfg.model._name == became
    with torch.no_grad():
        logits = ctc.eval()(source=wave, padding_mask=None)["encoder_out"].transpose(0, 1)
        frames = alone.eval().extract_features(wave)["x"]
    torch.testing.assert_close(logits, model(wave)[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(model.head(frames), model(wave)[0], atol=1e-5, rtol=0)
    # new weights are a function of nothing but the seed
    from_huggingface(folder, tmp_path / "again.pt")
    first, again = (torch.load(tmp_path / f"{name}.pt", map_location="cpu")["model"] for name in ("encoder", "again"))
    assert all(torch.equal(value, again[name]) for name, value in first.items())


def test_half_precision_weights_become_fp32(folder, tmp_path):
    save_tensors({name: value.half() for name, value in tensors_of(folder).items()}, folder / "model.safetensors")
    from_huggingface(folder, tmp_path / "out.pt")
    state = torch.load(tmp_path / "out.pt", map_location="cpu")
    assert {value.dtype for value in state["model"].values()} == {torch.float32}


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("is_zip", (True, False))
def test_a_pickle_that_runs_code_is_refused_by_the_name_of_what_it_wants(folder, tmp_path, is_zip):
    tensors = {**tensors_of(folder), "evil": Evil(tmp_path / "ran")}
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=is_zip)
    found = refusal(folder, tmp_path)
    assert "not a checkpoint that transformers wrote: it holds a 'io.open', which could run code" in found or (
        "it holds a '_io.open', which could run code" in found
    )
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({"a": 1}), "not a checkpoint file of torch, expected one that transformers wrote"),
        (b"", "the file is empty"),
        (b"PK\x03\x04", "the end of the checkpoint is missing"),
    ],
)
def test_pickles_that_torch_did_not_write(folder, tmp_path, content, message):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    assert message in refusal(folder, tmp_path)


def test_a_pickle_of_something_else(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    torch.save([torch.zeros(1)], folder / "pytorch_model.bin")
    assert "found a list, expected tensors by name" in refusal(folder, tmp_path)
    torch.save({"lm_head.bias": "text"}, folder / "pytorch_model.bin")
    assert "parameter 'lm_head.bias': found str, expected floats" in refusal(folder, tmp_path)


def shard(folder, kind="safetensors"):
    """Splits the weights of a folder in two; returns the index file."""
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    stem = "model" if kind == "safetensors" else "pytorch_model"
    names = sorted(tensors)
    owners = {name: f"{stem}-0000{1 + index % 2}-of-00002.{kind}" for index, name in enumerate(names)}
    for file in set(owners.values()):
        part = {name: tensors[name] for name in names if owners[name] == file}
        save_tensors(part, folder / file) if kind == "safetensors" else torch.save(part, folder / file)
    index = folder / f"{stem}.{kind}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": owners}))
    return index


@pytest.mark.parametrize("kind", ("safetensors", "bin"))
def test_shards_are_the_whole(folder, tmp_path, kind):
    from_huggingface(folder, tmp_path / "whole.pt")
    shard(folder, kind)
    from_huggingface(folder, tmp_path / "shards.pt")
    whole, shards = (torch.load(tmp_path / f"{name}.pt", map_location="cpu")["model"] for name in ("whole", "shards"))
    assert whole.keys() == shards.keys() and all(torch.equal(value, shards[name]) for name, value in whole.items())


@pytest.mark.parametrize("name", ("../other.safetensors", "/etc/passwd", "..", "a/b.safetensors", "", 7, "a\\b", ".x"))
def test_an_index_that_leads_out_of_the_folder(folder, tmp_path, name):
    index = shard(folder)
    owners = json.loads(index.read_text())["weight_map"]
    edit(index, weight_map={**owners, "lm_head.bias": name})
    found = refusal(folder, tmp_path)
    assert f"weight_map: tensor 'lm_head.bias' is in {name!r}; expected the name of a file in the folder" in found


def test_an_index_that_does_not_fit_its_files(folder, tmp_path):
    index = shard(folder)
    owners = json.loads(index.read_text())["weight_map"]
    for changed, message in (
        ({**owners, "lm_head.bias": "model-00009-of-00002.safetensors"}, "no such file"),
        ({**owners, "surplus": owners["lm_head.bias"]}, "'surplus' is missing"),
        ({name: file for name, file in owners.items() if name != "lm_head.bias"}, "holds 'lm_head.bias', which"),
        ([], "weight_map: found [], expected an object"),
    ):
        edit(index, weight_map=changed)
        assert message in refusal(folder, tmp_path)


def test_links_lead_nowhere_but_into_the_hubs_cache(folder, tmp_path):
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "revision"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in list(folder.iterdir()):
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    from_huggingface(snapshot, tmp_path / "out.pt")
    os.remove(tmp_path / "out.pt")
    (snapshot / "config.json").unlink()
    shutil.copy(blobs / "config.json", tmp_path / "elsewhere.json")
    (snapshot / "config.json").symlink_to(tmp_path / "elsewhere.json")
    assert "a link that leads out of the folder" in refusal(snapshot, tmp_path)


def test_folders_of_other_kinds(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    export_folder(finetuned(tmp_path), tmp_path / "ours")
    for name, message in (
        ("empty", "config.json: no such file; expected a folder that transformers' save_pretrained wrote"),
        ("ours", "a model folder of `w2v2-light export`"),
    ):
        assert main(["convert", str(tmp_path / name), str(tmp_path / "out.pt")]) == 2
        assert message in capsys.readouterr().err
    export_huggingface(tiny_model(), tmp_path / "hf")
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "empty")]) == 2
    assert "a folder; give the name of the checkpoint to write" in capsys.readouterr().err
    assert not (tmp_path / "out.pt").exists()
