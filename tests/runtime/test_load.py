"""Fine-tuned checkpoints loaded without fairseq: fairseq's own logits, and nothing in the file is trusted."""

import argparse
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from fairseq.models.wav2vec.wav2vec2 import Wav2Vec2Config
from omegaconf import OmegaConf
from tiny_checkpoints import LAYOUTS, MODELS, PRETRAINED, SEW, STOCHASTIC, finetuned, letters, pretrained, random_audio

from fairseq_w2v2_light.nn.operating_point import OperatingPoint
from fairseq_w2v2_light.paths import user_dir
from fairseq_w2v2_light.runtime import load
from fairseq_w2v2_light.runtime.checkpoint import read_checkpoint
from fairseq_w2v2_light.runtime.load import load_ctc, read_symbols


def fairseq_logits(path, source, padding_mask=None):
    """(batch, time, label), from the model that fairseq makes of the checkpoint, and its valid frames."""
    (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([path])
    with torch.no_grad():
        output = model.eval()(source=source, padding_mask=padding_mask)
        padding = output["padding_mask"]
        output["padding_mask"] = None  # else get_logits overwrites the padded frames
        logits = model.get_logits(output).transpose(0, 1)
    lengths = torch.full((len(source),), logits.size(1)) if padding is None else (~padding).sum(1)
    return logits, lengths


@pytest.fixture(scope="module")
def made_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    finetuned(folder)
    return folder


@pytest.fixture
def plain(made_once, tmp_path):
    """A checkpoint of the plainest model, for the test to change; its dictionary stands beside it."""
    shutil.copy(made_once / "dict.ltr.txt", tmp_path)
    return shutil.copy(made_once / "ctc.pt", str(tmp_path / "ctc.pt"))


def edited(path, edit):
    """Writes the checkpoint `path` again after `edit(state)`; returns its path."""
    state = torch.load(path, map_location="cpu")
    state = edit(state) or state
    torch.save(state, path)
    return path


@pytest.mark.parametrize("kind", MODELS)
def test_the_logits_are_those_of_fairseq(tmp_path, kind):
    path = finetuned(tmp_path, **MODELS[kind])
    source, padding_mask = random_audio(900, 700, 432)
    expected, expected_lengths = fairseq_logits(path, source, padding_mask)
    found, lengths = load_ctc(path)(source, torch.tensor([900, 700, 432]))
    assert lengths.tolist() == expected_lengths.tolist() and found.shape == expected.shape == (3, expected.size(1), 8)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(found[row, :length], expected[row, :length], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_that_is_all_stock(tmp_path, layout):
    path = finetuned(tmp_path, "wav2vec_ctc", name="wav2vec2", layout=layout)
    source, _ = random_audio(900, 900)
    expected, _ = fairseq_logits(path, source)
    found, lengths = load_ctc(path)(source)
    assert lengths is None
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("normalize", (False, True))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_padded_batch_is_its_utterances_one_by_one(tmp_path, layout, normalize):
    path = finetuned(tmp_path, layout=layout, task={"normalize": normalize}, **STOCHASTIC)
    model = load_ctc(path)
    counts = (900, 500, 640)
    source, _ = random_audio(*counts)
    source = source * 3 + 0.5  # neither normalised nor zero after the end
    found, lengths = model(source, torch.tensor(counts), OperatingPoint(2, (2,), (1,)))
    for row, count in enumerate(counts):
        alone, _ = model(source[row : row + 1, :count], point=OperatingPoint(2, (2,), (1,)))
        assert lengths[row] == alone.size(1)
        torch.testing.assert_close(found[row, : lengths[row]], alone[0], atol=1e-5, rtol=1e-5)


def test_utterances_are_normalised_where_the_task_says_so(tmp_path):
    path = finetuned(tmp_path, layout="large", task={"normalize": True})
    source = random_audio(900)[0] * 3 + 0.5
    expected, _ = fairseq_logits(path, F.layer_norm(source, source.shape[-1:]))
    model = load_ctc(path)
    assert model.normalize
    torch.testing.assert_close(model(source)[0], expected, atol=1e-5, rtol=1e-5)


def test_what_the_model_says_of_itself(tmp_path):
    model = load_ctc(finetuned(tmp_path, ctc_keys={"operating_point": "s2q1k2"}, **STOCHASTIC))
    assert model.symbols == ["<s>", "<pad>", "</s>", "<unk>", "A", "B", "C", "|"]
    assert (model.normalize, model.sample_rate, model.blank, str(model.point)) == (False, 16000, 0, "s2q1k2")
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


def test_a_call_chooses_its_operating_point(tmp_path):
    model = load_ctc(finetuned(tmp_path, **STOCHASTIC))
    source, _ = random_audio(900)
    assert str(model.point) == "s1q1k1"
    assert torch.equal(model(source)[0], model(source, point=OperatingPoint(1))[0])
    assert not torch.allclose(model(source)[0], model(source, point=OperatingPoint(2))[0])
    with pytest.raises(ValueError, match="'s4q1k1': the model was not trained with squeeze factor 4"):
        model(source, point=OperatingPoint(4))


def test_bad_audio_is_refused(plain):
    model = load_ctc(plain)
    source, _ = random_audio(900, 900)
    source[1, 3] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or infinite samples in row\(s\) \[1\]"):
        model(source)
    with pytest.raises(ValueError, match=r"found torch.float32 of shape \(900,\), expected floats \(batch, samples\)"):
        model(torch.zeros(900))
    with pytest.raises(ValueError, match="found torch.int16"):
        model(torch.zeros(1, 900, dtype=torch.int16))
    with pytest.raises(ValueError, match=r"lengths: found \[901\], expected one number of samples for each of 1 rows"):
        model(torch.zeros(1, 900), torch.tensor([901]))
    with pytest.raises(ValueError, match="audio of 20 samples is too short"):
        model(torch.zeros(1, 20))


WITHOUT = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("fairseq", "hydra", "omegaconf", "torchaudio", "transformers"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
import torch
from fairseq_w2v2_light.runtime.load import load_ctc

model = load_ctc(sys.argv[1])
torch.save(model(torch.load(sys.argv[2]), torch.tensor([900, 500])), sys.argv[3])
"""


def test_neither_fairseq_nor_hydra_nor_omegaconf_is_needed(tmp_path):
    def with_config_objects(state):
        state["cfg"] = OmegaConf.create(state["cfg"])

    path = edited(finetuned(tmp_path, **STOCHASTIC), with_config_objects)
    source, _ = random_audio(900, 500)
    torch.save(source, tmp_path / "source.pt")
    command = [sys.executable, "-c", WITHOUT, path, str(tmp_path / "source.pt"), str(tmp_path / "logits.pt")]
    env = {**os.environ, "PYTHONPATH": str(user_dir().parent)}
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    found, lengths = torch.load(tmp_path / "logits.pt")
    expected, expected_lengths = load_ctc(path)(source, torch.tensor([900, 500]))
    assert torch.equal(found, expected) and torch.equal(lengths, expected_lengths)


# ---- what checkpoints hold, and how


def flat_encoder(encoder):
    keys = {**encoder["task"], **encoder["model"], "arch": "wav2vec2", "task": "audio_pretraining"}
    return argparse.Namespace(**keys)


def as_namespace(state):
    """As fairseq wrote checkpoints before hydra."""
    sections = state["cfg"]
    flat = {**sections["model"], **sections["task"], "arch": "wav2vec_ctc", "task": "audio_pretraining"}
    flat["w2v_args"] = flat_encoder(flat["w2v_args"])
    return {**state, "cfg": None, "args": argparse.Namespace(**flat)}


def with_a_namespace_inside(state):
    state["cfg"]["model"]["w2v_args"] = flat_encoder(state["cfg"]["model"]["w2v_args"])


def as_config_objects(state):
    return {**state, "cfg": OmegaConf.create(state["cfg"])}


def with_numpys_numbers(state):
    state["extra_state"].update(best=np.float64(1.5), seen={1, 2}, updates=np.int64(3))


@pytest.mark.parametrize("edit", (as_namespace, with_a_namespace_inside, as_config_objects, with_numpys_numbers))
def test_every_kind_of_configuration_is_read(tmp_path, edit):
    path = finetuned(tmp_path, layout="large", task={"normalize": True})
    source = random_audio(900)[0] * 3
    expected, _ = load_ctc(path)(source)
    assert torch.equal(load_ctc(edited(path, edit))(source)[0], expected)


def test_files_of_old_torch_are_read(plain):
    source, _ = random_audio(900)
    expected, _ = load_ctc(plain)(source)
    torch.save(torch.load(plain), plain, _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(plain)
    assert torch.equal(load_ctc(plain)(source)[0], expected)


def test_half_precision_becomes_single(plain):
    def halve(state):
        state["model"] = {name: value.half() for name, value in state["model"].items()}

    weight = load_ctc(plain).head.weight
    model = load_ctc(edited(plain, halve))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.head.weight, weight.half().float())


def test_a_loaded_model_does_not_change_with_its_file(plain):
    model = load_ctc(plain)
    weight = model.head.weight.clone()
    with open(plain, "r+b") as file:
        file.write(bytes(os.path.getsize(plain)))
    assert torch.equal(model.head.weight, weight)


def test_heads_of_pretraining_are_left_out(tmp_path):
    path = finetuned(tmp_path, ctc_keys={"keep_pretraining_heads": True})
    names = list(torch.load(path)["model"])
    assert any("quantizer" in name for name in names) and any("final_proj" in name for name in names)
    found = [name for name in load_ctc(path).state_dict() if name.startswith("backbone.")]
    assert {name.split(".")[1] for name in found} == {"feature_extractor", "layer_norm", "post_extract_proj", "encoder"}


@pytest.mark.parametrize("mode", ("add", "set"))
def test_a_weight_on_the_blank_is_in_the_head(tmp_path, mode):
    path = finetuned(tmp_path, "wav2vec_ctc", ctc_keys={"blank_weight": 2.5, "blank_mode": mode})
    source, _ = random_audio(900)
    expected, _ = fairseq_logits(path, source)
    torch.testing.assert_close(load_ctc(path)(source)[0], expected, atol=1e-5, rtol=1e-5)


def test_the_defaults_of_stock_are_fairseqs():
    config = Wav2Vec2Config()
    assert {key: getattr(config, key) for key in load._STOCK} == load._STOCK


# ---- dictionaries


def without_dictionary(state):
    state["task_state"] = {}


def test_a_dictionary_file_stands_in_for_the_checkpoints_own(plain, tmp_path):
    path = edited(plain, without_dictionary)
    assert load_ctc(path, tmp_path / "dict.ltr.txt").symbols == letters().symbols
    with pytest.raises(ValueError, match=r"ctc.pt: the checkpoint holds no dictionary; .*--dictionary dict.ltr.txt"):
        load_ctc(path)


def test_a_dictionary_of_another_size_is_refused(plain, tmp_path):
    path = edited(plain, without_dictionary)
    (tmp_path / "other.txt").write_text("A 1\nB 1\n")
    with pytest.raises(ValueError, match=r"other.txt: 6 symbols .* but the CTC head of .*ctc.pt has 8 rows"):
        load_ctc(path, tmp_path / "other.txt")
    own = edited(path, lambda state: state["task_state"].update(target_dictionary=letters("AB")))
    with pytest.raises(ValueError, match=r"ctc.pt: 6 symbols .* has 8 rows"):
        load_ctc(own)


def test_a_dictionary_unlike_the_checkpoints_own_is_refused(plain, tmp_path):
    assert load_ctc(plain, tmp_path / "dict.ltr.txt").symbols == letters().symbols
    (tmp_path / "other.txt").write_text("A 1\nC 1\nB 1\n| 1\n")
    with pytest.raises(ValueError, match=r"other.txt: label 5 is 'C', but 'B' in .*ctc.pt; leave out --dictionary"):
        load_ctc(plain, tmp_path / "other.txt")
    (tmp_path / "other.txt").write_text("A 1\nB 1\n")
    with pytest.raises(ValueError, match=r"other.txt: label 6 is None, but 'C'"):
        load_ctc(plain, tmp_path / "other.txt")


def test_symbols_are_those_of_fairseqs_dictionary(tmp_path):
    path = tmp_path / "dict.txt"
    path.write_text("| 90\nE 7\n\u00e9 5\nof the 3\n\u2028 2\n<s> 1 #fairseq:overwrite\n", encoding="utf-8")
    assert read_symbols(path) == Dictionary.load(str(path)).symbols
    assert read_symbols(path)[4:] == ["|", "E", "\u00e9", "of the", "\u2028", "<s>"]


@pytest.mark.parametrize(
    "text, message",
    (
        ("A 1\nB\n", r"dict.txt:2: found 'B'; expected 'symbol count'"),
        ("A one\n", r"dict.txt:1: found 'A one'; expected 'symbol count'"),
        ("A 1\nA 1\n", r"dict.txt:2: symbol 'A' is listed twice"),
        ("<pad> 1\n", r"dict.txt:1: symbol '<pad>' is listed twice, or one that fairseq adds itself"),
        (b"\xff\xfe 1\n", r"dict.txt: not a dictionary: it is no UTF-8 text"),
    ),
)
def test_a_malformed_dictionary_is_refused(tmp_path, text, message):
    path = tmp_path / "dict.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        read_symbols(path)


def test_a_missing_dictionary(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.txt: no such dictionary"):
        read_symbols(tmp_path / "nowhere.txt")


# ---- trust


class Attack:
    """Calls `function` while it is unpickled."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("as_zip", (True, False))
@pytest.mark.parametrize(
    "function, arguments, kind",
    (
        (os.system, ("touch {}",), "posix.system"),
        (eval, ("open({!r}, 'w')",), "builtins.eval"),
        (getattr, (Dictionary, "load"), "builtins.getattr"),
        (torch.load, ("{}",), "torch.serialization.load"),
    ),
)
def test_nothing_in_a_checkpoint_is_run(tmp_path, as_zip, function, arguments, kind):
    mark = tmp_path / "mark"
    arguments = [a.format(str(mark)) if isinstance(a, str) else a for a in arguments]
    path = str(tmp_path / "attack.pt")
    state = {"model": {}, "cfg": {}, "extra_state": [Attack(function, *arguments)]}
    torch.save(state, path, _use_new_zipfile_serialization=as_zip)
    with pytest.raises(ValueError, match=rf"attack.pt: .*it holds a '{kind}', which could run code; nothing of it was"):
        load_ctc(path)
    assert not mark.exists()


def test_state_cannot_be_set_on_a_class(tmp_path):
    # BUILD on a class, with attributes to set
    attack = b"\x80\x02cargparse\nNamespace\nN}X\x04\x00\x00\x00kindX\x03\x00\x00\x00bads\x86b."
    path = tmp_path / "attack.pt"
    torch.save({"model": {}}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in entries.items():
            archive.writestr(name, attack if name.endswith("data.pkl") else content)
    with pytest.raises(ValueError, match=r"attack.pt: .* torch can read \(UnpicklingError: "):
        read_checkpoint(path)


# ---- files that are no such checkpoint


def torchscript(path):
    torch.jit.script(torch.nn.ReLU()).save(str(path))


def truncated(path):
    torch.save({"model": {"x": torch.zeros(1000)}}, path)
    path.write_bytes(path.read_bytes()[:-900])


def truncated_old(path):
    torch.save({"model": {"x": torch.zeros(1000)}}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-900])


def other_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")


@pytest.mark.parametrize(
    "write, message",
    (
        (lambda path: path.mkdir(), r"bad.pt: a folder; give the checkpoint file in it, e.g. .*checkpoint_best.pt"),
        (lambda path: path.write_bytes(b""), r"bad.pt: the file is empty; .* get it again"),
        (lambda path: path.write_text("not a model"), r"bad.pt: not a checkpoint file of torch"),
        (lambda path: path.write_bytes(pickle.dumps({"model": {}})), r"bad.pt: not a checkpoint file of torch"),
        (other_zip, r"bad.pt: not a checkpoint file of torch"),
        (torchscript, r"bad.pt: a TorchScript program"),
        (truncated, r"bad.pt: the end of the checkpoint is missing; .* get it again"),
        (truncated_old, r"bad.pt: not a checkpoint that torch can read .* get it again"),
        (lambda path: torch.save([1], path), r"bad.pt: not a fairseq checkpoint; expected the keys .*, found list"),
        (
            lambda path: torch.save(OrderedDict(weight=torch.zeros(2)), path),
            r"bad.pt: not a fairseq checkpoint; expected the keys 'model' and 'cfg' \(or 'args'\), found \['weight'\]",
        ),
        (
            lambda path: torch.save({"model": {}, "cfg": {"model": {"_name": "transformer"}}}, path),
            r"bad.pt: a checkpoint of model 'transformer'; expected a CTC model, wav2vec_ctc or light_ctc",
        ),
        (
            lambda path: torch.save({"model": {}, "cfg": {"model": {"_name": "wav2vec_ctc"}}}, path),
            r"bad.pt: the configuration has no model.w2v_args, which describes the encoder; found None",
        ),
        (
            lambda path: torch.save(
                {"model": {}, "cfg": {"model": {"_name": "wav2vec_ctc", "w2v_args": {"model": {"_name": "hubert"}}}}},
                path,
            ),
            r"bad.pt: the encoder is of model 'hubert'; expected one of wav2vec2, w2v2_light, stochastic_sew",
        ),
    ),
)
def test_other_files_are_refused(tmp_path, write, message):
    path = tmp_path / "bad.pt"
    write(path)
    with pytest.raises(ValueError, match=message):
        load_ctc(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.pt: no such checkpoint file"):
        load_ctc(tmp_path / "nowhere.pt")


@pytest.mark.parametrize("name", PRETRAINED)
def test_a_pretraining_checkpoint_is_to_be_fine_tuned_first(tmp_path, name):
    path = pretrained(tmp_path / "pretrained.pt", name, **(SEW if name == "stochastic_sew" else {}))
    message = rf"a pre-training checkpoint \('{name}'\), .* fine-tune it first: .* model.w2v_path=.*pretrained.pt"
    with pytest.raises(ValueError, match=message):
        load_ctc(path)


FC1 = "w2v_encoder.w2v_model.encoder.layers.0.fc1.weight"


@pytest.mark.parametrize(
    "edit, message",
    (
        (lambda model: model.pop(FC1) is None, rf"ctc.pt: parameter '{FC1}' is missing \(1 in all\)"),
        (
            lambda model: model.pop("w2v_encoder.proj.weight") is None,
            r"ctc.pt: parameter 'w2v_encoder.proj.weight' is missing",
        ),
        (
            lambda model: model.update({"w2v_encoder.w2v_model.encoder.more": torch.zeros(1)}),
            r"ctc.pt: parameter 'w2v_encoder.w2v_model.encoder.more' has no place in the network .*\(1 in all\)",
        ),
        (
            lambda model: model.update({FC1: model[FC1][1:]}),
            rf"ctc.pt: parameter '{FC1}': found shape \(47, 32\), but the configuration asks for \(48, 32\)",
        ),
        (
            lambda model: model.update({FC1: model[FC1].to(torch.int8)}),
            rf"ctc.pt: parameter '{FC1}': found torch.int8, expected a tensor of floats",
        ),
        (
            lambda model: model.update({FC1: "text"}),
            rf"ctc.pt: parameter '{FC1}': found str, expected a tensor of floats",
        ),
        (
            lambda model: model[FC1].view(-1)[3:4].fill_(torch.nan) is None,
            rf"ctc.pt: parameter '{FC1}' has NaN or infinite values, .*: training diverged; take an earlier checkpoint",
        ),
    ),
)
def test_weights_that_do_not_fit_are_named(plain, edit, message):
    path = edited(plain, lambda state: edit(state["model"]) and None)
    with pytest.raises(ValueError, match=message):
        load_ctc(path)


@pytest.mark.parametrize(
    "key, value, message",
    (
        ("layer_type", "conformer", r"model.layer_type: found conformer, expected transformer"),
        ("conv_feature_layers", "[(1, 2)]", r"conv_feature_layers '\[\(1, 2\)\]': expected a list"),
        ("encoder_attention_heads", 5, r"encoder_attention_heads: 5 heads do not divide"),
        ("operating_point", "s9q1k1", r"operating point 's9q1k1': the model was not trained with squeeze factor 9"),
    ),
)
def test_a_configuration_of_no_network_of_ours(plain, key, value, message):
    path = edited(plain, lambda state: state["cfg"]["model"]["w2v_args"]["model"].update({key: value}))
    with pytest.raises(ValueError, match=rf"ctc.pt: its configuration describes no network .*: {message}"):
        load_ctc(path)
