"""light_pretraining: crops that can be reproduced, and manifests that are checked before training."""

import numpy as np
import pytest
import soundfile
import torch
from fairseq import tasks
from omegaconf import OmegaConf

import fairseq_w2v2_light  # noqa: F401 - registers the task

LENGTHS = (9000, 12000, 16000, 5000)


@pytest.fixture
def data(tmp_path):
    """A manifest folder of noise."""
    generator = np.random.default_rng(0)
    lines = [str(tmp_path)]
    for index, length in enumerate(LENGTHS):
        soundfile.write(tmp_path / f"{index}.wav", generator.normal(0, 0.1, length).astype(np.float32), 16000)
        lines.append(f"{index}.wav\t{length}")
    (tmp_path / "train.tsv").write_text("\n".join(lines) + "\n")
    return tmp_path


def load(folder, split="train", **keys):
    cfg = {"_name": "light_pretraining", "data": str(folder), "normalize": False, "max_sample_size": 4000, "tpu": False}
    task = tasks.setup_task(OmegaConf.create({**cfg, **keys}))
    task.load_dataset(split)
    return task.dataset(split)


def batch(dataset, epoch, order=(0, 1, 2, 3)):
    dataset.set_epoch(epoch)
    collated = dataset.collater([dataset[index] for index in order])
    return dict(zip(collated["id"].tolist(), collated["net_input"]["source"]))


def test_crops_of_an_epoch_are_reproduced(data):
    first = batch(load(data), epoch=3)
    np.random.seed(99)
    again = batch(load(data), epoch=3)
    assert all(torch.equal(first[index], again[index]) for index in first)


def test_crops_do_not_depend_on_the_rest_of_the_batch(data):
    dataset = load(data)
    together, reversed_order = batch(dataset, 2), batch(dataset, 2, (3, 2, 1, 0))
    alone = batch(dataset, 2, (1,))
    for found in (reversed_order, alone):
        assert all(torch.equal(together[index], found[index]) for index in found)


def test_crops_differ_between_epochs_and_utterances(data):
    dataset = load(data)
    epochs = [batch(dataset, epoch) for epoch in range(1, 6)]
    for index in range(4):
        assert len({tuple(crops[index].tolist()) for crops in epochs}) >= 4


def test_crops_reach_the_entire_utterance(data):
    dataset = load(data, max_sample_size=1000)
    whole = dataset[3]["source"]
    starts = []
    for epoch in range(1, 41):
        crop = batch(dataset, epoch, (3,))[3]
        starts += [start for start in range(len(whole) - 999) if torch.equal(whole[start : start + 1000], crop)]
    assert len(starts) == 40
    assert min(starts) < 800 and max(starts) > 3200


def test_global_randomness_is_left_alone(data):
    dataset = load(data)
    np.random.seed(5)
    expected = np.random.random()
    np.random.seed(5)
    batch(dataset, 1)
    assert np.random.random() == expected


def test_utterances_that_fit_are_not_cropped(data):
    dataset = load(data, max_sample_size=None)
    found = batch(dataset, 1, (3,))[3]
    assert torch.equal(found, dataset[3]["source"])


def test_crops_in_workers_follow_the_epoch(data):
    """The dataset reaches worker processes with its current epoch."""
    dataset = load(data)
    for epoch in (1, 2):
        dataset.set_epoch(epoch)
        loader = torch.utils.data.DataLoader(dataset, batch_size=4, num_workers=1, collate_fn=dataset.collater)
        (found,) = list(loader)
        expected = batch(dataset, epoch)
        assert all(torch.equal(expected[index], row) for index, row in enumerate(found["net_input"]["source"]))


def test_the_dataset_can_be_pickled(data):
    """Worker processes that do not fork (macOS, `spawn`) get a pickled copy."""
    import pickle

    dataset = load(data)
    dataset.set_epoch(2)
    twin = pickle.loads(pickle.dumps(dataset))
    expected = batch(dataset, 2)
    found = dict(enumerate(twin.collater([twin[i] for i in range(4)])["net_input"]["source"]))
    assert all(torch.equal(expected[index], found[index]) for index in found)


def test_normalised_audio(data):
    source = load(data, normalize=True)[0]["source"]
    assert source.mean().abs() < 1e-5 and source.std() == pytest.approx(1, abs=1e-3)


# bad data


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing: no such data folder"):
        load(tmp_path / "nothing")


def test_missing_split(data):
    with pytest.raises(FileNotFoundError, match="valid.tsv: no such file; .*w2v2-light prepare"):
        load(data, "valid")


def test_empty_split(data):
    (data / "valid.tsv").write_text(f"{data}\n")
    with pytest.raises(ValueError, match="valid.tsv: split 'valid' is empty"):
        load(data, "valid")


def test_empty_file(data):
    (data / "valid.tsv").write_text("")
    with pytest.raises(ValueError, match="valid.tsv:1: found no root directory"):
        load(data, "valid")


def test_a_malformed_line_is_named(data):
    (data / "valid.tsv").write_text(f"{data}\n0.wav\t9000\n1.wav 12000\n")
    with pytest.raises(ValueError, match="valid.tsv:3: found '1.wav 12000'; expected 'relative path<TAB>"):
        load(data, "valid")


def test_missing_audio_is_named(data):
    (data / "valid.tsv").write_text(f"{data}\ngone.wav\t9000\n")
    with pytest.raises(ValueError, match="valid.tsv:2: .*gone.wav"):
        load(data, "valid")


def test_a_file_that_is_not_audio_is_named(data):
    (data / "text.wav").write_text("not audio")
    (data / "valid.tsv").write_text(f"{data}\ntext.wav\t9000\n")
    with pytest.raises(ValueError, match="valid.tsv:2: .*text.wav"):
        load(data, "valid")


@pytest.mark.parametrize("rate, channels", ((8000, 1), (16000, 2)))
def test_another_rate_or_stereo_is_named(data, rate, channels):
    soundfile.write(data / "other.wav", np.zeros((9000, channels), np.float32), rate)
    (data / "valid.tsv").write_text(f"{data}\nother.wav\t9000\n")
    with pytest.raises(ValueError, match="valid.tsv:2: .*other.wav"):
        load(data, "valid")
