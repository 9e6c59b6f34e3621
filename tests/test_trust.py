"""Hostile checkpoints and model folders, through every door that they can come in by: refused, and nothing is run."""

import argparse
import collections
import json
import os
import pathlib
import pickle
import random
import shutil
import signal
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import soundfile
import torch
from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from omegaconf import OmegaConf
from tiny_checkpoints import STREAMING, ctc_model, finetuned, pretrained

from fairseq_w2v2_light import compat
from fairseq_w2v2_light.cli.main import CHECKPOINT_VERBS, VERBS, main
from fairseq_w2v2_light.criterions.teacher import Teacher
from fairseq_w2v2_light.models.checkpoint import load_encoder
from fairseq_w2v2_light.paths import user_dir
from fairseq_w2v2_light.runtime.checkpoint import read_pickle
from fairseq_w2v2_light.runtime.folder import read_folder, write_folder
from fairseq_w2v2_light.runtime.load import load_ctc
from fairseq_w2v2_light.runtime.recognizer import Recognizer
from fairseq_w2v2_light.runtime.streaming import StreamingRecognizer
from fairseq_w2v2_light.trust import TRUST

FIRST_CONV = "w2v_encoder.w2v_model.feature_extractor.conv_layers.0.0.weight"


@pytest.fixture(autouse=True)
def no_hang():
    """Ends a test that hangs, with an error; no limit that work which goes on could reach."""

    def stop(*_):
        raise TimeoutError("hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(240)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def made_once(tmp_path_factory):
    """A streaming CTC checkpoint, the dictionary and the pre-trained checkpoint of it, and its model folder."""
    folder = tmp_path_factory.mktemp("trust")
    write_folder(load_ctc(finetuned(folder, layout="large", **STREAMING)), folder / "model")
    (folder / "table.csv").write_text("path,text\na.wav,A B\n")
    soundfile.write(folder / "a.wav", np.zeros(1600), 16000)
    return folder


@pytest.fixture
def state(made_once):
    """What the checkpoint holds, for the test to change."""
    return torch.load(made_once / "ctc.pt", map_location="cpu", weights_only=False)


@pytest.fixture
def mark(tmp_path):
    """A file that comes into being when code was run."""
    return tmp_path / "mark"


# ---- pickles that run code


class Attack:
    """Calls `function` while it is unpickled."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


class AttackByState(Attack):
    """... when its state is set, on an object that may be made."""

    def __reduce__(self):
        return dict, (), {"x": Attack(*self.reduced)}


def object_array(mark):
    return np.array([Attack(os.system, f"touch {mark}")], dtype=object)


# kind -> what is in the checkpoint, and the type that the message names
ATTACKS = {
    "os.system": (lambda mark: Attack(os.system, f"touch {mark}"), "posix.system"),
    "eval": (lambda mark: Attack(eval, f"open({str(mark)!r}, 'w')"), "builtins.eval"),
    "exec in a state": (lambda mark: AttackByState(exec, f"open({str(mark)!r}, 'w')"), "builtins.exec"),
    "getattr": (lambda mark: Attack(getattr, Dictionary, "load"), "builtins.getattr"),
    "a class of the standard library": (
        lambda mark: Attack(subprocess.Popen, ["touch", str(mark)]),
        "subprocess.Popen",
    ),
    "torch.hub": (lambda mark: Attack(torch.hub.load, str(mark.parent), "x"), "torch.hub.load"),
    "torch.load": (lambda mark: Attack(torch.load, str(mark)), "torch.serialization.load"),
    "numpy.save": (lambda mark: Attack(np.save, str(mark), 1), "numpy.*save"),
    "an array of objects": (object_array, "numpy.*_reconstruct"),
    "fairseq's own": (lambda mark: Attack(Dictionary.load, str(mark)), "(builtins.getattr|fairseq)"),
    "a file": (lambda mark: Attack(open, str(mark), "w"), "_?io.open"),
}
FORMATS = {
    "zip": {},
    "legacy": {"_use_new_zipfile_serialization": False},
    "protocol 4": {"pickle_protocol": 4},
}


def poison(state, attack):
    """Puts an attack where the trainer keeps the optimizer's state."""
    state["last_optimizer_state"] = {"state": {0: {"exp_avg": [torch.zeros(2), {"deep": attack}]}}}
    return state


READERS = {
    "load_ctc": lambda path, made: load_ctc(path),
    "compat.read_checkpoint": lambda path, made: compat.read_checkpoint(path),
    "fairseq's load_checkpoint_to_cpu": lambda path, made: checkpoint_utils.load_checkpoint_to_cpu(str(path)),
}


def verb(*arguments):
    """A door of the command line; CHECKPOINT, MADE and OUT stand for paths."""

    def call(path, made):
        names = {"CHECKPOINT": str(path), "MADE": str(made), "OUT": str(path) + ".out"}
        filled = [argument.format(**names) for argument in arguments]
        if main(filled) != 2:
            raise AssertionError(f"{filled} took the checkpoint")
        raise ValueError("the message is on stderr")

    return call


# every verb and function that reads a model. A new verb is one line here; the last test misses it otherwise.
DOORS = {
    **READERS,
    "load_encoder": lambda path, made: load_encoder(path),
    "StreamingRecognizer": lambda path, made: StreamingRecognizer.from_checkpoint(path),
    "criterion.teacher": lambda path, made: Teacher.load(path),
    "model.w2v_path of light_ctc": lambda path, made: ctc_model(path),
    "model.w2v_path of wav2vec_ctc": lambda path, made: ctc_model(path, "wav2vec_ctc"),
    "fairseq-generate": lambda path, made: checkpoint_utils.load_model_ensemble_and_task([str(path)]),
    "cost": verb("cost", "{CHECKPOINT}"),
    "cost --latency": verb("cost", "{CHECKPOINT}", "--latency"),
    "stability": verb("stability", "{CHECKPOINT}"),
    "bench": verb("bench", "{CHECKPOINT}"),
    "convert": verb("convert", "{CHECKPOINT}", "{OUT}"),
    "student": verb("student", "{CHECKPOINT}", "{OUT}", "--layers", "first:1"),
    "prune": verb("prune", "{CHECKPOINT}", "{OUT}"),
    "export": verb("export", "{CHECKPOINT}", "{OUT}"),
    "quantize": verb("quantize", "{CHECKPOINT}", "{OUT}"),
    "stream": verb("stream", "{MADE}/a.wav", "--model", "{CHECKPOINT}"),
    "Recognizer": lambda path, made: Recognizer.from_pretrained(path),
    "transcribe": verb("transcribe", "{MADE}/a.wav", "--model", "{CHECKPOINT}"),
    "evaluate": verb("evaluate", "{MADE}/table.csv", "--model", "{CHECKPOINT}"),
    "tradeoff": verb("tradeoff", "{MADE}/table.csv", "{CHECKPOINT}"),
    "tune-lm": verb("tune-lm", "{MADE}/table.csv", "--model", "{CHECKPOINT}", "--lm", "{MADE}/lm.arpa"),
    "infer": verb("infer", "task.data={MADE}", "common_eval.path={CHECKPOINT}"),
}


def refusal(door, path, made, capsys):
    """The message with which a door refuses a checkpoint."""
    with pytest.raises(ValueError) as error:
        DOORS[door](path, made)
    return str(error.value) + capsys.readouterr().err


@pytest.mark.parametrize("door", DOORS)
def test_every_door_refuses_a_pickle_that_runs_code(made_once, state, mark, tmp_path, capsys, door):
    for name, options in (("attack.pt", {}), ("pytorch_model.bin", FORMATS["legacy"])):
        path = tmp_path / name
        torch.save(poison(state, ATTACKS["os.system"][0](mark)), path, **options)
        message = refusal(door, path, made_once, capsys)
        assert f"{path}: " in message and "it holds a 'posix.system', which could run code" in message
        assert f"{TRUST}=1 (or --trust-checkpoint)" in message
        assert not mark.exists() and not os.path.exists(f"{path}.out")


def test_no_verb_is_forgotten():
    verbs = {door.split()[0] for door in DOORS}
    assert sorted(verbs & set(VERBS)) == sorted(set(CHECKPOINT_VERBS) & set(VERBS))


@pytest.mark.parametrize("kind", ATTACKS)
def test_every_kind_of_attack_is_refused_by_name(state, mark, tmp_path, kind):
    make, name = ATTACKS[kind]
    for form, options in FORMATS.items():
        path = tmp_path / f"{form}.pt"
        torch.save(poison(state, make(mark)), path, **options)
        for read in READERS.values():
            with pytest.raises(ValueError, match=f"{form}.pt: .*it holds a '{name}', which could run code; nothing of"):
                read(path, None)
            assert not mark.exists()


def replace_pickle(path, data):
    """Puts another pickle into a checkpoint."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in entries.items():
            archive.writestr(name, data(content) if name.endswith("data.pkl") else content)


@pytest.mark.parametrize(
    "data",
    (
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.",  # STACK_GLOBAL
        b"\x80\x02c__builtin__\neval\nU\x011\x85R.",
        b"(S'1'\ni__builtin__\neval\n.",  # INST
        b"(c__builtin__\neval\nS'1'\no.",  # OBJ
        b"\x80\x04\x8c\x08builtins\x8c\x13dict.__subclasses__\x93)R.",  # a dotted name
        b"\x80\x02ctorch\ndtype.__class__\n.",
        b"\x80\x02cos\nsystem\n.",
    ),
)
def test_pickles_written_by_hand_are_refused(state, tmp_path, data):
    path = tmp_path / "attack.pt"
    torch.save({"model": {}}, path)
    replace_pickle(path, lambda content: data)
    for read in READERS.values():
        with pytest.raises(ValueError, match=r"attack.pt: .*it holds a '[\w.]+', which could run code"):
            read(path, None)


@pytest.mark.parametrize(
    "data",
    (
        b"\x80\x02r\xff\xff\xff\xffN.",  # LONG_BINPUT: the memo of Python's own unpickler would take 64 GiB
        b"\x80\x02}r\xff\xff\xff\xff.",
        b"p99999999999999999999\nN.",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",  # FRAME
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\x00\x00\x00.",  # BINBYTES8
        b"\x80\x05\x96\xff\xff\xff\xff\xff\x00\x00\x00.",  # BYTEARRAY8
        b"\x80\x02X\xff\xff\xff\x7fa.",
        b"\x80\x02cargparse\nNamespace\n}X\x01\x00\x00\x00xNsb.",  # BUILD on a class
        b"\x80\x02ccollections\ndefaultdict\nccollections\nOrderedDict\n\x85R.",
        b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00xX\x04\x00\x00\x00zlib\x86R.",
        b"\x80\x02Q.",
        b"\x80\x02(((((.",
        b"]" + b"q\x00h\x00h\x00\x86" * 40 + b".",  # doubled forty times
    ),
)
def test_pickles_that_lie_about_sizes_are_no_checkpoints(tmp_path, data):
    path = tmp_path / "bad.pt"
    torch.save({"model": {}}, path)
    replace_pickle(path, lambda content: data)
    for read in READERS.values():
        with pytest.raises(ValueError, match=r"bad.pt: (not a|'bad)"):
            read(path, None)


# ---- configurations that run code, or never end


CODE = "[].append(open({!r}, 'w'))"
CONV = "conv_feature_layers"


def edit_encoder(state, **changes):
    state["cfg"]["model"]["w2v_args"]["model"].update(changes)
    return state


@pytest.mark.parametrize("door", ("fairseq-generate", "infer", "model.w2v_path of wav2vec_ctc", "load_ctc", "cost"))
@pytest.mark.parametrize("ctc", ("light_ctc", "wav2vec_ctc"))
def test_code_in_a_configuration_is_not_run(made_once, mark, tmp_path, capsys, door, ctc):
    """fairseq gives conv_feature_layers to eval()."""
    (tmp_path / "made").mkdir()
    name = "wav2vec2" if ctc == "wav2vec_ctc" else "w2v2_light"
    state = torch.load(finetuned(tmp_path / "made", ctc, name=name, layout="large"), weights_only=False)
    path = tmp_path / "attack.pt"
    code = CODE.format(str(mark))
    for value in (code, code.encode(), f"[(16, 10, 5)] * len({code})", "[(16, 10, 5) for _ in range(3)]"):
        torch.save(edit_encoder(state, **{CONV: value}), path)
        assert CONV in refusal(door, path, made_once, capsys)
        assert not mark.exists()


@pytest.mark.parametrize(
    "text, is_literal",
    (
        ("[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]", True),
        ("(0.9, 0.98)", True),
        ("[-1, +2]", True),
        ("{'a': 1}", True),
        ("", True),
        ("${model.conv_feature_layers}", True),
        ("${model.activation_fn}", False),
        ("${model.${x}}", False),
        ("[(1, 1, 1)] * 1000000", False),
        ("[(1, 1, 1)] * 1000 * 1000", False),
        ("2 ** 99999999", False),
        ("f'{x}'", False),
        ("x", False),
        ("(lambda: 0)()", False),
        ("[" * 5000, False),
        ("1" * 20000, False),
    ),
)
def test_what_may_be_evaluated(text, is_literal):
    assert compat._is_literal(text) is is_literal


def test_a_user_may_trust_a_configuration(state, tmp_path, monkeypatch):
    path = tmp_path / "trusted.pt"
    torch.save(edit_encoder(state, **{CONV: "[(16, 10, 5) for _ in range(3)]"}), path)
    with pytest.raises(ValueError, match=r"trusted.pt: cfg.model.w2v_args.model.conv_feature_layers: found .* as code"):
        compat.read_checkpoint(path)
    monkeypatch.setenv(TRUST, "1")
    assert compat.read_checkpoint(path)["cfg"]["model"]["w2v_args"]["model"][CONV].startswith("[(16")


def doubled(times=60):
    value = ["x"]
    for _ in range(times):
        value = [value, value]
    return value


def endless():
    value = {}
    value["again"] = value
    return value


def nested(times=5000):
    value = []
    for _ in range(times):
        value = (value,)
    return value


HOSTILE_VALUES = {
    "depth": {"encoder_layers": 10**9},
    "width": {"encoder_embed_dim": 10**12, "encoder_attention_heads": 1, "conv_pos_groups": 1},
    "FFN": {"encoder_ffn_embed_dim": 10**6, "encoder_layers": 60},
    "positions": {"conv_pos": 10**6, "conv_pos_groups": 1, "encoder_embed_dim": 10**6},
    "frontend": {CONV: "[(16, 10, 5)] * 99999999"},
    "wide frontend": {CONV: "[(100000, 100000, 5)]"},
    "layer map": {"layer_map": "0x999999999"},
    "text for a number": {"encoder_layers": "many"},
    "list for a number": {"encoder_embed_dim": [1]},
    "NaN": {"encoder_embed_dim": float("nan")},
    "negative": {"conv_pos": -1},
    "many points": {"squeeze_factors": list(range(1, 2000)), "query_pools": list(range(1, 2000))},
    "wide points": {"squeeze_factors": [10**9]},
    "unsqueeze": {"unsqueeze_factor": 10**9},
    "no list": {"squeeze_factors": 7},
}


@pytest.mark.parametrize("kind", HOSTILE_VALUES)
def test_configurations_that_would_take_all_memory_or_time(made_once, state, tmp_path, capsys, kind):
    path = tmp_path / "hostile.pt"
    torch.save(edit_encoder(state, **HOSTILE_VALUES[kind]), path)
    for door in ("load_ctc", "criterion.teacher", "convert", "infer"):
        assert "hostile.pt" in refusal(door, path, made_once, capsys)


@pytest.mark.parametrize("make", (doubled, endless, nested))
@pytest.mark.parametrize("place", ("cfg", "task_state", "extra_state", "args"))
def test_values_that_never_end(state, tmp_path, make, place):
    path = tmp_path / "endless.pt"
    state[place] = {"model": make()} if place == "cfg" else {"target_dictionary": make()}
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(50_000)
    try:
        torch.save(state, path)
    except RecursionError:
        pytest.skip("this Python cannot write it")
    finally:
        sys.setrecursionlimit(limit)
    with pytest.raises(ValueError, match="endless.pt"):
        compat.read_checkpoint(path)
    if place == "cfg":
        with pytest.raises(ValueError, match="endless.pt"):
            load_ctc(path)


# ---- weights that lie


def unexpanded(state):
    weight = state["model"][FIRST_CONV]
    state["model"][FIRST_CONV] = torch.zeros(1).expand(weight.shape)


def on_meta(state):
    state["model"][FIRST_CONV] = torch.empty(3, device="meta")


def sparse(state):
    state["model"][FIRST_CONV] = torch.zeros(3, 3).to_sparse()


def not_a_number(state):
    state["model"][FIRST_CONV] = torch.full_like(state["model"][FIRST_CONV], torch.nan)


def no_tensor(state):
    state["model"][FIRST_CONV] = argparse.Namespace(shape=(1, 2))


def no_names(state):
    state["model"] = {1: torch.zeros(1), None: torch.zeros(1)}


def no_weights(state):
    state["model"] = [torch.zeros(1)]


@pytest.mark.parametrize(
    "edit",
    (unexpanded, on_meta, sparse, not_a_number, no_tensor, no_names, no_weights),
    ids=lambda f: f.__name__,
)
def test_weights_that_are_none(made_once, state, tmp_path, capsys, edit):
    path = tmp_path / "lying.pt"
    edit(state)
    torch.save(state, path)
    for door in ("load_ctc", "criterion.teacher", "convert", "infer"):
        assert "lying.pt" in refusal(door, path, made_once, capsys)


def test_compressed_checkpoints_are_refused_before_they_are_unpacked(tmp_path):
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", b"\x80\x02}q\x00." + bytes(10_000_000))
    for read in READERS.values():
        with pytest.raises(ValueError, match="bomb.pt: 'bomb/data.pkl' in it is compressed, as torch writes none"):
            read(path, None)


# ---- broken files. In a process of their own, which a crash would end and a hang would not


BREAK = """
import random, sys
from pathlib import Path
import torch
from fairseq_w2v2_light import compat
from fairseq_w2v2_light.runtime.load import load_ctc

source, kind = Path(sys.argv[1]), sys.argv[2]
data, rng, bad, counts = source.read_bytes(), random.Random(kind), source.with_name("broken.pt"), {}
start = data.find(b"\\x80\\x02}q") if kind == "flipped" else 0
end = data.find(b"byteorder") if kind == "flipped" else len(data)
for trial in range(int(sys.argv[3])):
    broken = bytearray(data)
    if kind == "truncated":
        del broken[rng.choice([rng.randrange(1000), rng.randrange(len(data)), len(data) - rng.randrange(1, 200)]):]
    else:
        for _ in range(rng.choice([1, 1, 8])):
            broken[rng.randrange(start, end if end > start else len(data))] ^= 1 << rng.randrange(8)
    bad.write_bytes(broken)
    for read in (load_ctc, compat.read_checkpoint):
        try:
            read(bad)
            outcome = "read"
        except ValueError as error:
            assert str(error).startswith(str(bad)) or "broken.pt" in str(error), error
            outcome = "refused"
        counts[outcome] = counts.get(outcome, 0) + 1
print(counts.get("read", 0), counts.get("refused", 0))
"""


def run_alone(program, *arguments, timeout=280):
    environment = {**os.environ, "PYTHONPATH": str(user_dir().parent), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert result.returncode == 0, f"{result.returncode}: {result.stderr[-3000:]}"
    return result.stdout


@pytest.mark.parametrize("form", ("zip", "legacy"))
@pytest.mark.parametrize("kind, trials", (("truncated", 40), ("flipped", 60)))
def test_broken_checkpoints_are_refused_or_read(state, tmp_path, form, kind, trials):
    torch.save(state, tmp_path / "whole.pt", **FORMATS[form])
    read, refused = map(int, run_alone(BREAK, tmp_path / "whole.pt", kind, trials).split()[-2:])
    assert read + refused == 2 * trials
    assert refused == 2 * trials if kind == "truncated" else refused > 0


# ---- checkpoints that are old, and not hostile


def old_namespace(state):
    model = state["cfg"]["model"]
    flat = {**state["cfg"]["task"], **model, "arch": "wav2vec_ctc", "task": "audio_finetuning"}
    encoder = model["w2v_args"]
    flat["w2v_args"] = argparse.Namespace(
        **{**encoder["task"], **encoder["model"], "arch": "wav2vec2", "task": "audio_pretraining"}
    )
    return {**state, "cfg": None, "args": argparse.Namespace(**flat)}


def config_objects(state):
    return {**state, "cfg": OmegaConf.create(state["cfg"])}


def numbers_of_numpy(state):
    state["extra_state"].update(val_loss=np.float32(0.5), best=np.float64(1.5), count=np.int64(3), ok=np.bool_(True))
    state["cfg"]["common"]["seed"] = np.int64(7)
    return state


@pytest.mark.parametrize("edit", (config_objects, numbers_of_numpy, old_namespace))
@pytest.mark.parametrize("form", ("zip", "legacy"))
def test_old_checkpoints_of_inert_types_open(state, tmp_path, edit, form):
    path = tmp_path / "old.pt"
    torch.save(edit(state), path, **FORMATS[form])
    found = compat.read_checkpoint(path)
    assert type(found["task_state"]["target_dictionary"]) is Dictionary
    assert found["task_state"]["target_dictionary"].index("A") == 4
    assert all(torch.equal(value, state["model"][name]) for name, value in found["model"].items())
    if edit is old_namespace:
        assert type(found["args"].w2v_args) is argparse.Namespace and found["args"].arch == "wav2vec_ctc"
    else:
        assert type(found["cfg"]) is dict and found["cfg"]["common"]["seed"] == 7
        assert checkpoint_utils.load_checkpoint_to_cpu(str(path))["cfg"].model.w2v_args.model.encoder_layers == 3
    if edit is numbers_of_numpy:
        extra = found["extra_state"]
        assert [extra[key] for key in ("val_loss", "best", "count", "ok")] == [0.5, 1.5, 3, True]
    assert load_ctc(path).symbols[4] == "A"


def test_a_state_dict_keeps_its_versions(tmp_path):
    weights = torch.nn.BatchNorm1d(2).state_dict()
    torch.save({"model": weights, "cfg": {"model": {}}}, tmp_path / "a.pt")
    found = compat.read_checkpoint(tmp_path / "a.pt")["model"]
    assert isinstance(found, collections.OrderedDict) and found._metadata == weights._metadata


# ---- trust


def test_a_type_that_is_unknown_is_refused_until_the_user_trusts_the_file(made_once, state, tmp_path, capsys):
    path = tmp_path / "unknown.pt"
    state["extra_state"]["where"] = pathlib.PurePosixPath("/data")
    torch.save(state, path)
    for arguments in (["cost", str(path)], ["export", str(path), str(tmp_path / "out")]):
        assert main(arguments) == 2
        message = capsys.readouterr().err
        assert (
            "it holds a 'pathlib" in message
            and "PurePosixPath', which could run code; nothing of it was run" in message
        )
        assert main([*arguments, "--trust-checkpoint"]) == 0
        capsys.readouterr()
    assert os.environ.get(TRUST) is None
    assert read_folder(tmp_path / "out").symbols[4] == "A"


def test_the_environment_trusts_for_fairseq_too(state, mark, tmp_path, monkeypatch):
    path = tmp_path / "trusted.pt"
    torch.save(poison(state, ATTACKS["eval"][0](mark)), path)
    with pytest.raises(ValueError, match=f"allow it: {TRUST}=1"):
        checkpoint_utils.load_checkpoint_to_cpu(str(path))
    assert not mark.exists()
    monkeypatch.setenv(TRUST, "1")
    assert checkpoint_utils.load_checkpoint_to_cpu(str(path))["cfg"].model._name == "light_ctc"
    assert mark.exists()
    monkeypatch.setenv(TRUST, "0")
    with pytest.raises(ValueError, match="builtins.eval"):
        checkpoint_utils.load_checkpoint_to_cpu(str(path))


def test_the_allow_list_is_for_our_own_reading(state, tmp_path):
    """What others in the process may load with torch does not change."""
    torch.save({"cfg": OmegaConf.create({"a": 1})}, tmp_path / "a.pt")
    assert read_pickle(tmp_path / "a.pt")["cfg"].state["_content"]
    if hasattr(torch.serialization, "get_safe_globals"):
        with pytest.raises(pickle.UnpicklingError, match="omegaconf"):
            torch.load(tmp_path / "a.pt", weights_only=True)


# ---- what is no file


@pytest.mark.parametrize("door", DOORS)
def test_pipes_and_devices_are_no_checkpoints(made_once, tmp_path, capsys, door):
    os.mkfifo(tmp_path / "pipe.pt")
    for path in (tmp_path / "pipe.pt", pathlib.Path("/dev/zero")):
        with pytest.raises((ValueError, OSError)) as error:
            DOORS[door](path, made_once)
        assert path.name in str(error.value) + capsys.readouterr().err


@pytest.fixture
def model_folder(made_once, tmp_path):
    shutil.copytree(made_once / "model", tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("name", ("config.json", "model.safetensors", "tokens.txt"))
def test_pipes_are_no_files_of_a_folder(model_folder, name):
    (model_folder / name).unlink()
    os.mkfifo(model_folder / name)
    with pytest.raises((ValueError, FileNotFoundError), match=str(model_folder)):
        load_ctc(model_folder)


def test_a_dictionary_that_is_a_pipe(made_once, tmp_path):
    os.mkfifo(tmp_path / "dict.txt")
    with pytest.raises((ValueError, FileNotFoundError), match="dict.txt"):
        load_ctc(made_once / "ctc.pt", tmp_path / "dict.txt")


# ---- model folders


def test_a_folder_may_be_a_link(model_folder, tmp_path):
    (tmp_path / "link").symlink_to(model_folder)
    assert load_ctc(tmp_path / "link").symbols[4] == "A"


@pytest.mark.parametrize(
    "old, new",
    (
        ('"dim": 32', '"dim": NaN'),
        ('"dim": 32', '"dim": Infinity'),
        ('"dim": 32', '"dim": 1e400'),
        ('"dim": 32', '"dim": 32, "dim": 64'),
        ('"dim": 32', '"dim": ' + "9" * 6000),
        ('"layerdrop": 0.0', '"layerdrop": "0.1"'),
        ('"conv_bias": true', '"conv_bias": 1'),
        ('"dim": 32', '"dim": 32, "__class__": "os.system"'),
        ('"version": 1', '"version": 1e0'),
        ('"version": 1', '"version": true'),
        ('"about": {', '"about": {"deep": ' + "[" * 20_000 + "]" * 20_000 + ","),
        ('"version": 1', '"version": 1, "weights_file": "../../secret.safetensors"'),
        ('"dtype": "float32"', '"dtype": "/etc/passwd"'),
    ),
)
def test_configurations_of_folders_that_lie(model_folder, old, new):
    text = (model_folder / "config.json").read_text()
    assert old in text
    (model_folder / "config.json").write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match="config.json|model.safetensors"):
        load_ctc(model_folder)


def edit_header(file, edit, data=None):
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    changed = edit(header)
    header = header if changed is None else changed
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + (content[8 + length :] if data is None else data))


def set_entry(**changes):
    return lambda header: header["head.weight"].update(changes)


def swap(header):
    header["head.weight"], header["head.bias"] = header["head.bias"], header["head.weight"]


def overlap(header):
    header["head.bias"]["data_offsets"] = header["head.weight"]["data_offsets"]


def add(header):
    header["more"] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


@pytest.mark.parametrize(
    "edit",
    (
        set_entry(dtype="I64"),
        set_entry(dtype="F8_E4M3"),
        set_entry(dtype="F64"),
        set_entry(dtype="os.system"),
        set_entry(dtype="I32"),
        set_entry(shape=[2**62, 2**62]),
        set_entry(shape=[-1, 32]),
        set_entry(shape=[256]),
        set_entry(shape=[]),
        set_entry(data_offsets=[0, 2**63]),
        set_entry(data_offsets=[10, 0]),
        set_entry(data_offsets=[]),
        swap,
        overlap,
        add,
        lambda header: header.pop("head.weight") and None,
        lambda header: {"__metadata__": {"x": 1}},
        lambda header: b"{" * 100_000,
        lambda header: b"",
        lambda header: b"null",
    ),
)
def test_headers_of_safetensors_that_lie(model_folder, edit):
    edit_header(model_folder / "model.safetensors", edit)
    with pytest.raises(ValueError, match="model.safetensors"):
        load_ctc(model_folder)


def test_mutated_folders_are_refused_or_read(model_folder, tmp_path):
    rng = random.Random(6)
    outcomes = collections.Counter()
    originals = {
        name: (model_folder / name).read_bytes() for name in ("config.json", "tokens.txt", "model.safetensors")
    }
    for trial in range(90):
        name = sorted(originals)[trial % 3]
        broken = bytearray(originals[name])
        limit = min(len(broken), 4000)
        for _ in range(rng.choice([1, 2, 20])):
            broken[rng.randrange(limit)] = rng.randrange(256)
        if trial % 5 == 0:
            del broken[rng.randrange(len(broken)) :]
        (model_folder / name).write_bytes(broken)
        try:
            load_ctc(model_folder)
            outcomes["read"] += 1
        except (ValueError, FileNotFoundError) as error:
            assert str(model_folder) in str(error)
            outcomes["refused"] += 1
        (model_folder / name).write_bytes(originals[name])
    assert sum(outcomes.values()) == 90 and outcomes["refused"] > 30


def test_a_pretrained_checkpoint_is_read_by_the_same_rules(mark, tmp_path):
    state = torch.load(pretrained(tmp_path / "pre.pt"), weights_only=False)
    torch.save(poison(state, ATTACKS["os.system"][0](mark)), tmp_path / "pre.pt")
    for read in (load_encoder, ctc_model):
        with pytest.raises(ValueError, match="pre.pt: .*posix.system"):
            read(tmp_path / "pre.pt")
    assert not mark.exists()
