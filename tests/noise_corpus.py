"""A corpus of noise that trainings of a few updates run on, and overrides that make their models tiny."""

import time

import numpy as np
import soundfile

SMALL_RUN = [
    "common.log_interval=1",
    "dataset.num_workers=0",
    "dataset.disable_validation=true",
    "dataset.max_tokens=48000",
]
# what of a pre-training recipe is too large for a test
TINY_PRETRAINING = [
    "model.encoder_embed_dim=32",
    "model.encoder_ffn_embed_dim=64",
    "model.encoder_layers=2",
    "model.final_dim=16",
    "model.latent_vars=8",
    "model.conv_pos=8",
    "model.conv_pos_groups=4",
    "model.conv_feature_layers='[(16,10,5),(16,8,4),(16,4,2),(16,4,2),(16,4,4)]'",
    "model.num_negatives=5",
    "task.min_sample_size=8000",
]

# as the training program of a run over several ranks: each saves its model and criterion to $DUMP after every update
RANK_SCRIPT = """
import os, torch
from fairseq import trainer
stock_step = trainer.Trainer.train_step
def train_step(self, samples, **kwargs):
    result = stock_step(self, samples, **kwargs)
    rank = self.cfg.distributed_training.distributed_rank
    state = {"model": self.get_model().state_dict(), "criterion": self.get_criterion().state_dict()}
    torch.save(state, os.path.join(os.environ["DUMP"], f"rank{rank}.pt"))
    return result
trainer.Trainer.train_step = train_step
from fairseq_cli.hydra_train import cli_main
cli_main()
"""


def write_noise_corpus(root, utterances=12):
    """Writes utterances of one to two seconds to `root`, with manifests and letter labels for train, valid and test."""
    generator = np.random.RandomState(0)
    sizes = generator.randint(16000, 32000, size=utterances)
    for index, size in enumerate(sizes):
        loudness = np.repeat(0.05 + generator.rand(40), 800)[:size]
        soundfile.write(str(root / f"{index}.wav"), generator.randn(size) * loudness * 0.2, 16000)
    lines = "".join(f"{index}.wav\t{size}\n" for index, size in enumerate(sizes))
    for split in ("train", "valid", "test"):
        (root / f"{split}.tsv").write_text(f"{root}\n{lines}")
        (root / f"{split}.ltr").write_text("A B | A |\n" * utterances)
    (root / "dict.ltr.txt").write_text("| 2\nA 2\nB 1\n")
    return root


def kill_after_update(process, folder, update):
    """SIGKILL for a training (subprocess.Popen) as soon as `folder` has a checkpoint of that update or a later one.

    A later one, because a training that keeps its last one only may have removed it before it was seen.
    """
    deadline = time.time() + 200
    while not any(int(path.stem.rpartition("_")[2]) >= update for path in folder.glob("checkpoint_*_*.pt")):
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
