from pathlib import Path

import numpy as np
import pytest
import soundfile

SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture
def shared_data():
    """Folder of shared speech beside the repository."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no shared speech: put the folders digits and librispeech_sample into ../shared/data to run this")
    return SHARED_DATA


@pytest.fixture
def tone():
    """Writes a quiet sine: tone(path, seconds=, rate=, channels=, subtype=, value=)."""

    def write(path, seconds=0.5, rate=16000, channels=1, subtype=None, hertz=440.0):
        path.parent.mkdir(parents=True, exist_ok=True)
        time = np.arange(round(seconds * rate)) / rate
        wave = 0.1 * np.sin(2 * np.pi * hertz * time).astype(np.float32)
        soundfile.write(str(path), wave[:, None].repeat(channels, axis=1), rate, subtype=subtype)
        return path

    return write


@pytest.fixture
def nan_wave(tone):
    """Writes a float WAV with one NaN sample."""

    def write(path):
        tone(path, subtype="FLOAT")
        wave, rate = soundfile.read(str(path), dtype="float32")
        wave[100] = np.nan
        soundfile.write(str(path), wave, rate, subtype="FLOAT")
        return path

    return write


@pytest.fixture
def manifest_folder(tmp_path, tone):
    """A sound manifest folder of three utterances, split train."""
    for index in range(3):
        tone(tmp_path / "audio" / f"{index}.flac", seconds=1 + index / 4)
    data = tmp_path / "data"
    data.mkdir()
    lines = "".join(f"{i}.flac\t{int(16000 * (1 + i / 4))}\n" for i in range(3))
    (data / "train.tsv").write_text(f"{tmp_path / 'audio'}\n{lines}")
    (data / "train.ltr").write_text("A B |\nB |\nA | B |\n")
    (data / "train.wrd").write_text("AB\nB\nA B\n")
    (data / "dict.ltr.txt").write_text("| 4\nB 3\nA 2\n")
    return data
