"""Audio that is verified as it is read, so that an error names the file and its line of the manifest."""

from pathlib import Path

import torch
from fairseq.data import BaseWrapperDataset
from fairseq.data.audio.raw_audio_dataset import FileAudioDataset

from ..data.audio import inspect_audio
from ..data.manifest import is_zip_slice, read_manifest


def check_audio(dataset, tsv: Path):
    """`dataset` with the FileAudioDataset of manifest `tsv`, wherever in its wrappers it is, as a CheckedAudio."""
    if isinstance(dataset, FileAudioDataset):
        return CheckedAudio(dataset, tsv)
    if isinstance(dataset, BaseWrapperDataset) and not isinstance(dataset, CheckedAudio):
        dataset.dataset = check_audio(dataset.dataset, tsv)
    return dataset


class CheckedAudio(BaseWrapperDataset):
    """A FileAudioDataset whose items are what the manifest says: mono, of the task's rate, finite, of that length.

    Reading an item raises ValueError or FileNotFoundError otherwise. Stock averages channels silently, lets NaN and
    truncated audio through, and says of other errors at best which file it was.
    """

    def __init__(self, dataset: FileAudioDataset, tsv: Path):
        super().__init__(dataset)
        self.tsv = tsv
        self.skipped_indices = dataset.skipped_indices
        dataset.postprocess = _MonoOnly(dataset.postprocess, dataset.sample_rate)

    def __getitem__(self, index):
        try:
            item = self.dataset[index]
            _verify(item["source"], int(self.sizes[index]))
            return item
        except Exception as error:  # soundfile's, fairseq's bare Exception, an AssertionError for zip files, ours
            raise self._explained(error, int(index)) from error

    def _explained(self, error: Exception, index: int) -> Exception:
        number, path = self._place(index)
        problem, advice = str(error), "prepare the folder again"
        if not is_zip_slice(str(path)):
            finding = inspect_audio(path, min_frames=1, deep=True)
            if finding.reason:
                problem = f"{finding.reason}: {finding.detail}"
                advice = "mend the file, or take its line out of the manifest (and that of the labels)"
            if finding.convertible:
                advice = "make a 16 kHz mono copy with `w2v2-light prepare --convert`"
        kind = ValueError if path.is_file() else FileNotFoundError
        return kind(
            f"{self.tsv}:{number}: {path}: {problem}; {advice}; `w2v2-light prepare check {self.tsv.parent} --deep` "
            "lists all such files"
        )

    def _place(self, index: int):
        """Line number and audio path of an item; utterances below min_sample_size are lines, but no items."""
        manifest = read_manifest(self.tsv)
        items = [item for item in enumerate(manifest.entries) if item[0] not in self.skipped_indices]
        position, entry = items[index]
        return position + 2, Path(manifest.root) / entry.path


class _MonoOnly:
    """Stands in for a dataset's `postprocess`, which averages channels."""

    def __init__(self, postprocess, sample_rate: int):
        self.postprocess = postprocess
        self.sample_rate = sample_rate

    def __call__(self, samples: torch.Tensor, rate: int) -> torch.Tensor:
        if samples.dim() != 1:
            raise ValueError(f"not mono: {samples.size(1)} channels, expected 1")
        if rate != self.sample_rate:
            raise ValueError(f"wrong sample rate: {rate} Hz, expected {self.sample_rate} Hz")
        return self.postprocess(samples, rate)


def _verify(samples: torch.Tensor, frames: int) -> None:
    if len(samples) != frames:
        raise ValueError(f"holds {len(samples)} samples, the manifest says {frames}")
    if not bool(torch.isfinite(samples).all()):
        raise ValueError("NaN samples: some samples are NaN or infinite")
