"""Pruning as a user runs it: stock fairseq-hydra-train, w2v2-light prune, fine-tuning, and decoding."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fairseq.data import Dictionary
from noise_corpus import RANK_SCRIPT, SMALL_RUN, kill_after_update, write_noise_corpus
from omegaconf import OmegaConf
from tiny_checkpoints import container, ctc_model, save_checkpoint, save_ctc

from fairseq_w2v2_light import compat
from fairseq_w2v2_light.cli.infer import infer
from fairseq_w2v2_light.cli.main import main
from fairseq_w2v2_light.models import W2V2LightConfig, W2V2LightModel
from fairseq_w2v2_light.paths import config_dir, user_dir

ENCODER = dict(
    extractor_mode="layer_norm",
    layer_norm_first=True,
    conv_feature_layers="[(16,10,5),(16,8,4),(16,4,2),(16,4,2),(16,4,4)]",
    encoder_layers=2,
    encoder_embed_dim=32,
    encoder_ffn_embed_dim=64,
    encoder_attention_heads=4,
    conv_pos=8,
    conv_pos_groups=4,
    quantize_targets=True,
    final_dim=16,
    latent_vars=8,
    latent_groups=2,
    num_negatives=5,
    squeeze_factors=[1, 2],
    query_pools=[1, 2],
    kv_pools=[1, 2],
)
# gates that close within a few updates, without a ramp
HASTY = [
    "criterion.ramp_updates=0",
    "criterion.target=0.5",
    "optimizer.groups.gates.lr_float=3.0",
    "optimizer.groups.multipliers.lr_float=1.0",
]
GATES = "w2v_encoder.w2v_model.gates."


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_noise_corpus(tmp_path_factory.mktemp("noise"), 8)


def train(config, corpus, save_dir, *overrides, program=None):
    """Starts a training with a recipe (a path, or GROUP/NAME)."""
    config = config_dir() / f"{config}.yaml" if isinstance(config, str) else config
    path = os.pathsep.join([str(user_dir().parent), os.environ.get("PYTHONPATH", "")])
    command = [
        *(program or [str(Path(sys.executable).with_name("fairseq-hydra-train"))]),
        f"common.user_dir={user_dir()}",
        f"task.data={corpus}",
        "task.normalize=true",
        f"checkpoint.save_dir={save_dir}",
        f"hydra.run.dir={save_dir}/hydra",
        *SMALL_RUN,
        *overrides,
        "--config-dir",
        str(config.parent),
        "--config-name",
        config.stem,
    ]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DUMP": str(save_dir)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def finish(process):
    """What a training printed, once it has ended well."""
    output = printed(process)
    assert process.returncode == 0, output[-3000:]
    return output


def printed(process):
    try:
        return process.communicate(timeout=600)[0]
    finally:
        process.kill()


def state(path):
    compat.allow_checkpoint_types()
    return torch.load(str(path), map_location="cpu")


def same(expected, found, name=""):
    """Compares nested containers of tensors bit by bit."""
    if torch.is_tensor(expected):
        assert torch.equal(expected, found), name
    elif isinstance(expected, dict):
        assert expected.keys() == found.keys(), name
        for key in expected:
            same(expected[key], found[key], f"{name}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(expected) == len(found), name
        for index, pair in enumerate(zip(expected, found)):
            same(*pair, f"{name}.{index}")
    else:
        assert expected == found, name


def gates_of(weights):
    return {name: value for name, value in weights.items() if name.rpartition(".")[2] == "log_alpha"}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A pre-training checkpoint, with random weights."""
    torch.manual_seed(0)
    config = W2V2LightConfig(**ENCODER)
    path = tmp_path_factory.mktemp("encoder") / "encoder.pt"
    weights = W2V2LightModel(config).state_dict()
    return save_checkpoint(path, container(config, "w2v2_light"), weights, {"normalize": True})


@pytest.fixture(scope="module")
def tuned(corpus, encoder, tmp_path_factory):
    """The model to prune: a CTC checkpoint."""
    torch.manual_seed(1)
    path, labels = tmp_path_factory.mktemp("tuned") / "tuned.pt", Dictionary.load(str(corpus / "dict.ltr.txt"))
    model = ctc_model(encoder, dictionary=labels, normalize=True)
    return save_ctc(path, model, {"_name": "audio_finetuning", "normalize": True}, labels)


def decodes(path, corpus):
    (result,) = infer([f"task.data={corpus}", f"common_eval.path={path}", "dataset.gen_subset=test"])
    return result["sentences"] == 8


def test_pruning_then_fine_tuning(corpus, tuned, tmp_path, capsys):
    gated = tmp_path / "gated"
    overrides = [
        f"model.w2v_path={tuned}",
        "criterion.method=mac",
        *HASTY,
        "dataset.disable_validation=false",
        "criterion.report_updates=0",
    ]
    output = finish(train("pruning/tiny", corpus, gated, *overrides, "optimization.max_update=4"))
    assert "the checkpoint has no gates; they start open, on conv, heads, ffn, hidden" in output
    assert output.count("GMACs left: conv") == 1  # the validation's
    for name in ("target_mac", "expected_mac", "reached_mac", "l1_mac", "l2_mac", "gmacs", "parameters_m", "wer"):
        assert f"{name} " in output or f"{name}=" in output, name
    gated = gated / "checkpoint_last.pt"
    assert decodes(gated, corpus)
    saved = state(gated)
    assert list(saved["criterion"]) == ["multipliers.values"]
    gates = gates_of(saved["model"])
    assert len(gates) == 5 + 2 + 2 + 1 and all(name.startswith(GATES) for name in gates)

    pruned = tmp_path / "pruned.pt"
    capsys.readouterr()
    assert main(["prune", str(gated), str(pruned)]) == 0
    assert "pruned.pt (light_ctc)" in capsys.readouterr().out
    small = state(pruned)["model"]
    assert not gates_of(small)
    assert sum(value.numel() for value in small.values()) < 0.8 * sum(
        value.numel() for name, value in saved["model"].items() if name not in gates
    )
    assert decodes(pruned, corpus)

    again = tmp_path / "again"
    output = finish(train("finetuning/tiny", corpus, again, f"model.w2v_path={pruned}", "optimization.max_update=2"))
    assert "the CTC projection was copied from the checkpoint" in output
    after = state(again / "checkpoint_last.pt")["model"]
    assert {name: value.shape for name, value in after.items()} == {name: value.shape for name, value in small.items()}
    assert all(bool(value.isfinite().all()) for value in after.values())
    assert decodes(again / "checkpoint_last.pt", corpus)


def test_a_killed_pruning_ends_as_one_that_was_not(corpus, tuned, tmp_path):
    # many: fairseq makes one more of a run that was killed after its last
    overrides = [f"model.w2v_path={tuned}", *HASTY, "optimization.max_update=30", "criterion.ramp_updates=20"]
    overrides += [
        "criterion.method=sepsize",
        "checkpoint.save_interval_updates=1",
        "checkpoint.keep_interval_updates=-1",
    ]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(train("pruning/tiny", corpus, whole, *overrides))

    process = train("pruning/tiny", corpus, broken, *overrides)
    kill_after_update(process, broken, 2)
    assert "Loaded checkpoint" in finish(train("pruning/tiny", corpus, broken, *overrides))

    expected, found = state(whole / "checkpoint_last.pt"), state(broken / "checkpoint_last.pt")
    assert expected["criterion"]["multipliers.values"].shape == (2, 2)
    assert expected["optimizer_history"][-1]["num_updates"] == 30
    assert sorted(expected["last_optimizer_state"]) == ["default", "gates", "multipliers"]
    for part in ("model", "criterion", "last_optimizer_state"):
        same(expected[part], found[part], part)


def test_two_ranks_end_with_equal_gates_and_multipliers(corpus, tuned, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    overrides = [
        f"model.w2v_path={tuned}",
        *HASTY,
        "common.cpu=true",
        "distributed_training.distributed_world_size=2",
        "distributed_training.distributed_backend=gloo",
        f"distributed_training.distributed_init_method=tcp://127.0.0.1:{port}",
        "distributed_training.distributed_no_spawn=true",
        # the first update trains the CTC head alone
        "model.freeze_finetune_updates=1",
        "optimization.max_update=3",
        "checkpoint.no_save=true",
    ]
    (tmp_path / "rank.py").write_text(RANK_SCRIPT)
    program = [sys.executable, str(tmp_path / "rank.py")]
    ranks = [
        train(
            "pruning/tiny",
            corpus,
            tmp_path,
            *overrides,
            f"distributed_training.distributed_rank={rank}",
            program=program,
        )
        for rank in (0, 1)
    ]
    for rank in ranks:
        finish(rank)
    first, second = (state(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    same(first, second)
    assert first["criterion"]["multipliers.values"].tolist() != [[0.0, 100.0]]
    gates = gates_of(first["model"])
    assert len({float(value) for values in gates.values() for value in values}) > 1


def test_pruning_with_distillation(corpus, tuned, tmp_path):
    overrides = [f"model.w2v_path={tuned}", f"criterion.teacher={tuned}", *HASTY, "common.fp16=false"]
    overrides += ["distributed_training.distributed_world_size=1", "dataset.batch_size=null"]
    output = finish(train("pruning/prune_and_distil", corpus, tmp_path, *overrides, "optimization.max_update=2"))
    saved = state(tmp_path / "checkpoint_last.pt")
    assert '"kl": ' in output and '"expected_mac": ' in output
    assert list(saved["criterion"]) == ["multipliers.values"]
    assert not [name for name in saved["model"] if "teacher" in name]
    assert gates_of(saved["model"])


def test_pruning_while_pre_training(corpus, encoder, tmp_path, capsys):
    """The pre-training recipe with criterion and optimizer of pruning/tiny."""
    recipe = OmegaConf.load(str(config_dir("pretraining") / "light_stochastic_tiny.yaml"))
    pruning = OmegaConf.load(str(config_dir("pruning") / "tiny.yaml"))
    recipe.criterion, recipe.optimizer, recipe.lr_scheduler = pruning.criterion, pruning.optimizer, pruning.lr_scheduler
    recipe.common.fp16_no_flatten_grads = True
    recipe.model.update({**ENCODER, "unique_layers": 0, "prune_units": ["conv", "heads", "ffn", "hidden"]})
    recipe.model.feature_grad_mult = 1.0
    config = tmp_path / "gated.yaml"
    config.write_text("# @package _global_\n" + OmegaConf.to_yaml(recipe))
    overrides = [*HASTY, "criterion.loss=contrastive", "task.min_sample_size=8000"]
    overrides += [f"checkpoint.finetune_from_model={encoder}"]
    output = finish(train(config, corpus, tmp_path / "gated", *overrides, "optimization.max_update=2"))
    assert "contrastive" in output and "expected_mac" in output
    gated = tmp_path / "gated/checkpoint_last.pt"
    saved = state(gated)
    assert all(bool(value.isfinite().all()) for value in gates_of(saved["model"]).values())
    assert list(saved["criterion"]) == ["multipliers.values"]
    assert main(["prune", str(gated), str(tmp_path / "pruned.pt")]) == 0
    assert "(w2v2_light)" in capsys.readouterr().out


def test_gates_that_no_gradient_reaches_are_refused(corpus, tuned, tmp_path):
    overrides = [f"model.w2v_path={tuned}", "model.feature_grad_mult=0.0"]
    process = train("pruning/tiny", corpus, tmp_path, *overrides)
    output = printed(process)
    assert process.returncode != 0
    for word in ("model.feature_grad_mult: found 0", "prune_units", "set model.feature_grad_mult=1.0"):
        assert word in output


def test_bf16(corpus, tuned, tmp_path):
    overrides = [f"model.w2v_path={tuned}", *HASTY, "common.cpu=true", "common.bf16=true"]
    finish(train("pruning/tiny", corpus, tmp_path, *overrides, "optimization.max_update=2"))
    saved = state(tmp_path / "checkpoint_last.pt")
    gates = gates_of(saved["model"])
    for value in [*gates.values(), saved["criterion"]["multipliers.values"]]:
        assert value.dtype == torch.float32 and value.isfinite().all()
    # a step of 3 and one of 1 and more: the gates moved, and the multipliers
    assert max(float((value - value.mean()).abs().max()) for value in gates.values()) > 0.1
    assert saved["criterion"]["multipliers.values"].tolist() != [[0.0, 100.0]]
    # fairseq writes fp32
    weight = saved["model"]["w2v_encoder.proj.weight"]
    assert torch.equal(weight.float(), weight.bfloat16().float())
