"""A tiny stock wav2vec_ctc model: fine-tuned for two updates on noise, once a session."""

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

SPLIT_SIZES = {"train": 8, "valid": 3, "test": 9}
WORDS = ["ONE", "TWO", "SIX", "TEN"]


@dataclass
class TinyCtc:
    """checkpoint: fine-tuned wav2vec_ctc. pretrained: its wav2vec2. data: manifests with ltr and spm labels."""

    checkpoint: Path
    pretrained: Path
    data: Path

    def copy_split(self, folder: Path, count: int, split: str = "test") -> Path:
        """A data folder that holds the first `count` utterances of `split`."""
        folder.mkdir(parents=True, exist_ok=True)
        for path in self.data.glob("dict.*.txt"):
            shutil.copy(path, folder)
        for suffix, lines in (("tsv", count + 1), ("ltr", count), ("spm", count), ("wrd", count)):
            text = (self.data / f"{split}.{suffix}").read_text().splitlines(keepends=True)
            (folder / f"{split}.{suffix}").write_text("".join(text[:lines]))
        return folder


def write_noise_data(folder: Path) -> Path:
    rng, words_rng = np.random.default_rng(0), random.Random(0)
    (folder / "audio").mkdir(parents=True)
    for split, count in SPLIT_SIZES.items():
        manifest, texts = [str(folder / "audio")], []
        for index in range(count):
            samples = int(rng.integers(9000, 14000))
            name = f"{split}{index}.wav"
            soundfile.write(folder / "audio" / name, rng.normal(0, 0.1, samples).astype(np.float32), 16000)
            manifest.append(f"{name}\t{samples}")
            texts.append(words_rng.choices(WORDS, k=2))
        labels = {
            "wrd": [" ".join(words) for words in texts],
            "ltr": ["".join(" ".join(word) + " | " for word in words).strip() for words in texts],
            "spm": [" ".join(f"\u2581{word[0]} {word[1:]}" for word in words) for words in texts],
        }
        (folder / f"{split}.tsv").write_text("\n".join(manifest) + "\n")
        for suffix, lines in labels.items():
            (folder / f"{split}.{suffix}").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for suffix in ("ltr", "spm"):
        symbols = sorted(
            {s for split in SPLIT_SIZES for s in (folder / f"{split}.{suffix}").read_text(encoding="utf-8").split()}
        )
        (folder / f"dict.{suffix}.txt").write_text("".join(f"{s} 1\n" for s in symbols), encoding="utf-8")
    return folder


def write_pretrained(path: Path, name: str = "wav2vec2", **keys) -> Path:
    """Saves an untrained model as fairseq's trainer would: stock wav2vec2, or ours with its own `keys`."""
    import fairseq.tasks  # noqa: F401 - fairseq's models import it in a circle
    from fairseq.models.wav2vec.wav2vec2 import Wav2Vec2Config, Wav2Vec2Model
    from fairseq.tasks.audio_pretraining import AudioPretrainingConfig
    from omegaconf import OmegaConf

    model_class, config_class = Wav2Vec2Model, Wav2Vec2Config
    if name != "wav2vec2":
        from fairseq_w2v2_light.models.w2v2_light import W2V2LightConfig, W2V2LightModel

        model_class, config_class = W2V2LightModel, W2V2LightConfig
    torch.manual_seed(0)
    model_config = config_class(
        extractor_mode="layer_norm",
        conv_feature_layers="[(16,10,5),(16,8,4),(16,4,2),(16,4,2),(16,4,2)]",
        encoder_layers=2,
        encoder_embed_dim=32,
        encoder_ffn_embed_dim=64,
        encoder_attention_heads=2,
        conv_pos=16,
        conv_pos_groups=4,
        final_dim=16,
        quantize_targets=True,
        latent_vars=8,
        **keys,
    )
    sections = {"model": model_config, "task": AudioPretrainingConfig(data="unused", normalize=True)}
    config = {
        "common": {"tpu": False, "seed": 1},
        "criterion": {"_name": "wav2vec"},
        "lr_scheduler": {"_name": "fixed"},
    }
    for section, node in sections.items():
        plain = OmegaConf.to_container(OmegaConf.structured(node), resolve=False, enum_to_str=True)
        config[section] = {key: value for key, value in plain.items() if not str(value).startswith("${")}
    config["model"]["_name"], config["task"]["_name"] = name, "audio_pretraining"
    state = {"args": None, "cfg": config, "model": model_class(model_config).state_dict(), "extra_state": {}}
    state["optimizer_history"] = [{"num_updates": 0, "criterion_name": "", "lr_scheduler_state": {}}]
    torch.save(state, path)
    return path


def finetune(data: Path, pretrained: Path, folder: Path, labels="ltr", task="audio_finetuning", **common) -> Path:
    """Two updates of stock wav2vec_ctc by fairseq-hydra-train's own entry point, in a process of its own."""
    recipe = {
        "common": {"cpu": True, "seed": 1, **common},
        "task": {"_name": task, "data": str(data), "labels": labels, "normalize": True},
        "criterion": {"_name": "ctc", "zero_infinity": True},
        "model": {"_name": "wav2vec_ctc", "w2v_path": str(pretrained), "mask_prob": 0.2, "mask_length": 4},
        "optimizer": {"_name": "adam"},
        "lr_scheduler": {"_name": "fixed"},
        "optimization": {"max_update": 2, "lr": [0.001]},
        "dataset": {"max_tokens": 60000, "num_workers": 0, "required_batch_size_multiple": 1},
        "checkpoint": {"save_dir": str(folder), "no_epoch_checkpoints": True},
        "hydra": {"run": {"dir": str(folder)}},
    }
    folder.mkdir(parents=True)
    (folder / "tiny.yaml").write_text("# @package _group_\n" + json.dumps(recipe))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", "from fairseq_cli.hydra_train import cli_main; cli_main()"]
        + ["--config-dir", str(folder), "--config-name", "tiny"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
        timeout=300,
    )
    assert (folder / "checkpoint_last.pt").exists(), result.stdout[-3000:] + result.stderr[-5000:]
    return folder / "checkpoint_last.pt"


def make_tiny_ctc(folder: Path) -> TinyCtc:
    """Stock wav2vec2, wav2vec_ctc and audio_finetuning, with letters. What an earlier call left there is returned."""
    if not folder.exists():
        data = write_noise_data(folder / "data")
        finetune(data, write_pretrained(folder / "pretrained.pt"), folder / "run")
    return TinyCtc(folder / "run" / "checkpoint_last.pt", folder / "pretrained.pt", folder / "data")


def make_stochastic_ctc(folder: Path) -> TinyCtc:
    """Our w2v2_light with several operating points, stock wav2vec_ctc and our audio_ctc, with sentencepieces."""
    if not folder.exists():
        from fairseq_w2v2_light.paths import user_dir

        data = write_noise_data(folder / "data")
        keys = {"squeeze_factors": [1, 2], "query_pools": [1, 2], "kv_pools": [1, 2]}
        pretrained = write_pretrained(folder / "pretrained.pt", "w2v2_light", **keys)
        finetune(data, pretrained, folder / "run", "spm", "audio_ctc", user_dir=str(user_dir()))
    return TinyCtc(folder / "run" / "checkpoint_last.pt", folder / "pretrained.pt", folder / "data")


@pytest.fixture(scope="session")
def tiny_ctc(tmp_path_factory) -> TinyCtc:
    return make_tiny_ctc(tmp_path_factory.getbasetemp() / "tiny_ctc")


@pytest.fixture(scope="session")
def stochastic_ctc(tmp_path_factory) -> TinyCtc:
    return make_stochastic_ctc(tmp_path_factory.getbasetemp() / "stochastic_ctc")
