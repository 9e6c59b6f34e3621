"""CachedTeacher: what it gives is what the teacher gives; whose folder it is; what is damaged, partial or stale."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fairseq_w2v2_light.criterions.teacher import Teacher
from fairseq_w2v2_light.criterions.teacher_cache import (
    CachedTeacher,
    DamagedEntry,
    DatasetIdentity,
    read_entry,
    write_entry,
)

DATA = DatasetIdentity("/data/digits", "d" * 64, 1000)
SAMPLES = (900, 500, 733)
TOLERANCE = {"float16": 2e-3, "float32": 1e-5}


@pytest.fixture(scope="module")
def files(checkpoints, tmp_path_factory):
    """Teachers as checkpoints, written once."""
    folder = tmp_path_factory.mktemp("teachers")
    return SimpleNamespace(
        stock_ctc=checkpoints.stock_ctc(folder / "stock_ctc.pt").path,
        light_ctc=checkpoints.light_ctc(folder / "light_ctc.pt", squeeze_factors=[1, 2], kv_pools=[1, 2]).path,
        squeezed_ctc=checkpoints.light_ctc(folder / "squeezed.pt", squeeze_factors=[2], squeeze_tail="drop").path,
        other_ctc=checkpoints.stock_ctc(folder / "other.pt", seed=5).path,
        hidden_only=checkpoints.stock(folder / "hidden.pt").path,
    )


class Counted(Teacher):
    """A teacher that notes the utterances it hears."""

    rows = 0

    def __call__(self, source, padding_mask=None):
        self.rows += len(source)
        return super().__call__(source, padding_mask)


@pytest.fixture
def open_cache(files, tmp_path):
    """Opens the cache in tmp_path/cache, with a teacher of its own that counts."""

    def open_cache(path=None, layers=(0, 3), needs_logits=True, data=DATA, storage="float16", **keys):
        teacher = Counted.load(path or files.stock_ctc, layers=layers, needs_logits=needs_logits, **keys)
        return CachedTeacher(teacher, tmp_path / "cache", data, storage)

    return open_cache


def entries(folder):
    return sorted(path for path in Path(folder).rglob("*.outputs") if not path.name.startswith("."))


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def assert_same(found, expected, tolerance=0.0):
    assert (found.logits is None) == (expected.logits is None) and set(found.hidden) == set(expected.hidden)
    assert found[4:] == expected[4:]
    for name in ("lengths", "hidden_lengths"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
        assert getattr(found, name).dtype == getattr(expected, name).dtype
    pairs = [(found.hidden[depth], expected.hidden[depth]) for depth in expected.hidden]
    if expected.logits is not None:
        pairs.append((found.logits, expected.logits))
    for ours, theirs in pairs:
        assert ours.shape == theirs.shape and ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, atol=tolerance * max(1, theirs.abs().max().item()), rtol=0)


# what it gives


@pytest.mark.parametrize("name", ("stock_ctc", "light_ctc", "squeezed_ctc"))
@pytest.mark.parametrize("storage", ("float16", "float32"))
def test_it_gives_what_the_teacher_gives(files, open_cache, checkpoints, name, storage):
    cache = open_cache(getattr(files, name), storage=storage)
    source, padding_mask = checkpoints.audio(*SAMPLES)
    expected = Teacher.load(getattr(files, name), layers=(0, 3), needs_logits=True)(source, padding_mask)
    assert_same(cache(source, padding_mask), expected, TOLERANCE[storage])
    assert_same(cache(source, padding_mask), expected, TOLERANCE[storage])


@pytest.mark.parametrize("layers, needs_logits", (((1,), False), ((), True)))
def test_hidden_layers_or_logits_alone(files, open_cache, checkpoints, layers, needs_logits):
    path = files.stock_ctc if needs_logits else files.hidden_only
    source, padding_mask = checkpoints.audio(*SAMPLES)
    expected = Teacher.load(path, layers=layers, needs_logits=needs_logits)(source, padding_mask)
    for _ in range(2):
        cache = open_cache(path, layers, needs_logits)
        assert_same(cache(source, padding_mask), expected, TOLERANCE["float16"])
    assert cache.teacher.rows == 0


def test_the_first_epoch_sees_what_later_ones_see(open_cache, checkpoints):
    source, padding_mask = checkpoints.audio(*SAMPLES)
    cache = open_cache()
    assert_same(cache(source, padding_mask), cache(source, padding_mask))


def test_the_teacher_hears_every_utterance_once(open_cache, checkpoints):
    source, padding_mask = checkpoints.audio(*SAMPLES)
    cache = open_cache()
    for _ in range(3):
        cache(source, padding_mask)
    assert cache.teacher.rows == cache.misses == 3 and cache.hits == 6
    again = open_cache()
    again(source, padding_mask)
    assert again.teacher.rows == again.misses == 0 and again.hits == 3


def test_order_padding_and_batch_do_not_matter(open_cache, checkpoints):
    source, padding_mask = checkpoints.audio(*SAMPLES)
    cache = open_cache()
    whole = cache(source, padding_mask)
    for row, count in enumerate(SAMPLES):
        alone = cache(source[row : row + 1, :count])
        assert torch.equal(alone.logits[0], whole.logits[row, : alone.logits.size(1)])
    order = [2, 0, 1]
    shuffled = cache(source[order], padding_mask[order])
    assert torch.equal(shuffled.hidden[3], whole.hidden[3][order])
    longer = cache(F.pad(source, (0, 500), value=7.0), F.pad(padding_mask, (0, 500), value=True))
    assert longer.logits.size(1) == whole.logits.size(1) + 25 and torch.equal(longer.lengths, whole.lengths)
    assert cache.teacher.rows == 3


def test_only_missing_rows_are_computed(files, open_cache, checkpoints):
    source, padding_mask = checkpoints.audio(*SAMPLES)
    cache = open_cache(storage="float32")
    cache(source[:1], padding_mask[:1])
    expected = Teacher.load(files.stock_ctc, layers=(0, 3), needs_logits=True)(source, padding_mask)
    assert_same(cache(source, padding_mask), expected, 1e-5)
    assert cache.teacher.rows == 3 and (cache.hits, cache.misses) == (1, 3)


def test_the_audio_counts_to_its_last_sample(open_cache, checkpoints):
    source, _ = checkpoints.audio(900)
    cache = open_cache()
    cache(source)
    other = source.clone()
    other[0, -1] += 1e-6
    cache(other)
    cache(source[:, :-1])
    assert cache.misses == 3


def test_half_precision_audio(open_cache, checkpoints):
    """What common.fp16 does to a batch."""
    source, padding_mask = checkpoints.audio(*SAMPLES)
    cache = open_cache()
    for _ in range(2):
        output = cache(source.half(), padding_mask)
    assert output.logits.dtype == torch.float32 and cache.hits == 3


def test_values_beyond_float16_are_kept(files, open_cache, checkpoints, tmp_path):
    state = torch.load(files.stock_ctc, weights_only=False)
    state["model"]["w2v_encoder.proj.bias"][0] = 3e5
    torch.save(state, tmp_path / "large.pt")
    cache = open_cache(tmp_path / "large.pt")
    source, _ = checkpoints.audio(900)
    for _ in range(2):
        assert cache(source).logits[0, :, 0].mean() == pytest.approx(3e5, rel=1e-3)


def test_it_answers_for_its_teacher(open_cache):
    cache = open_cache(layers=(1,))
    teacher = cache.teacher
    assert (cache.dim, cache.depth, cache.hop, cache.squeeze) == (teacher.dim, teacher.depth, teacher.hop, 1)
    cache.layers = (0, 2)
    assert cache.layers == teacher.layers == (0, 2)
    assert cache.symbols == teacher.symbols


# the speed that it is for


def test_a_batch_is_read_quickly(open_cache, checkpoints):
    source, padding_mask = checkpoints.audio(*range(4000, 5600, 100))
    cache = open_cache(layers=range(4))
    cache(source, padding_mask)
    seconds = []
    for _ in range(10):
        start = time.process_time()
        cache(source, padding_mask)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.05


# partial entries


def test_an_entry_that_lacks_a_layer_is_completed(files, open_cache, checkpoints):
    source, padding_mask = checkpoints.audio(*SAMPLES)
    open_cache(layers=(0,), needs_logits=False)(source, padding_mask)
    more = open_cache(layers=(2,), storage="float32")
    expected = Teacher.load(files.stock_ctc, layers=(2,), needs_logits=True)(source, padding_mask)
    assert_same(more(source, padding_mask), expected, 1e-5)
    assert more.misses == 3
    for layers, storage in (((0,), "float16"), ((2,), "float32"), ((0, 2), "float16")):
        complete = open_cache(layers=layers, storage=storage)
        complete(source, padding_mask)
        assert complete.misses == 0


def test_float32_is_not_read_from_float16(open_cache, checkpoints):
    source, _ = checkpoints.audio(900)
    for storage, misses in (("float16", 1), ("float32", 1), ("float16", 0), ("float32", 0)):
        cache = open_cache(storage=storage)
        cache(source)
        assert cache.misses == misses


# damaged entries


def truncate(path):
    path.write_bytes(path.read_bytes()[:-8])


def truncate_by_a_byte(path):
    path.write_bytes(path.read_bytes()[:-1])


def cut_in_the_head(path):
    path.write_bytes(path.read_bytes()[:20])


def empty(path):
    path.write_bytes(b"")


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"12345678")


def change(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(bytes(content))


def change_the_magic(path):
    change(path, 1)


def change_the_description(path):
    change(path, 40)


def change_a_value(path):
    change(path, -20)


def zero_the_end(path):
    """What a power cut may leave."""
    content = path.read_bytes()
    path.write_bytes(content[:-512] + bytes(512))


def overwrite(path):
    path.write_text("something else, that is long enough to hold a head of 32 bytes and more")


def make_it_a_folder(path):
    path.unlink()
    path.mkdir()


DAMAGES = (
    truncate,
    truncate_by_a_byte,
    cut_in_the_head,
    empty,
    lengthen,
    change_the_magic,
    change_the_description,
    change_a_value,
    zero_the_end,
    overwrite,
)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_computed_again(open_cache, checkpoints, caplog, damage):
    source, padding_mask = checkpoints.audio(*SAMPLES)
    cache = open_cache()
    expected = cache(source, padding_mask)
    for path in entries(cache.folder)[:2]:
        damage(path)
    with caplog.at_level(logging.WARNING):
        assert_same(cache(source, padding_mask), expected, 1e-5)
    assert cache.misses == 3 + 2
    (message,) = warnings_of(caplog)
    assert "criterion.teacher_cache: " in message and ".outputs" in message and "anew" in message
    assert_same(open_cache()(source, padding_mask), cache(source, padding_mask))
    assert cache.misses == 3 + 2


def test_an_entry_that_cannot_be_replaced(open_cache, checkpoints, caplog):
    source, _ = checkpoints.audio(900)
    cache = open_cache()
    expected = cache(source)
    make_it_a_folder(entries(cache.folder)[0])
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert_same(cache(source), expected, 1e-5)
    assert cache.misses == 4
    assert sum("cannot write" in message for message in warnings_of(caplog)) == 1


def test_a_full_disk_stops_nothing_but_the_cache(open_cache, checkpoints, caplog, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fairseq_w2v2_light.criterions.teacher_cache.write_entry", full)
    cache = open_cache()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            cache(*checkpoints.audio(*SAMPLES))
    (message,) = warnings_of(caplog)
    assert "No space left on device" in message and "storing no more" in message
    assert cache.misses == 6


def test_an_entry_holds_what_was_written(tmp_path):
    owner = b"0123456789abcdef"
    arrays = {
        "logits": np.arange(15, dtype=np.float16).reshape(5, 3),
        **{str(depth): np.full((2, 7), depth, np.float32) for depth in range(60)},
    }
    write_entry(tmp_path / "entry", owner, arrays)
    found = read_entry(tmp_path / "entry", owner)
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype and np.array_equal(found[name], array)
    assert list(read_entry(tmp_path / "entry", owner, ["3", "none"])) == ["3"]
    assert read_entry(tmp_path / "entry", bytes(16)) == {}
    assert read_entry(tmp_path / "none", owner) == {}
    with pytest.raises(DamagedEntry, match="folder.*not readable"):
        (tmp_path / "folder").mkdir()
        read_entry(tmp_path / "folder", owner)


# whose it is


def description(folder):
    return json.loads((folder / "cache.json").read_text())


def test_the_description(files, open_cache):
    teacher = description(open_cache().folder)["teacher"]
    assert teacher["path"] == os.path.realpath(files.stock_ctc)
    assert (teacher["dtype"], teacher["operating_point"], len(teacher["content"])) == ("float32", "s1q1k1", 64)
    assert description(open_cache().folder)["data"]["path"] == DATA.path


def test_moved_teacher_and_data_are_the_same(files, open_cache, checkpoints, tmp_path, caplog):
    source, padding_mask = checkpoints.audio(*SAMPLES)
    open_cache()(source, padding_mask)
    moved = shutil.copy(files.stock_ctc, tmp_path / "moved.pt")
    with caplog.at_level(logging.WARNING):
        cache = open_cache(moved, data=DatasetIdentity("/elsewhere", DATA.content, DATA.utterances))
        cache(source, padding_mask)
    assert cache.misses == 0 and warnings_of(caplog) == []
    assert description(cache.folder)["teacher"]["path"] == str(moved)
    assert description(cache.folder)["data"]["path"] == "/elsewhere"


@pytest.mark.parametrize("change", ("file", "dtype", "operating_point"))
def test_a_stale_cache_is_rebuilt(files, open_cache, checkpoints, tmp_path, caplog, change):
    source, padding_mask = checkpoints.audio(*SAMPLES)
    path = tmp_path / "teacher.pt"
    shutil.copy(files.light_ctc, path)
    old = open_cache(path)
    old(source, padding_mask)
    old(source[:, ::2].contiguous())
    assert len(entries(old.folder)) == 6
    keys = {"dtype": {"dtype": "bfloat16"}, "operating_point": {"operating_point": "s2q1k2"}}.get(change, {})
    if change == "file":
        shutil.copy(files.other_ctc, path)
    with caplog.at_level(logging.WARNING):
        cache = open_cache(path, **keys)
    (message,) = warnings_of(caplog)
    words = {"file": "file has changed", "dtype": "dtype: float32, now bfloat16", "operating_point": "now s2q1k2"}
    assert "stale" in message and words[change] in message and "rebuilding" in message
    assert entries(cache.folder) == []
    expected = Teacher.load(path, layers=(0, 3), needs_logits=True, **keys)(source, padding_mask)
    assert_same(cache(source, padding_mask), expected, TOLERANCE["float16"])
    caplog.clear()
    again = open_cache(path, **keys)
    again(source, padding_mask)
    assert again.misses == 0 and warnings_of(caplog) == []


def test_a_run_with_the_old_teacher_cannot_spoil_a_rebuilt_cache(files, open_cache, checkpoints):
    """Two runs at different operating points in one folder: slow, but never wrong."""
    source, padding_mask = checkpoints.audio(*SAMPLES)
    old = open_cache(files.light_ctc)
    first = old(source, padding_mask)
    new = open_cache(files.light_ctc, operating_point="s2q1k1")
    assert_same(old(source, padding_mask), first)
    expected = Teacher.load(files.light_ctc, layers=(0, 3), needs_logits=True, operating_point="s2q1k1")
    assert_same(new(source, padding_mask), expected(source, padding_mask), TOLERANCE["float16"])
    assert new.misses == 3


def test_a_rebuild_that_was_interrupted_is_done_again(files, open_cache, checkpoints, monkeypatch, caplog):
    cache = open_cache()
    cache(*checkpoints.audio(*SAMPLES))
    keys = dict(dtype="bfloat16")
    unlink, removed = Path.unlink, []

    def unlink_once(path, **options):
        if removed:
            raise KeyboardInterrupt
        removed.append(path)
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", unlink_once)
    with pytest.raises(KeyboardInterrupt):
        open_cache(**keys)
    monkeypatch.undo()
    assert len(entries(cache.folder)) == 2
    with caplog.at_level(logging.WARNING):
        open_cache(**keys)
    assert entries(cache.folder) == [] and "stale" in warnings_of(caplog)[-1]


def test_another_teacher(files, open_cache, checkpoints):
    cache = open_cache()
    cache(*checkpoints.audio(*SAMPLES))
    before = description(cache.folder)
    with pytest.raises(ValueError) as error:
        open_cache(files.other_ctc)
    for words in ("criterion.teacher_cache: ", "/cache'", "another teacher", "stock_ctc.pt", "other.pt", "delete this"):
        assert words in str(error.value)
    assert description(cache.folder) == before and len(entries(cache.folder)) == 3


def test_another_data_set(open_cache, checkpoints):
    cache = open_cache()
    cache(*checkpoints.audio(*SAMPLES))
    with pytest.raises(ValueError) as error:
        open_cache(data=DatasetIdentity("/data/an4", "a" * 64, 7))
    for words in ("criterion.teacher_cache: ", "/cache'", "/data/digits (1000", "/data/an4 (7", "choose another"):
        assert words in str(error.value)
    assert len(entries(cache.folder)) == 3


def test_stale_for_another_data_set_is_an_error_and_removes_nothing(open_cache, checkpoints):
    cache = open_cache()
    cache(*checkpoints.audio(*SAMPLES))
    with pytest.raises(ValueError, match="another data set"):
        open_cache(dtype="bfloat16", data=DatasetIdentity("/data/an4", "a" * 64, 7))
    assert len(entries(cache.folder)) == 3


def test_a_manifest_that_has_changed(open_cache, checkpoints, caplog):
    source, padding_mask = checkpoints.audio(*SAMPLES)
    open_cache()(source, padding_mask)
    with caplog.at_level(logging.WARNING):
        cache = open_cache(data=DatasetIdentity(DATA.path, "e" * 64, 1001))
        cache(source, padding_mask)
    assert cache.misses == 0
    assert "training manifest of /data/digits has changed" in warnings_of(caplog)[0]
    assert description(cache.folder)["data"] == {"path": DATA.path, "content": "e" * 64, "utterances": 1001}


@pytest.mark.parametrize("content", (None, "", "{", '{"format": "w2v2-light teacher cache", "version": 0}'))
def test_entries_without_a_readable_description(open_cache, checkpoints, caplog, content):
    source, padding_mask = checkpoints.audio(*SAMPLES)
    cache = open_cache()
    cache(source, padding_mask)
    if content is None:
        (cache.folder / "cache.json").unlink()
    else:
        (cache.folder / "cache.json").write_text(content)
    with caplog.at_level(logging.WARNING):
        again = open_cache(dtype="bfloat16")
    (message,) = warnings_of(caplog)
    assert "cache.json is" in message and "rebuilding" in message
    assert entries(again.folder) == [] and description(again.folder)["teacher"]["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    "name, content",
    (("thesis.tex", "years of work"), ("cache.json", '{"name": "npm"}'), ("cache.json", "[]"), ("runs/1/x.pt", "")),
)
def test_a_folder_of_something_else_is_left_alone(open_cache, tmp_path, name, content):
    path = tmp_path / "cache" / name
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(ValueError, match=f"criterion.teacher_cache: .* is no teacher cache: found '{name[:4]}"):
        open_cache()
    assert path.read_text() == content and list(path.parent.iterdir()) == [path]


def test_foreign_files_beside_a_cache_survive_its_rebuilding(open_cache, checkpoints):
    cache = open_cache()
    cache(*checkpoints.audio(*SAMPLES))
    shard = entries(cache.folder)[0].parent
    foreign = [cache.folder / "notes.txt", shard / "notes.outputs", shard / "notes"]
    for path in foreign:
        path.write_text("mine")
    open_cache(dtype="bfloat16")
    assert entries(cache.folder) == foreign[1:2] and all(path.read_text() == "mine" for path in foreign)


def test_a_file_in_place_of_the_folder(open_cache, tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(ValueError, match="criterion.teacher_cache: '.*cache' is a file; expected a folder"):
        open_cache()


def test_a_folder_that_cannot_be_made(open_cache, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "cache").symlink_to(tmp_path / "file" / "below")
    with pytest.raises(ValueError, match="criterion.teacher_cache: cannot use '.*cache'.*can be written"):
        open_cache()


def test_an_unknown_storage(open_cache):
    with pytest.raises(ValueError, match="criterion.teacher_cache_dtype: found 'int8', expected one of float16"):
        open_cache(storage="int8")


# the data set's identity


def write_data(folder, root="/audio", train=("a.wav\t900", "b.wav\t500"), **splits):
    folder.mkdir(parents=True, exist_ok=True)
    for split, lines in {"train": train, "valid": ("c.wav\t700",), **splits}.items():
        (folder / f"{split}.tsv").write_text("\n".join([root, *lines]) + "\n")
    return folder


def test_a_data_set_is_its_training_manifest(tmp_path):
    first = DatasetIdentity.of(write_data(tmp_path / "a"))
    assert first.path == str((tmp_path / "a").resolve()) and first.utterances == 3
    other_root = DatasetIdentity.of(write_data(tmp_path / "b", root="/moved", test=("d.wav\t1", "e.wav\t2")))
    assert other_root.content == first.content and other_root.utterances == 5
    longer = DatasetIdentity.of(write_data(tmp_path / "c", train=("a.wav\t901", "b.wav\t500")))
    assert longer.content != first.content


def test_a_data_set_whose_training_manifest_has_another_name(tmp_path):
    folder = write_data(tmp_path / "a")
    (folder / "train.tsv").rename(folder / "train_clean.tsv")
    first = DatasetIdentity.of(folder)
    write_data(folder, valid=("c.wav\t701",))
    (folder / "train.tsv").unlink()
    assert DatasetIdentity.of(folder).content != first.content and first.utterances == 3


def test_a_data_folder_without_manifests(tmp_path):
    with pytest.raises(FileNotFoundError, match="no manifest"):
        DatasetIdentity.of(tmp_path)


# audio that is cropped at random


def crops(checkpoints, cache, epochs, utterances):
    """Epochs over `utterances`, each cut anew."""
    source, _ = checkpoints.audio(*[2000] * utterances)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for row in source:
            start = int(torch.randint(900, (), generator=generator))
            cache(row[None, start : start + 100])


def test_random_crops_are_stored_for_a_while_only(open_cache, checkpoints, caplog):
    cache = open_cache(layers=(0,), needs_logits=False, data=DatasetIdentity("/data", "d" * 64, 20))
    with caplog.at_level(logging.WARNING):
        crops(checkpoints, cache, 15, 20)
    assert len(entries(cache.folder)) == 1.5 * 20 + 100
    (message,) = warnings_of(caplog)
    for words in ("criterion.teacher_cache: ", "cropped at random", "20 utterances", "task.max_sample_size"):
        assert words in message


def test_random_crops_of_several_runs_do_not_fill_the_disk(open_cache, checkpoints, caplog):
    data = DatasetIdentity("/data", "d" * 64, 20)
    with caplog.at_level(logging.WARNING):
        for seed in range(4):
            cache = open_cache(layers=(0,), needs_logits=False, data=data)
            source, _ = checkpoints.audio(*[100] * 60, seed=seed)
            cache(source)
    assert len(entries(cache.folder)) == 3 * 20 + 100
    assert len(warnings_of(caplog)) == 2, "one for each run that was stopped"


def test_what_is_stored_is_still_read_then(open_cache, checkpoints):
    cache = open_cache(layers=(0,), needs_logits=False, data=DatasetIdentity("/data", "d" * 64, 1))
    source, _ = checkpoints.audio(*[100] * 150)
    cache(source)
    assert len(entries(cache.folder)) == 102
    cache(source)
    assert (cache.hits, cache.misses) == (102, 198)


# several processes

WRITER = """
import sys, torch
import fairseq
from fairseq_w2v2_light.criterions.teacher import Teacher
from fairseq_w2v2_light.criterions.teacher_cache import CachedTeacher, DatasetIdentity

path, folder, order = sys.argv[1:]
teacher = Teacher.load(path, layers=(0, 3), needs_logits=True)
cache = CachedTeacher(teacher, folder, DatasetIdentity("/data/digits", "d" * 64, 1000))
source = torch.randn(100, 900, generator=torch.Generator().manual_seed(3))
print("ready", flush=True)
sys.stdin.readline()
for row in (range(100) if order == "up" else reversed(range(100))):
    cache(source[row:row + 1])
print(cache.hits + cache.misses, flush=True)
if order == "down":
    while True:
        cache(torch.randn(1, 900))
"""


def writer(files, folder, order):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WRITER, files.stock_ctc, str(folder), order]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def test_two_processes_fill_one_cache_and_one_of_them_is_killed(files, open_cache, tmp_path, caplog):
    processes = [writer(files, tmp_path / "cache", order) for order in ("up", "down")]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 2
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.stdout.readline() for process in processes] == ["100\n"] * 2
    processes[1].send_signal(signal.SIGKILL)
    for process in processes:
        process.communicate(timeout=120)
    assert [process.returncode for process in processes] == [0, -signal.SIGKILL]

    with caplog.at_level(logging.WARNING):
        cache = open_cache()
        source = torch.randn(100, 900, generator=torch.Generator().manual_seed(3))
        expected = Teacher.load(files.stock_ctc, layers=(0, 3), needs_logits=True)(source)
        assert_same(cache(source), expected, TOLERANCE["float16"])
        for path in entries(cache.folder):
            assert set(read_entry(path, bytes.fromhex(cache.teacher.fingerprint)[:16])) == {"0", "3", "logits"}
    assert cache.misses == 0 and warnings_of(caplog) == []


def test_unfinished_files_are_ignored(open_cache, checkpoints, caplog):
    """What a killed process leaves."""
    cache = open_cache()
    cache(*checkpoints.audio(*SAMPLES))
    (path,) = entries(cache.folder)[:1]
    path.with_name(f".{path.stem}.xyz.outputs").write_bytes(b"half")
    (cache.folder / ".cache.xyz.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        again = open_cache()
        again(*checkpoints.audio(*SAMPLES))
    assert again.misses == 0 and warnings_of(caplog) == []
