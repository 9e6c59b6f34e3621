"""Task `audio_ctc`: fine-tuning and decoding of CTC models, so that `fairseq-generate --task audio_ctc` works."""

import logging
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch
from fairseq.data import Dictionary
from fairseq.models.wav2vec.wav2vec2 import Wav2Vec2Model
from fairseq.tasks import register_task
from fairseq.tasks.audio_finetuning import AudioFinetuningConfig, AudioFinetuningTask

from fairseq_w2v2_light.data.manifest import first_difference, read_dictionary, validate_split
from fairseq_w2v2_light.models.checkpoint import require_finite_weights
from fairseq_w2v2_light.runtime.decode import Hypothesis, greedy, prefix_beam_search
from fairseq_w2v2_light.tasks.checked_audio import check_audio

logger = logging.getLogger(__name__)

# fairseq-generate's --max-tokens where none is given: meant for text, three quarters of a second of audio.
_GENERATE_MAX_TOKENS = 12000
# Samples a batch that fairseq's infer.py takes instead.
_AUDIO_MAX_TOKENS = 3000000


@dataclass
class AudioCtcConfig(AudioFinetuningConfig):
    """Keys of `audio_finetuning`, with defaults that fairseq-generate needs."""

    labels: Optional[str] = field(
        default="ltr",
        metadata={"help": "extension of the label files: ltr (letters), spm (sentencepieces), ..."},
    )


class CtcGenerator:
    """What fairseq-generate calls: a CTC model's log-probabilities in, hypotheses out, most probable first.

    `beam` 1 is greedy decoding, more is prefix beam search. `pad` and `eos` are in every fairseq dictionary and
    therefore among the model's outputs, but are no labels: they are never decoded.
    """

    def __init__(self, blank: int, pad: int, eos: int, beam: int = 1, nbest: int = 1):
        if not 1 <= nbest <= beam:
            raise ValueError(f"--nbest is {nbest}; expected 1 to {beam}, the value of --beam")
        self.blank = blank
        self.no_labels = [pad, eos]
        self.beam = beam
        self.nbest = nbest
        self.symbols_to_strip_from_output = {blank, eos}  # fairseq-generate strips these from what it prints

    @torch.no_grad()
    def generate(self, models, sample: Dict[str, Any], prefix_tokens=None, constraints=None) -> List[List[Dict]]:
        """Decodes one batch; a list of fairseq hypotheses (dicts) for each utterance, at least one.

        score: natural log of the labelling's probability. positional_scores: (tokens,) natural log of each token's
        probability at its first frame. alignment: pairs (frame, token position). Raises ValueError for prefixes,
        constraints and model ensembles, which CTC decoding here has no use for.
        """
        if prefix_tokens is not None or constraints is not None:
            raise ValueError("task audio_ctc takes neither --prefix-size nor --constraints")
        if len(models) != 1:
            raise ValueError(f"task audio_ctc decodes one model at a time; found {len(models)} in --path")
        log_probs, lengths = emissions(models[0], sample["net_input"])
        log_probs[..., self.no_labels] = -math.inf
        if self.beam == 1:
            nbest_lists = [[hypothesis] for hypothesis in greedy(log_probs, lengths, self.blank)]
        else:
            nbest_lists = prefix_beam_search(log_probs, lengths, self.blank, self.beam, self.nbest)
        return [
            [_fairseq_hypothesis(hypothesis, utterance) for hypothesis in nbest]
            for nbest, utterance in zip(nbest_lists, log_probs)
        ]


def emissions(model, net_input: Dict[str, Any]):
    """Log-probabilities (batch, time, symbols) of a fairseq CTC model and frames per utterance (batch,), on the CPU."""
    net_output = model(**{key: value for key, value in net_input.items() if key != "prev_output_tokens"})
    log_probs = model.get_normalized_probs(net_output, log_probs=True).transpose(0, 1).float().cpu()
    padding_mask = net_output.get("padding_mask")
    if padding_mask is None:
        return log_probs, torch.full((log_probs.size(0),), log_probs.size(1))
    return log_probs, (~padding_mask.cpu()).sum(dim=1)


def _fairseq_hypothesis(hypothesis: Hypothesis, log_probs: torch.Tensor) -> Dict[str, Any]:
    tokens = torch.tensor(hypothesis.tokens, dtype=torch.long)
    frames = torch.tensor(hypothesis.frames, dtype=torch.long)
    return {
        "tokens": tokens,
        "score": hypothesis.score,
        "positional_scores": log_probs[frames, tokens],
        "attention": None,
        "alignment": [(frame, position) for position, frame in enumerate(hypothesis.frames)],
        "timesteps": list(hypothesis.frames),
    }


@register_task("audio_ctc", dataclass=AudioCtcConfig)
class AudioCtcTask(AudioFinetuningTask):
    """`audio_finetuning` that decodes CTC models itself, checks its data, and leaves no utterance out."""

    cfg: AudioCtcConfig

    @property
    def source_dictionary(self):
        """None: the input is audio."""
        return None

    @property
    def dictionary_path(self) -> Path:
        """The dictionary file of the data folder."""
        folder = getattr(self.cfg, "target_dictionary", None) or self.cfg.data
        return Path(folder) / f"dict.{self.cfg.labels}.txt"

    def load_target_dictionary(self):
        """Reads the dictionary; raises FileNotFoundError that says which there are, ValueError for a malformed one."""
        path = self.dictionary_path
        if not path.is_file():
            found = ", ".join(sorted(p.name for p in path.parent.glob("dict.*.txt"))) or "none"
            raise FileNotFoundError(
                f"{path}: no such dictionary; found in {path.parent}: {found}. Choose the label kind with --labels "
                "(task.labels), or copy the dictionary that the model was trained with"
            )
        read_dictionary(path)
        return Dictionary.load(str(path))

    def load_state_dict(self, state_dict: Dict[str, Any]):
        """Takes a checkpoint's dictionary; raises ValueError where the data folder has another one."""
        saved = state_dict.get("target_dictionary")
        if saved is not None and self.dictionary_path.is_file():
            _check_same_dictionary(saved, self.load_target_dictionary(), self.dictionary_path)
        super().load_state_dict(state_dict)

    def load_dataset(self, split: str, task_cfg=None, **kwargs):
        """Loads a split after verifying it.

        `task_cfg`, given when decoding, is what the checkpoint was trained with: sample rate and normalisation follow
        it, whatever this task's own configuration says. Raises ValueError and FileNotFoundError for bad data; so does
        reading an item, for audio that is not what the manifest says.
        """
        if task_cfg is not None:
            for key in ("normalize", "sample_rate"):
                setattr(self.cfg, key, self._saved(task_cfg, key))
        is_plain = not getattr(self.cfg, "multi_corpus_keys", None) and not self.cfg.binarized_dataset
        if is_plain:
            validate_split(self.cfg.data, split, self.cfg.labels, self.cfg.min_sample_size)
        super().load_dataset(split, None, **kwargs)
        if is_plain:
            self.datasets[split] = check_audio(self.datasets[split], Path(self.cfg.data) / f"{split}.tsv")

    def _saved(self, task_cfg, key: str):
        value = task_cfg.get(key) if hasattr(task_cfg, "get") else getattr(task_cfg, key, None)
        if value is None:
            raise ValueError(
                f"the checkpoint's task does not say {key!r}, without which its model decodes garbage; "
                "it was not made by fairseq's audio_finetuning or audio_ctc"
            )
        if value != getattr(self.cfg, key):
            logger.info(f"task.{key}: {value}, as the checkpoint was trained (not {getattr(self.cfg, key)})")
        return value

    def get_batch_iterator(self, dataset, max_tokens=None, required_batch_size_multiple=1, **kwargs):
        """Batches every utterance: no batch is dropped for its size, and none needs more than `max_tokens`.

        fairseq-fixed drops what is left after the last full multiple; a `max_tokens` below the longest utterance
        stops fairseq, and is raised to it.
        """
        longest = max((dataset.num_tokens(index) for index in range(len(dataset))), default=0)
        if max_tokens == _GENERATE_MAX_TOKENS and longest > max_tokens:
            max_tokens = max(longest, _AUDIO_MAX_TOKENS)
        elif max_tokens is not None and longest > max_tokens:
            logger.warning(f"the longest utterance has {longest} samples: raising max_tokens from {max_tokens} to that")
            max_tokens = longest
        return super().get_batch_iterator(dataset, max_tokens=max_tokens, required_batch_size_multiple=1, **kwargs)

    def build_generator(self, models, args, seq_gen_cls=None, extra_gen_cls_kwargs=None, **kwargs):
        """A CTC generator of --beam and --nbest, or fairseq's own for an autoregressive model.

        Raises ValueError for what CTC decoding here does not do (sampling, a language model, soft alignments) and for a
        model that is no CTC model or holds NaN.
        """
        if self.cfg.autoregressive:
            return super().build_generator(models, args, seq_gen_cls, extra_gen_cls_kwargs, **kwargs)
        if getattr(args, "sampling", False):
            raise ValueError("task audio_ctc does not sample; leave --sampling out")
        if (extra_gen_cls_kwargs or {}).get("lm_model") is not None:
            raise ValueError("task audio_ctc takes no --lm-path; `w2v2-light infer decoding.type=kenlm` has one")
        if getattr(args, "print_alignment", None) == "soft":
            raise ValueError("task audio_ctc has hard alignments only; give --print-alignment hard")
        for model in models:
            if isinstance(model, Wav2Vec2Model):
                raise ValueError(
                    "the checkpoint of --path is a pre-trained encoder without labels; expected a CTC model: fine-tune "
                    "it first"
                )
            require_finite_weights(model.state_dict(), "the checkpoint of --path")
        dictionary = self.target_dictionary
        blank = dictionary.index(self.blank_symbol)
        beam, nbest = getattr(args, "beam", 5), getattr(args, "nbest", 1)
        return CtcGenerator(blank, dictionary.pad(), dictionary.eos(), beam, nbest)


def _check_same_dictionary(saved: Dictionary, found: Dictionary, path: os.PathLike) -> None:
    if saved.symbols == found.symbols:
        return
    index, *symbols = first_difference(saved.symbols, found.symbols)
    expected, got = ("nothing" if symbol is None else symbol for symbol in symbols)
    raise ValueError(
        f"{path}: its {len(found)} symbols are not the {len(saved)} that the checkpoint was trained with: symbol "
        f"number {index} is {got!r}, expected {expected!r}; decode with the dictionary of the training data"
    )
