"""Stock fairseq-hydra-train with the plugin: several processes, sudden death, every recipe's life cycle."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import fairseq_cli.generate
import numpy as np
import pytest
import soundfile
import torch
from fairseq import options
from noise_corpus import SMALL_RUN, TINY_PRETRAINING, kill_after_update, write_noise_corpus
from omegaconf import OmegaConf

from fairseq_w2v2_light.cli.infer import infer
from fairseq_w2v2_light.paths import config_dir, user_dir

TINY = [
    *SMALL_RUN,
    *TINY_PRETRAINING,
    "model.encoder_layerdrop=0.2",
    "model.dropout=0.1",
]

RANK_SCRIPT = """
import os, sys, torch
from fairseq import trainer
stock_step = trainer.Trainer.train_step
def train_step(self, samples, **kwargs):
    result = stock_step(self, samples, **kwargs)
    model = self.get_model()
    torch.save({"model": model.state_dict(), "point": str(model.current_operating_point())},
               os.path.join(os.environ["DUMP"], f"rank{self.cfg.distributed_training.distributed_rank}.pt"))
    return result
trainer.Trainer.train_step = train_step
from fairseq_cli.hydra_train import cli_main
cli_main()
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_noise_corpus(tmp_path_factory.mktemp("noise"))


def arguments(corpus, save_dir, *overrides):
    return [
        f"common.user_dir={user_dir()}",
        f"task.data={corpus}",
        f"checkpoint.save_dir={save_dir}",
        f"hydra.run.dir={save_dir}/hydra",
        *TINY,
        *overrides,
        "--config-dir",
        str(config_dir("pretraining")),
        "--config-name",
        "light_stochastic_tiny",
    ]


def environment(**extra):
    path = os.pathsep.join([str(user_dir().parent), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **extra}


def train_program():
    return str(Path(sys.executable).with_name("fairseq-hydra-train"))


def run_to_end(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    return output


def start(command, **extra):
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(**extra)
    )


def weights(path):
    return torch.load(str(path), map_location="cpu")["model"]


def updates(path):
    return torch.load(str(path), map_location="cpu", weights_only=False)["optimizer_history"][-1]["num_updates"]


def test_two_ranks_end_with_equal_weights(corpus, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = tmp_path / "rank.py"
    script.write_text(RANK_SCRIPT)
    command = [
        sys.executable,
        str(script),
        *arguments(
            corpus,
            tmp_path / "save",
            "common.cpu=true",
            "optimization.max_update=4",
            "checkpoint.no_save=true",
            "distributed_training.distributed_backend=gloo",
            "distributed_training.distributed_world_size=2",
            f"distributed_training.distributed_init_method=tcp://127.0.0.1:{port}",
            "distributed_training.distributed_no_spawn=true",
        ),
    ]
    ranks = [
        start([*command[:2], f"distributed_training.distributed_rank={rank}", *command[2:]], DUMP=str(tmp_path))
        for rank in (0, 1)
    ]
    for rank in ranks:
        run_to_end(rank)

    first, second = (torch.load(str(tmp_path / f"rank{rank}.pt")) for rank in (0, 1))
    assert first["point"] == second["point"]
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name


def test_killed_and_resumed_run_equals_an_uninterrupted_one(corpus, tmp_path):
    # many: fairseq makes one more of a run that was killed after its last
    overrides = ["optimization.max_update=40", "checkpoint.save_interval_updates=1"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_to_end(start([train_program(), *arguments(corpus, whole, *overrides)]))

    process = start([train_program(), *arguments(corpus, broken, *overrides)])
    kill_after_update(process, broken, 3)
    killed_after = updates(broken / "checkpoint_last.pt")
    assert not list(broken.glob("checkpoint_*_40.pt")), "it was not killed in time"
    output = run_to_end(start([train_program(), *arguments(corpus, broken, *overrides)]))
    assert "Loaded checkpoint" in output

    assert [updates(folder / "checkpoint_last.pt") for folder in (whole, broken)] == [40, 40], killed_after
    expected, found = weights(whole / "checkpoint_last.pt"), weights(broken / "checkpoint_last.pt")
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), f"{name}, killed after {killed_after} updates"


def test_bad_audio_stops_training_and_is_named(corpus, tmp_path):
    wave = np.random.RandomState(1).randn(16000) * 0.1
    wave[100] = np.nan
    soundfile.write(str(tmp_path / "nan.wav"), wave, 16000, subtype="FLOAT")
    lines = (corpus / "train.tsv").read_text().splitlines()
    lines[4] = f"{os.path.relpath(str(tmp_path / 'nan.wav'), lines[0])}\t16000"
    (tmp_path / "train.tsv").write_text("\n".join(lines) + "\n")
    (tmp_path / "valid.tsv").write_text((corpus / "valid.tsv").read_text())
    overrides = ["dataset.num_workers=1", "optimization.max_update=50"]
    process = start([train_program(), *arguments(tmp_path, tmp_path / "save", *overrides)])
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert f"ValueError: {tmp_path / 'train.tsv'}:5: " in output and "nan.wav: NaN samples: 1 samples" in output
    assert "prepare check" in output
    assert not list((tmp_path / "save").glob("*.pt"))


def test_what_a_configuration_refuses_is_the_last_that_training_says(corpus, tmp_path):
    """Its traceback passes the __init__ of a dataclass, of which hydra 1.0 died itself."""
    process = start([train_program(), *arguments(corpus, tmp_path / "save", "model.squeeze_factors=[0,1]")])
    output, _ = process.communicate(timeout=300)
    errors = [line for line in output.splitlines() if "Error" in line and "HYDRA_FULL_ERROR" not in line]
    assert process.returncode != 0
    assert errors[-1].startswith("ValueError: squeeze_factors: found [0, 1], expected distinct integers of 1 or more")


def fine_tune(corpus, save_dir, pretrained, *overrides, config=None):
    config = config or config_dir("finetuning") / "tiny.yaml"
    command = [
        train_program(),
        f"common.user_dir={user_dir()}",
        f"task.data={corpus}",
        f"checkpoint.save_dir={save_dir}",
        f"hydra.run.dir={save_dir}/hydra",
        f"model.w2v_path={pretrained}",
        "dataset.num_workers=0",
        "dataset.disable_validation=true",
        "dataset.max_tokens=48000",
        "optimization.max_update=2",
        *overrides,
        "--config-dir",
        str(config.parent),
        "--config-name",
        config.stem,
    ]
    run_to_end(start(command))
    return save_dir / "checkpoint_last.pt"


@pytest.fixture(scope="module")
def pretrained(corpus, tmp_path_factory):
    save_dir = tmp_path_factory.mktemp("pretrained")
    run_to_end(start([train_program(), *arguments(corpus, save_dir, "optimization.max_update=2")]))
    return save_dir / "checkpoint_last.pt"


@pytest.fixture(scope="module")
def light_ctc(corpus, pretrained, tmp_path_factory):
    return fine_tune(corpus, tmp_path_factory.mktemp("light_ctc"), pretrained)


@pytest.fixture(scope="module")
def wav2vec_ctc(corpus, pretrained, tmp_path_factory):
    """The same encoder, fine-tuned by stock wav2vec_ctc on the stock task, as a fairseq user's YAML has them."""
    folder = tmp_path_factory.mktemp("wav2vec_ctc")
    recipe = OmegaConf.load(str(config_dir("finetuning") / "tiny.yaml"))
    recipe.task._name = "audio_finetuning"
    stock = ("w2v_path", "apply_mask", "mask_prob", "mask_length", "dropout", "layerdrop", "feature_grad_mult")
    recipe.model = {"_name": "wav2vec_ctc", **{key: recipe.model[key] for key in stock}}
    (folder / "stock.yaml").write_text("# @package _global_\n" + OmegaConf.to_yaml(recipe))
    return fine_tune(corpus, folder, pretrained, config=folder / "stock.yaml")


@pytest.fixture(params=["light_ctc", "wav2vec_ctc"])
def checkpoint(request):
    return request.getfixturevalue(request.param)


def subset(corpus, folder, size):
    """The first `size` utterances of the corpus, as split test."""
    folder.mkdir(exist_ok=True)
    for suffix, header in (("tsv", 1), ("ltr", 0)):
        lines = (corpus / f"valid.{suffix}").read_text().splitlines(keepends=True)
        (folder / f"test.{suffix}").write_text("".join(lines[: size + header]))
    (folder / "dict.ltr.txt").write_text((corpus / "dict.ltr.txt").read_text())
    return folder


def test_infer_decodes_at_every_operating_point(corpus, checkpoint, tmp_path):
    data = subset(corpus, tmp_path / "data", 5)
    points = ["s1q1k1", "s2q1k2", "s3q2k2"]
    results = infer(
        [f"task.data={data}", f"common_eval.path={checkpoint}", "-m", "decoding.operating_point=" + ",".join(points)]
    )
    assert [result["operating_point"] for result in results] == points
    assert all(result["sentences"] == 5 for result in results)


def test_infer_refuses_an_untrained_operating_point(corpus, light_ctc, tmp_path):
    data = subset(corpus, tmp_path / "data", 2)
    with pytest.raises(ValueError, match=r"s7q1k1.*not trained with squeeze factor 7.*\[1, 2, 3\]"):
        infer([f"task.data={data}", f"common_eval.path={light_ctc}", "decoding.operating_point=s7q1k1"])


@pytest.mark.parametrize("size", [1, 3, 8, 9])
def test_generate_has_as_many_hypotheses_as_references(corpus, light_ctc, tmp_path, capsys, size):
    data = subset(corpus, tmp_path / "data", size)
    parser = options.get_generation_parser()
    arguments = [str(data), "--task", "audio_ctc", "--path", str(light_ctc), "--gen-subset", "test", "--beam", "3"]
    arguments += ["--user-dir", str(user_dir()), "--scoring", "wer", "--post-process", "letter", "--cpu"]
    arguments += ["--model-overrides", "{'operating_point':'s2q1k2'}"]
    fairseq_cli.generate.main(options.parse_args_and_arch(parser, arguments))
    hypotheses = [line for line in capsys.readouterr().out.splitlines() if line.startswith("H-")]
    assert len(hypotheses) == size


def test_a_fine_tuned_checkpoint_can_be_fine_tuned_to_one_point(corpus, light_ctc, tmp_path):
    specific = fine_tune(corpus, tmp_path / "specific", light_ctc, "model.operating_point=s2q1k2")
    state = torch.load(str(specific), map_location="cpu")
    assert state["cfg"]["model"]["w2v_args"]["model"]["operating_point"] == "s2q1k2"
    log = (tmp_path / "specific/hydra/hydra_train.log").read_text()
    assert "CTC projection was copied" in log


def test_training_from_scratch_by_recipe(corpus, tmp_path):
    overrides = "{encoder_layers:2,encoder_embed_dim:32,encoder_ffn_embed_dim:64}"
    checkpoint = fine_tune(
        corpus,
        tmp_path / "scratch",
        "",
        "model.recipe=pretraining/light_stochastic_tiny",
        f"+model.recipe_overrides={overrides}",
    )
    names = weights(checkpoint)
    assert names["w2v_encoder.w2v_model.encoder.layers.0.fc1.weight"].shape == (64, 32)
    assert not any("encoder.layers.1." in name for name in names)
