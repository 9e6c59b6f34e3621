import random

import numpy as np
import pytest
import soundfile

from fairseq_w2v2_light.data.check import check_folder
from fairseq_w2v2_light.data.corpus import Options, speak
from fairseq_w2v2_light.data.manifest import read_labels, read_manifest, validate_split
from fairseq_w2v2_light.data.synth import (
    DEFAULT_VOICES,
    DIGITS,
    Espeak,
    SynthOptions,
    read_vocabulary,
    speak_utterance,
    trim_silence,
)

pytest.importorskip("espeakng_loader", reason="pip install espeakng-loader to run this")

SMALL = {"train": 12, "valid": 2, "test": 4}


def audio_bytes(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.flac"))}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    out = tmp_path_factory.mktemp("synth") / "corpus"
    speak(SynthOptions(utterances=SMALL), out, Options())
    return out


def test_corpus_is_sound(corpus):
    for split, count in SMALL.items():
        validate_split(corpus, split, "ltr")
        assert len(read_manifest(corpus / f"{split}.tsv").entries) == count
    for report in check_folder(corpus, deep=True):
        assert (report.problems, report.notes) == ([], [])


def test_texts_are_strings_of_one_to_six_digits(corpus):
    words = [line.split() for line in read_labels(corpus / "train.wrd")]
    assert {word for line in words for word in line} <= {digit.upper() for digit in DIGITS}
    assert all(1 <= len(line) <= 6 for line in words) and len({len(line) for line in words}) > 2


def test_audio_is_16_khz_mono_and_neither_silent_nor_clipped(corpus):
    for path in corpus.rglob("*.flac"):
        wave, rate = soundfile.read(str(path))
        assert (rate, wave.ndim) == (16000, 1)
        assert 0.02 < np.sqrt(np.mean(wave**2)) < 0.2 and np.abs(wave).max() < 0.99


def test_no_voice_speaks_in_two_splits(corpus):
    voices = [{entry.path.split("/")[2] for entry in read_manifest(corpus / f"{s}.tsv").entries} for s in SMALL]
    assert not voices[0] & voices[1] and not voices[0] & voices[2] and not voices[1] & voices[2]


def test_default_variants_of_valid_and_test_are_not_in_train():
    variants = {split: {voice.split("+")[1] for voice in voices} for split, voices in DEFAULT_VOICES.items()}
    assert not variants["train"] & (variants["valid"] | variants["test"]) and not variants["valid"] & variants["test"]


def test_same_seed_same_samples(corpus, tmp_path):
    speak(SynthOptions(utterances=SMALL), tmp_path / "again", Options())
    assert audio_bytes(tmp_path / "again") == audio_bytes(corpus)
    speak(SynthOptions(utterances=SMALL, seed=1), tmp_path / "other", Options())
    assert read_labels(tmp_path / "other" / "train.wrd") != read_labels(corpus / "train.wrd")


def test_every_default_voice_speaks_every_digit_its_own_way():
    waves = {}
    with Espeak() as speaker:
        for voice in sum(DEFAULT_VOICES.values(), []):
            for word in DIGITS:
                wave, rate = speaker.say(word, voice)
                wave = trim_silence(wave, rate, 0.0)
                assert rate == 22050 and 0.15 < len(wave) / rate < 1.2, (voice, word)
                assert np.sqrt(np.mean(wave**2)) > 0.02, (voice, word)
                waves[voice, word] = wave.tobytes()
    assert len(set(waves.values())) == len(waves)


def test_hours_fill_each_split(tmp_path):
    hours = {"train": 0.004, "valid": 0.001, "test": 0.001}
    summary = speak(SynthOptions(hours=hours), tmp_path / "out", Options())
    for split, wanted in hours.items():
        assert wanted <= summary.hours[split] < wanted + 5 / 3600


def test_vocabulary_and_sentencepiece(tmp_path):
    (tmp_path / "words.txt").write_text("open\nclose\n\nopen\nwindow\n")
    words = read_vocabulary(tmp_path / "words.txt")
    assert words == ("open", "close", "window")
    options = SynthOptions(utterances=SMALL, words=words, words_per_utterance=(2, 2))
    speak(options, tmp_path / "out", Options(labels="sentencepiece", vocab_size=16))
    assert {word for line in read_labels(tmp_path / "out" / "train.wrd") for word in line.split()} <= {
        "OPEN",
        "CLOSE",
        "WINDOW",
    }
    validate_split(tmp_path / "out", "test", "spm")


def test_noise_lowers_the_ratio():
    with Espeak() as speaker:
        clean = speak_utterance(speaker, "one", "en-us", random.Random(0))
    with Espeak() as speaker:
        noisy = speak_utterance(speaker, "one", "en-us", random.Random(0), (10.0, 10.0))
    speech, noise = np.mean(clean**2), np.mean((noisy - clean) ** 2)
    assert 10 * np.log10(speech / noise) == pytest.approx(10, abs=1)


def test_trimming_keeps_a_margin():
    wave = np.concatenate([np.zeros(5000), np.ones(1000), np.zeros(5000)])
    assert len(trim_silence(wave, 10000, 0.1)) == 3000
    assert len(trim_silence(np.zeros(10), 10000)) == 0


@pytest.mark.parametrize(
    "voice, message",
    [
        ("en-us+nosuch", "voice 'en-us[+]nosuch': espeak-ng has no variant 'nosuch'; it has .*f1"),
        ("klingon9+f1", "voice 'klingon9[+]f1': espeak-ng has no accent 'klingon9'"),
        ("", "has no accent ''"),
        ("en-us+", "has no variant ''"),
    ],
)
def test_unknown_voices_are_refused_before_anything_is_spoken(tmp_path, voice, message):
    voices = {"train": ["en-us"], "valid": ["en"], "test": [voice]}
    with pytest.raises(ValueError, match=message):
        speak(SynthOptions(utterances={**SMALL, "train": 10**6}, voices=voices), tmp_path / "out", Options())
    assert list(tmp_path.iterdir()) == []


def test_a_word_that_is_not_spoken_is_named(tmp_path):
    with pytest.raises(ValueError, match="espeak-ng says nothing for '_+.*remove the word or the voice"):
        speak(SynthOptions(utterances=SMALL, words=("_",)), tmp_path / "out", Options())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options, message",
    [
        ({"voices": {"train": ["a"], "valid": ["a"], "test": ["b"]}}, "voice 'a' is in 'train' and in 'valid'"),
        ({"voices": {"train": ["a"], "valid": ["c"]}}, "split 'test' has no voice; name some with --test-voices"),
        ({"utterances": {"train": 0}}, "--utterances: 0 for split 'train'"),
        ({"hours": {"train": -1.0}}, "--hours: -1.0 for split 'train'"),
        ({"words": ()}, "--vocabulary: the file holds no word"),
        ({"words_per_utterance": (3, 2)}, "--words 3 2: expected 1 <= fewest <= most"),
        ({"noise_db": (9.0, 3.0)}, "--noise 9.0 3.0: expected lowest before highest"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SynthOptions(**options)


def test_a_missing_or_unreadable_vocabulary_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"words\.txt: no such vocabulary file"):
        read_vocabulary(tmp_path / "words.txt")
    (tmp_path / "words.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match=r"words\.txt: not a UTF-8 text file"):
        read_vocabulary(tmp_path / "words.txt")
