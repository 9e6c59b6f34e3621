"""fairseq tasks; importing the package registers them."""

from fairseq_w2v2_light.tasks import audio_ctc, light_pretraining

__all__ = ["audio_ctc", "light_pretraining"]
