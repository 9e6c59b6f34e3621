"""Distillation from a stock fairseq teacher, as a user runs it: student, graph, training, and what comes after."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from noise_corpus import RANK_SCRIPT, kill_after_update, write_noise_corpus
from omegaconf import OmegaConf

from fairseq_w2v2_light.cli.infer import infer
from fairseq_w2v2_light.cli.main import main
from fairseq_w2v2_light.paths import config_dir, user_dir

TEACHER = {
    "_name": "wav2vec2",
    "extractor_mode": "layer_norm",
    "layer_norm_first": True,
    "conv_feature_layers": "[(16,10,5),(16,8,4),(16,4,2),(16,4,2),(16,4,4)]",
    "encoder_layers": 4,
    "encoder_embed_dim": 32,
    "encoder_ffn_embed_dim": 64,
    "encoder_attention_heads": 4,
    "conv_pos": 8,
    "conv_pos_groups": 4,
    "quantize_targets": True,
    "final_dim": 16,
    "latent_vars": 8,
    "num_negatives": 5,
}
SMALL = [
    "common.fp16=false",
    "common.log_interval=1",
    "distributed_training.distributed_world_size=1",
    "dataset.num_workers=0",
    "dataset.max_tokens=48000",
    "dataset.batch_size=null",
    "optimization.max_epoch=0",
    "checkpoint.no_epoch_checkpoints=true",
    "lr_scheduler.warmup_updates=0",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_noise_corpus(tmp_path_factory.mktemp("noise"))


def train(config, data, save_dir, *overrides, wait=True, program=None):
    path = os.pathsep.join([str(user_dir().parent), os.environ.get("PYTHONPATH", "")])
    command = [
        *(program or [str(Path(sys.executable).with_name("fairseq-hydra-train"))]),
        f"common.user_dir={user_dir()}",
        f"task.data={data}",
        f"checkpoint.save_dir={save_dir}",
        f"hydra.run.dir={save_dir}/hydra",
        *overrides,
        "--config-dir",
        str(config.parent),
        "--config-name",
        config.stem,
    ]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DUMP": str(save_dir)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    if not wait:
        return process
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    return output


def stock_recipe(folder, group, name, model):
    """One of our recipes with stock fairseq's task and model."""
    recipe = OmegaConf.load(str(config_dir(group) / f"{name}.yaml"))
    recipe.task._name = {"pretraining": "audio_pretraining", "finetuning": "audio_finetuning"}[group]
    recipe.model = model
    path = folder / f"stock_{group}.yaml"
    path.write_text("# @package _global_\n" + OmegaConf.to_yaml(recipe))
    return path


STOCK_CTC = {"_name": "wav2vec_ctc", "w2v_path": "???", "apply_mask": False, "feature_grad_mult": 1.0}


@pytest.fixture(scope="module")
def teacher(corpus, tmp_path_factory):
    """A CTC checkpoint that fairseq made with its own models."""
    root = tmp_path_factory.mktemp("teacher")
    small = ["dataset.num_workers=0", "dataset.max_tokens=48000", "dataset.disable_validation=true"]
    small += ["optimization.max_update=2"]
    train(stock_recipe(root, "pretraining", "light_stochastic_tiny", TEACHER), corpus, root / "pretrained", *small)
    ctc = {**STOCK_CTC, "w2v_path": str(root / "pretrained/checkpoint_last.pt")}
    train(stock_recipe(root, "finetuning", "tiny", ctc), corpus, root / "finetuned", *small)
    return root / "finetuned/checkpoint_last.pt"


@pytest.fixture(scope="module")
def graph(corpus):
    path = corpus / "graph.npz"
    assert main(["denominator", str(corpus), str(path), "--labels", "ltr"]) == 0
    return path


def distill(name, corpus, save_dir, teacher, student, *overrides, **options):
    settings = [f"criterion.teacher={teacher}", f"model.w2v_path={student}", "task.normalize=true", *SMALL]
    return train(config_dir("distillation") / f"{name}.yaml", corpus, save_dir, *settings, *overrides, **options)


def state(path):
    return torch.load(str(path), map_location="cpu")


@pytest.fixture(scope="module")
def bigfoot(corpus, teacher, tmp_path_factory):
    """A student of two of the teacher's four layers, distilled with the recipe bigfoot_4."""
    root = tmp_path_factory.mktemp("bigfoot")
    assert main(["student", str(teacher), str(root / "student.pt"), "--layers", "every:2"]) == 0
    output = distill("bigfoot_4", corpus, root / "distilled", teacher, root / "student.pt", "optimization.max_update=3")
    assert "'kl': " in output or "kl=" in output or '"kl": ' in output
    return root / "distilled/checkpoint_last.pt"


def test_the_students_checkpoint_holds_the_student_alone(bigfoot, teacher):
    names = [name for name in state(bigfoot)["model"] if "quantizer" not in name]
    layers = {name.split("encoder.layers.")[1].split(".")[0] for name in names if "encoder.layers." in name}
    assert layers == {"0", "1"}
    assert not [name for name in names if "teacher" in name]
    assert bigfoot.stat().st_size < 0.8 * 3 * teacher.stat().st_size
    assert not state(bigfoot).get("criterion")


def test_it_decodes(bigfoot, corpus):
    results = infer([f"task.data={corpus}", f"common_eval.path={bigfoot}", "dataset.gen_subset=test"])
    assert results[0]["sentences"] == 12


def test_stock_wav2vec_ctc_fine_tunes_it_further(bigfoot, corpus, tmp_path):
    config = stock_recipe(tmp_path, "finetuning", "tiny", {**STOCK_CTC, "w2v_path": str(bigfoot)})
    small = ["dataset.num_workers=0", "dataset.max_tokens=48000", "optimization.max_update=2"]
    train(config, corpus, tmp_path / "further", *small)
    further = state(tmp_path / "further/checkpoint_last.pt")
    assert further["cfg"]["model"]["_name"] == "wav2vec_ctc"
    checkpoint = tmp_path / "further/checkpoint_last.pt"
    results = infer([f"task.data={corpus}", f"common_eval.path={checkpoint}", "dataset.gen_subset=test"])
    assert results[0]["sentences"] == 12


def test_a_narrow_student_with_lfmmi_and_a_cache_resumes_after_sigkill(corpus, teacher, graph, tmp_path):
    """Projections of the hidden layers included: they are the criterion's, and saved with it."""
    student = tmp_path / "student.pt"
    sizes = ["--width", "16", "--ffn", "32", "--heads", "2", "--layers-n", "2"]
    assert main(["student", str(teacher), str(student), *sizes]) == 0
    # many: fairseq makes one more of a run that was killed after its last
    overrides = [f"criterion.denominator={graph}", "optimization.max_update=40", "checkpoint.save_interval_updates=1"]
    overrides += [f"criterion.teacher_cache={tmp_path / 'cache'}", "dataset.disable_validation=true"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    distill("distillw2v2_s3", corpus, whole, teacher, student, *overrides)

    process = distill("distillw2v2_s3", corpus, broken, teacher, student, *overrides, wait=False)
    kill_after_update(process, broken, 3)
    output = distill("distillw2v2_s3", corpus, broken, teacher, student, *overrides)
    assert "Loaded checkpoint" in output

    expected, found = state(whole / "checkpoint_last.pt"), state(broken / "checkpoint_last.pt")
    assert {name: tuple(value.shape) for name, value in expected["criterion"].items()} == {
        "projections.0.weight": (32, 16),
        "projections.1.weight": (32, 16),
    }
    for part in ("model", "criterion"):
        assert expected[part].keys() == found[part].keys()
        for name, value in expected[part].items():
            assert torch.equal(value, found[part][name]), name


def test_two_ranks_end_with_equal_weights_and_projections(corpus, teacher, graph, tmp_path):
    student = tmp_path / "student.pt"
    sizes = ["--width", "16", "--ffn", "32", "--heads", "2", "--layers-n", "2"]
    assert main(["student", str(teacher), str(student), *sizes]) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    overrides = [
        "common.cpu=true",
        "distributed_training.distributed_world_size=2",
        "distributed_training.distributed_backend=gloo",
        f"distributed_training.distributed_init_method=tcp://127.0.0.1:{port}",
        "distributed_training.distributed_no_spawn=true",
        f"criterion.denominator={graph}",
        f"criterion.teacher_cache={tmp_path / 'cache'}",
        "dataset.disable_validation=true",
        "optimization.max_update=3",
        "checkpoint.no_save=true",
    ]
    (tmp_path / "rank.py").write_text(RANK_SCRIPT)
    program = [sys.executable, str(tmp_path / "rank.py")]
    ranks = []
    for rank in (0, 1):
        own = f"distributed_training.distributed_rank={rank}"
        settings = (corpus, tmp_path, teacher, student, *overrides, own)
        ranks.append(distill("distillw2v2_s3", *settings, program=program, wait=False))
    for rank in ranks:
        output, _ = rank.communicate(timeout=300)
        assert rank.returncode == 0, output[-3000:]

    first, second = (state(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert len(first["criterion"]) == 2
    for part in ("model", "criterion"):
        assert not [name for name in first[part] if "teacher" in name]
        for name, value in first[part].items():
            assert torch.equal(value, second[part][name]), name


def test_a_student_without_labels_learns_hidden_layers_and_fine_tunes(corpus, teacher, tmp_path):
    recipe = OmegaConf.load(str(config_dir("pretraining") / "light_stochastic_tiny.yaml"))
    distillation = OmegaConf.load(str(config_dir("distillation") / "tiny.yaml"))
    recipe.criterion = distillation.criterion
    shape = {key: value for key, value in TEACHER.items() if key not in ("_name", "encoder_layers")}
    recipe.model.update({**shape, "encoder_layers": 2, "unique_layers": 0})
    config = tmp_path / "unlabelled.yaml"
    config.write_text("# @package _global_\n" + OmegaConf.to_yaml(recipe))
    weights = ["criterion.hidden_weight=1.0", "criterion.kl_weight=0.0", "criterion.ctc_weight=0.0"]
    small = ["dataset.num_workers=0", "dataset.max_tokens=48000", "optimization.max_update=2"]
    output = train(config, corpus, tmp_path / "hidden", f"criterion.teacher={teacher}", *weights, *small)
    assert "hidden" in output
    student = tmp_path / "hidden/checkpoint_last.pt"
    stock = stock_recipe(tmp_path, "finetuning", "tiny", {**STOCK_CTC, "w2v_path": str(student)})
    train(stock, corpus, tmp_path / "finetuned", *small, "dataset.disable_validation=true")
