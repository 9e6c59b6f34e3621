"""Task `light_pretraining`: fairseq's audio_pretraining with checked manifests and reproducible crops."""

import functools
import logging
import zlib
from dataclasses import dataclass
from pathlib import Path

from fairseq.data.data_utils import numpy_seed
from fairseq.tasks import register_task
from fairseq.tasks.audio_pretraining import AudioPretrainingConfig, AudioPretrainingTask

from ..data.manifest import validate_split
from .checked_audio import check_audio

logger = logging.getLogger(__name__)


@dataclass
class LightPretrainingConfig(AudioPretrainingConfig):
    pass


@register_task("light_pretraining", dataclass=LightPretrainingConfig)
class LightPretrainingTask(AudioPretrainingTask):
    """audio_pretraining whose random crops are a function of (epoch, utterance).

    Stock crops from numpy's global state, which no checkpoint stores, so that a resumed run trains on other audio.
    """

    def load_dataset(self, split: str, task_cfg=None, **kwargs) -> None:
        """Loads a split; raises ValueError or FileNotFoundError that names the manifest line at fault.

        So does reading an item of it, for audio that is not what the manifest says.
        """
        validate_split(self.cfg.data, split, None, self.cfg.min_sample_size)
        super().load_dataset(split, task_cfg, **kwargs)
        _seed_crops(self.datasets[split])
        self.datasets[split] = check_audio(self.datasets[split], Path(self.cfg.data) / f"{split}.tsv")

    def get_batch_iterator(self, dataset, *args, required_batch_size_multiple=1, **kwargs):
        """Stock's, but a dataset of fewer utterances than `required_batch_size_multiple` is no empty one."""
        if len(dataset) < required_batch_size_multiple:
            logger.warning(
                f"{len(dataset)} utterances are fewer than dataset.required_batch_size_multiple="
                f"{required_batch_size_multiple}: using 1"
            )
            required_batch_size_multiple = 1
        return super().get_batch_iterator(
            dataset, *args, required_batch_size_multiple=required_batch_size_multiple, **kwargs
        )


class _SeededCrops:
    """Stands in for a dataset's `crop_to_max_size`: its random crop depends on the epoch and the audio only."""

    def __init__(self, crop):
        self.crop = crop
        self.epoch = 1

    def __call__(self, wave, *args, **kwargs):
        with numpy_seed(zlib.crc32(wave[:16000].contiguous().numpy().tobytes()), self.epoch):
            return self.crop(wave, *args, **kwargs)


def _seed_crops(dataset) -> None:
    dataset.crop_to_max_size = crops = _SeededCrops(dataset.crop_to_max_size)
    dataset.set_epoch = functools.partial(_set_epoch, crops, dataset.set_epoch)


def _set_epoch(crops: _SeededCrops, set_epoch, epoch) -> None:
    crops.epoch = epoch
    set_epoch(epoch)
