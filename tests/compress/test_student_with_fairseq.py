"""Stock fairseq programs with a student: pre-training further, decoding."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from fairseq_w2v2_light.cli.infer import infer
from fairseq_w2v2_light.compress.student import StudentSpec, make_student
from fairseq_w2v2_light.paths import config_dir, user_dir


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Four utterances of noise, as splits train and test."""
    root = tmp_path_factory.mktemp("noise")
    lines = [str(root)]
    for index in range(4):
        soundfile.write(str(root / f"{index}.wav"), np.random.RandomState(index).randn(9000) * 0.1, 16000)
        lines.append(f"{index}.wav\t9000")
    for split in ("train", "test"):
        (root / f"{split}.tsv").write_text("\n".join(lines) + "\n")
        (root / f"{split}.ltr").write_text("A B |\n" * 4)
    (root / "dict.ltr.txt").write_text("A 1\nB 1\nC 1\n| 1\n")
    return root


def test_pre_training_goes_on_by_finetune_from_model(teachers, corpus, tmp_path):
    student = tmp_path / "student.pt"
    make_student(teachers["light"], student, StudentSpec(layers="every:3"))
    state = torch.load(str(student), map_location="cpu")
    shape = ("encoder_layers", "encoder_embed_dim", "encoder_ffn_embed_dim", "encoder_attention_heads", "conv_pos")
    shape += ("conv_pos_groups", "final_dim", "latent_vars", "num_negatives", "mask_length", "unique_layers")
    model = state["cfg"]["model"]
    command = [
        str(Path(sys.executable).with_name("fairseq-hydra-train")),
        f"common.user_dir={user_dir()}",
        f"task.data={corpus}",
        f"checkpoint.finetune_from_model={student}",
        f"checkpoint.save_dir={tmp_path}/save",
        f"hydra.run.dir={tmp_path}/hydra",
        "task.normalize=false",
        "dataset.num_workers=0",
        "dataset.disable_validation=true",
        "dataset.valid_subset=train",
        "optimization.max_update=1",
        "optimization.lr=[0.0]",
        *(f"model.{key}={model[key]}" for key in shape),
        f"model.conv_feature_layers='{model['conv_feature_layers']}'",
        "model.extractor_mode=default",
        "model.layer_norm_first=false",
        "--config-dir",
        str(config_dir("pretraining")),
        "--config-name",
        "w2v2_light_tiny",
    ]
    path = os.pathsep.join([str(user_dir().parent), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    trained = torch.load(str(tmp_path / "save" / "checkpoint_last.pt"), map_location="cpu")
    assert trained["optimizer_history"][-1]["num_updates"] == 1
    assert all(torch.equal(state["model"][name], value) for name, value in trained["model"].items())


@pytest.mark.parametrize("kind", ("light_ctc", "wav2vec_ctc"))
def test_infer_decodes_a_ctc_student(teachers, corpus, tmp_path, kind):
    make_student(teachers[kind], tmp_path / "student.pt", StudentSpec(layers="every:2"))
    (result,) = infer([f"task.data={corpus}", f"common_eval.path={tmp_path}/student.pt"])
    assert result["sentences"] == 4
