"""A small spoken corpus from espeak-ng, through the PyPI package espeakng-loader: no system package, no download.

Every voice belongs to one split, so that valid and test are spoken by voices never heard in training. The same options
give the same samples with the same versions of espeakng-loader and numpy.
"""

import ctypes
import os
import random
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Tuple

import numpy as np

from fairseq_w2v2_light.data.audio import resample, write_flac
from fairseq_w2v2_light.data.manifest import SAMPLE_RATE
from fairseq_w2v2_light.data.progress import progress
from fairseq_w2v2_light.data.sources import Utterance
from fairseq_w2v2_light.files import read_utf8

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Accent+variant, as espeak-ng names them ("en" is British). A variant sets formants and pitch: no variant of valid or
# test, nor a near copy of one, is in train.
DEFAULT_VOICES = {
    "train": (
        "en-us+m1 en+m3 en-us+m7 en+max en-us+paul en+rob en-us+ed en-us+Gene en-us+iven en-us+Mario en+Denis "
        "en-gb-x-rp+Alex en-gb-scotland+m1 en-us+Andy en-us-nyc+pablo en-us+f3 en+f4 en-us+linda en-us+belinda "
        "en-us+steph en+f1 en-us+Andrea en-gb-x-rp+steph en-us+grandma"
    ).split(),
    "valid": "en-us+m8 en+f5".split(),
    "test": "en-us+m4 en+boris en-us+f2 en-us+m2".split(),
}
# espeak-ng's own parameters: words a minute; percent of the voice's pitch; pause between words in 10 ms.
RATES = (125, 185)
PITCHES = (35, 65)
PITCH_RANGES = (30, 70)
WORD_GAPS = (0, 6)
LEVELS_DB = (-28.0, -18.0)
# Exact digital silence does not occur in recordings; this floor stands for theirs.
FLOOR_DB = -66.0
SILENCE_SECONDS = 0.1

_AUDIO_OUTPUT_SYNCHRONOUS = 2
_DONT_EXIT = 0x8000
_CHARS_UTF8 = 1
_RATE, _PITCH, _PITCH_RANGE, _WORD_GAP = 1, 3, 4, 7
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


@dataclass(frozen=True)
class SynthOptions:
    """What to speak. `utterances` or, if given, `hours` per split; `noise_db`: lowest and highest ratio to speech."""

    utterances: Dict[str, int] = field(default_factory=lambda: {"train": 900, "valid": 60, "test": 100})
    hours: Optional[Dict[str, float]] = None
    voices: Dict[str, List[str]] = field(default_factory=lambda: {k: list(v) for k, v in DEFAULT_VOICES.items()})
    words: Tuple[str, ...] = DIGITS
    words_per_utterance: Tuple[int, int] = (1, 6)
    noise_db: Optional[Tuple[float, float]] = None
    seed: int = 0

    def __post_init__(self):
        fewest, most = self.words_per_utterance
        if not 1 <= fewest <= most:
            raise ValueError(f"--words {fewest} {most}: expected 1 <= fewest <= most")
        if not self.words:
            raise ValueError("--vocabulary: the file holds no word; expected one word a line")
        for name, amounts in (("utterances", self.utterances), ("hours", self.hours or {})):
            for split, amount in amounts.items():
                if amount <= 0:
                    raise ValueError(f"--{name}: {amount} for split {split!r}; expected more than 0")
        if self.noise_db is not None and self.noise_db[0] > self.noise_db[1]:
            raise ValueError(f"--noise {self.noise_db[0]} {self.noise_db[1]}: expected lowest before highest")
        owner: Dict[str, str] = {}
        for split in self.amounts():
            if not self.voices.get(split):
                raise ValueError(f"split {split!r} has no voice; name some with --{split}-voices")
            for voice in self.voices[split]:
                if owner.setdefault(voice, split) != split:
                    raise ValueError(
                        f"voice {voice!r} is in {owner[voice]!r} and in {split!r}; a voice may speak in one split only"
                    )

    def amounts(self) -> Dict[str, float]:
        """Split -> utterances or hours."""
        return dict(self.hours or self.utterances)


class Espeak:
    """A private instance of espeak-ng: `with Espeak() as speaker: wave, rate = speaker.say(...)`.

    espeak-ng keeps hidden state from one utterance to the next; a fresh copy of the library has none, so that what an
    instance says depends on its own calls only. The folder of the copy also keeps the data path short, which espeak-ng
    cuts at 160 characters.
    """

    def __enter__(self) -> "Espeak":
        try:
            import espeakng_loader
        except ImportError:
            raise ValueError("espeak-ng is not installed; install it with `pip install espeakng-loader`") from None
        self._folder = tempfile.mkdtemp(prefix="espeak")
        try:
            self._start(espeakng_loader.get_library_path(), espeakng_loader.get_data_path())
        except Exception:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        return self

    def _start(self, library_path: str, data_path: str) -> None:
        self._variants = Path(data_path) / "voices" / "!v"
        try:
            self._library = ctypes.CDLL(shutil.copy(library_path, self._folder))
        except OSError as error:
            raise ValueError(f"espeak-ng cannot be loaded from {library_path}: {error}") from None
        link = os.path.join(self._folder, "espeak-ng-data")
        try:
            os.symlink(data_path, link)
        except OSError:
            link = data_path
        self._rate = self._library.espeak_Initialize(_AUDIO_OUTPUT_SYNCHRONOUS, 0, link.encode(), _DONT_EXIT)
        if self._rate <= 0:
            raise ValueError(f"espeak-ng did not start with its data in {data_path} (status {self._rate})")
        self._heard: List[bytes] = []
        # The library keeps the pointer: the callback must live as long as the instance.
        self._callback = _CALLBACK(self._hear)
        self._library.espeak_SetSynthCallback(self._callback)
        # Breath noise is drawn from a generator that espeak-ng seeds with the time of day, and Klatt voices use C's.
        if hasattr(self._library, "espeak_ng_SetRandSeed"):
            self._library.espeak_ng_SetRandSeed(ctypes.c_long(1))
        if os.name == "posix":
            ctypes.CDLL(None).srand(1)

    def _hear(self, samples, count: int, events) -> int:
        if samples and count > 0:
            self._heard.append(ctypes.string_at(samples, 2 * count))
        return 0

    def __exit__(self, *exception) -> None:
        self._library.espeak_Terminate()
        shutil.rmtree(self._folder, ignore_errors=True)

    def set_voice(self, voice: str) -> None:
        """Chooses `accent` or `accent+variant`; raises ValueError, saying which part is unknown."""
        accent, _, variant = voice.partition("+")
        # espeak-ng itself ignores a variant that it does not know.
        if "+" in voice and not (self._variants / variant).is_file():
            known = ", ".join(sorted(path.name for path in self._variants.iterdir() if " " not in path.name))
            raise ValueError(f"voice {voice!r}: espeak-ng has no variant {variant!r}; it has {known}")
        if not accent or self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(
                f"voice {voice!r}: espeak-ng has no accent {accent!r}; English ones are en, en-us, en-us-nyc, en-029, "
                "en-gb-scotland, en-gb-x-rp, en-gb-x-gbclan, en-gb-x-gbcwmd"
            )

    def say(
        self, text: str, voice: str, rate: int = 160, pitch: int = 50, pitch_range: int = 50, word_gap: int = 0
    ) -> Tuple[np.ndarray, int]:
        """Speaks `text`. Returns the samples (time,) float32 in [-1, 1] and their rate in Hz (22050)."""
        self.set_voice(voice)
        for parameter, value in ((_RATE, rate), (_PITCH, pitch), (_PITCH_RANGE, pitch_range), (_WORD_GAP, word_gap)):
            self._library.espeak_SetParameter(parameter, value, 0)
        self._heard.clear()
        encoded = text.encode("utf-8")
        status = self._library.espeak_Synth(encoded, len(encoded) + 1, 0, 1, 0, _CHARS_UTF8, None, None)
        if status != 0:
            raise ValueError(f"espeak-ng could not speak {text!r} (status {status})")
        self._library.espeak_Synchronize()
        return np.frombuffer(b"".join(self._heard), np.int16).astype(np.float32) / 32768, self._rate


def trim_silence(wave: np.ndarray, rate: int, keep_seconds: float = SILENCE_SECONDS) -> np.ndarray:
    """Cuts leading and trailing samples more than 50 dB below the peak, but for `keep_seconds`; (time,) -> (less,)."""
    loud = np.flatnonzero(np.abs(wave) > 10 ** (-50 / 20) * np.abs(wave).max(initial=0))
    if not len(loud):
        return wave[:0]
    keep = int(keep_seconds * rate)
    return wave[max(0, loud[0] - keep) : loud[-1] + 1 + keep]


def speak_utterance(
    speaker: Espeak, text: str, voice: str, chance: random.Random, noise_db: Optional[Tuple[float, float]] = None
) -> np.ndarray:
    """Speaks `text` at a speed, pitch, level and noise drawn from `chance`; (time,) float32 at 16 kHz.

    The level is the root mean square of the speech. Raises ValueError when espeak-ng stays silent.
    """
    prosody = [chance.randint(*bounds) for bounds in (RATES, PITCHES, PITCH_RANGES, WORD_GAPS)]
    level = 10 ** (chance.uniform(*LEVELS_DB) / 20)
    noise = np.random.RandomState(chance.getrandbits(32))
    wave, rate = speaker.say(text, voice, *prosody)
    wave = trim_silence(wave, rate)
    if not len(wave):
        raise ValueError(f"espeak-ng says nothing for {text!r} with voice {voice!r}; remove the word or the voice")
    wave = resample(wave, rate)
    wave *= min(level / np.sqrt(np.mean(wave**2)), 0.95 / np.abs(wave).max())
    floor = 10 ** (FLOOR_DB / 20)
    if noise_db is not None:
        floor += float(np.sqrt(np.mean(wave**2))) * 10 ** (-chance.uniform(*noise_db) / 20)
    return wave + noise.standard_normal(len(wave)).astype(np.float32) * np.float32(floor)


def _plan(options: SynthOptions, split: str) -> Iterator[Tuple[str, str, random.Random]]:
    """Voice, text and source of chance of each utterance of a split, without end. Voices take turns."""
    index = 0
    while True:
        chance = random.Random(f"{options.seed} {split} {index}")
        words = [chance.choice(options.words) for _ in range(chance.randint(*options.words_per_utterance))]
        yield options.voices[split][index % len(options.voices[split])], " ".join(words), chance
        index += 1


def synthesise(options: SynthOptions, stage: Path, out: Path) -> Dict[str, List[Utterance]]:
    """Writes `stage/audio/SPLIT/VOICE/*.flac`; returns the utterances by split, with paths as they will be in `out`.

    Raises ValueError for an unknown voice (before anything is spoken) and for a word that a voice does not speak.
    """
    splits: Dict[str, List[Utterance]] = {}
    with Espeak() as speaker:
        for split in options.amounts():
            for voice in options.voices[split]:
                speaker.set_voice(voice)
        for split, amount in options.amounts().items():
            splits[split] = _synthesise_split(options, split, amount, speaker, stage, out)
    return splits


def _synthesise_split(
    options: SynthOptions, split: str, amount: float, speaker: Espeak, stage: Path, out: Path
) -> List[Utterance]:
    utterances: List[Utterance] = []
    seconds = 0.0
    total = None if options.hours else int(amount)
    for voice, text, chance in progress(_plan(options, split), f"speaking {split}", total):
        wave = speak_utterance(speaker, text, voice, chance, options.noise_db)
        name = voice.replace("+", "-").replace(" ", "_")
        relative = Path("audio") / split / name / f"{name}-{len(utterances):05d}.flac"
        write_flac(stage / relative, wave)
        utterances.append(Utterance(out / relative, text, voice, split, f"{voice}: {text}"))
        seconds += len(wave) / SAMPLE_RATE
        if (seconds >= amount * 3600) if options.hours else (len(utterances) >= amount):
            break
    return utterances


def read_vocabulary(path: Path) -> Tuple[str, ...]:
    """Words to speak, one a line; blank lines and repeated words are dropped."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such vocabulary file; expected one word a line")
    return tuple(dict.fromkeys(line.strip() for line in read_utf8(path).splitlines() if line.strip()))
