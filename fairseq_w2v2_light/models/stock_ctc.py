"""Lets fairseq's own `wav2vec_ctc` start from a fine-tuned checkpoint: its encoder is taken, the head is new.

Stock code rebuilds the model that `model.w2v_path` names as a pre-training model, and dies on one that is a CTC model
already (a distilled student, say).
"""

from argparse import Namespace

from fairseq import checkpoint_utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf, overwrite_args_by_name
from fairseq.models.wav2vec import wav2vec2_asr
from omegaconf import OmegaConf

from .checkpoint import CTC_MODELS, encoder_weights, model_name


class _EncoderReader:
    """Stands in for the module `checkpoint_utils` where wav2vec2_asr uses it; all but reading is the module's own."""

    def __getattr__(self, name):
        return getattr(checkpoint_utils, name)

    @staticmethod
    def load_checkpoint_to_cpu(path, arg_overrides=None, **options):
        # looked up on every call: others of the plugin replace it, some for a moment only
        state = checkpoint_utils.load_checkpoint_to_cpu(path, arg_overrides, **options)
        cfg = state.get("cfg")
        if cfg is None or model_name(cfg) not in CTC_MODELS or cfg.model.get("w2v_args") is None:
            return state
        encoder_cfg = cfg.model.w2v_args
        if isinstance(encoder_cfg, Namespace):
            encoder_cfg = convert_namespace_to_omegaconf(encoder_cfg)
        # a config of its own: the checkpoint's is closed to new keys, which stock code sets
        encoder_cfg = OmegaConf.create(OmegaConf.to_container(encoder_cfg, enum_to_str=True))
        overwrite_args_by_name(encoder_cfg, arg_overrides or {})
        return {"cfg": encoder_cfg, "model": encoder_weights(state["model"])}


def accept_ctc_checkpoints() -> None:
    """Gives fairseq's wav2vec2_asr the stand-in, once a process."""
    if not isinstance(wav2vec2_asr.checkpoint_utils, _EncoderReader):
        wav2vec2_asr.checkpoint_utils = _EncoderReader()


accept_ctc_checkpoints()
