"""Every recipe in config/: composed by hydra as fairseq-hydra-train does, and built."""

import argparse
import copy
import dataclasses
import functools
import importlib
import re
import shlex
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import yaml
from fairseq import optim
from fairseq.criterions import CRITERION_DATACLASS_REGISTRY
from fairseq.dataclass.initialize import add_defaults, hydra_init
from fairseq.models import MODEL_DATACLASS_REGISTRY, build_model
from fairseq.models.wav2vec import wav2vec2
from fairseq.optim import lr_scheduler
from fairseq.tasks import TASK_DATACLASS_REGISTRY
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf, open_dict

import fairseq_w2v2_light  # noqa: F401 - registers the models
from fairseq_w2v2_light.cli import student
from fairseq_w2v2_light.compress.student import parse_layers, student_config
from fairseq_w2v2_light.criterions.sparsity import MULTIPLIERS_GROUP, Multipliers, check_method
from fairseq_w2v2_light.models import network_config
from fairseq_w2v2_light.models.recipe import load_recipe, read_recipe
from fairseq_w2v2_light.models.w2v2_light import GATES_GROUP
from fairseq_w2v2_light.nn.gates import HardConcrete
from fairseq_w2v2_light.nn.positions import causal_kernel
from fairseq_w2v2_light.paths import config_dir

try:
    from hydra import compose, initialize_config_dir
except ImportError:
    from hydra.experimental import compose, initialize_config_dir

ALL = sorted(path.relative_to(config_dir()).as_posix() for path in config_dir().rglob("*.yaml"))
TRAINING = [name for name in ALL if name.startswith(("pretraining/", "finetuning/", "distillation/", "pruning/"))]
PRETRAINING = [name for name in ALL if name.startswith("pretraining/")]
FINETUNING = [name for name in ALL if name.startswith("finetuning/")]
DISTILLATION = [name for name in ALL if name.startswith("distillation/")]
PRUNING = [name for name in ALL if name.startswith("pruning/")]

SCALED_RUN = [
    "common.fp16=false",
    "common.seed=5",
    "common.log_interval=1",
    "common.tensorboard_logdir=/tmp/board",
    "checkpoint.save_dir=/tmp/run",
    "checkpoint.save_interval_updates=2",
    "task.data=/tmp/data",
    "task.normalize=true",
    "dataset.num_workers=0",
    "dataset.max_tokens=160000",
    "dataset.batch_size=2",
    "dataset.train_subset=train",
    "dataset.valid_subset=valid",
    "dataset.validate_interval=1",
    "dataset.validate_interval_updates=2",
    "dataset.disable_validation=true",
    "distributed_training.distributed_world_size=1",
    "distributed_training.ddp_backend=no_c10d",
    "optimization.max_update=2",
    "optimization.update_freq=[1]",
    "optimization.lr=[0.001]",
    "optimization.clip_norm=1",
    "optimizer.adam_eps=1e-6",
]
SCALED_ENCODER = [
    "task.max_sample_size=160000",
    "task.min_sample_size=8000",
    "lr_scheduler.warmup_updates=1",
    "criterion.loss_weights=[0.5,1.0]",
    "model.encoder_layers=2",
    "model.encoder_embed_dim=32",
    "model.encoder_ffn_embed_dim=64",
    "model.encoder_attention_heads=2",
    "model.conv_feature_layers='[(16, 10, 5)] + [(16, 3, 2)] * 4 + [(16, 2, 2)] * 2'",
    "model.extractor_mode=default",
    "model.layer_norm_first=false",
    "model.conv_pos=16",
    "model.conv_pos_groups=4",
    "model.final_dim=16",
    "model.latent_vars=8",
    "model.latent_groups=2",
    "model.latent_temp=[2.0,0.5,0.999]",
    "model.num_negatives=10",
    "model.dropout=0.1",
    "model.attention_dropout=0.0",
    "model.dropout_input=0.0",
    "model.dropout_features=0.0",
    "model.encoder_layerdrop=0.0",
    "model.feature_grad_mult=1.0",
    "model.mask_prob=0.5",
    "model.mask_length=4",
    "model.unique_layers=2",
    "model.squeeze_factors=[1,2]",
    "model.projection_hidden_dim=32",
]
# what distinguishes LARGE as it was trained on LV-60k from LARGE of LibriSpeech
LV_60K = {"extractor_mode": "layer_norm", "conv_bias": True, "layer_norm_first": True}


@functools.lru_cache(maxsize=None)
def composed(recipe, overrides):
    """Composes a recipe and fills in the defaults, as fairseq-hydra-train does."""
    folder, _, file = recipe.rpartition("/")
    name = file[: -len(".yaml")]
    hydra_init(name)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(config_dir() / folder)):
            cfg = compose(config_name=name, overrides=list(overrides))
    finally:
        GlobalHydra.instance().clear()
    cfg = OmegaConf.create(OmegaConf.to_container(cfg, resolve=False, enum_to_str=True))
    add_defaults(cfg)
    return cfg


def load(recipe, *overrides):
    """A copy of the composed recipe, which the test may change."""
    return copy.deepcopy(composed(recipe, overrides))


def count(cfg_model):
    """Parameters of a fairseq model, built on the meta device: no memory, no initialisation."""
    # fairseq initialises by way of the CPU, and torch 2.1 has no weight norm on the meta device
    weight_norm = importlib.import_module("torch.nn.utils.weight_norm")
    with mock.patch.object(wav2vec2, "init_bert_params", lambda module: None):
        with mock.patch.object(weight_norm, "_weight_norm", lambda v, g, dim: v), torch.device("meta"):
            return sum(parameter.numel() for parameter in build_model(cfg_model, None).parameters())


def stock_count(cfg_model):
    """Parameters of fairseq's own Wav2Vec2Model with the stock keys of `cfg_model`."""
    keys = {field.name for field in dataclasses.fields(wav2vec2.Wav2Vec2Config)}
    model = {key: cfg_model[key] for key in cfg_model if key in keys}
    return count(OmegaConf.create({**model, "_name": "wav2vec2"}))


def plugin_keys(registry, name):
    """Keys of a registered dataclass that stock fairseq's parent of it does not have."""
    config = registry[name]
    stock = next(base for base in config.__mro__ if not base.__module__.startswith("fairseq_w2v2_light"))
    inherited = {field.name for field in dataclasses.fields(stock)} if dataclasses.is_dataclass(stock) else set()
    return {field.name for field in dataclasses.fields(config)} - inherited


def test_the_recipes_are_there():
    sizes = {"w2v2_light_tiny", "w2v2_light_base", "w2v2_light_large", "sew_tiny", "sew_small", "sew_mid"}
    sizes |= {"stochastic_sew_tiny", "stochastic_sew_base"}
    assert {f"pretraining/{name}.yaml" for name in sizes} <= set(PRETRAINING)
    assert {f"finetuning/{hours}.yaml" for hours in ("10m", "1h", "10h", "100h")} <= set(FINETUNING)
    students = {"bigfoot_12", "bigfoot_4", "light_student", "tiny", *(f"distillw2v2_s{row}" for row in range(1, 6))}
    students |= {f"streaming_{latency}" for latency in ("240ms", "480ms", "960ms", "dynamic", "tiny")}
    assert {f"distillation/{name}.yaml" for name in students} <= set(DISTILLATION)
    pruned = {"hj_size", "hj_sepsize", "hj_mac", "prune_and_distil", "tiny"}
    assert {f"pruning/{name}.yaml" for name in pruned} == set(PRUNING)


@pytest.mark.parametrize("recipe", ALL)
def test_no_environment_interpolation(recipe):
    text = (config_dir() / recipe).read_text(encoding="utf-8")
    assert re.findall(r"\$\{\s*(?:oc\.)?env\s*:", text) == []


@pytest.mark.parametrize("recipe", ALL)
def test_no_batch_is_dropped(recipe):
    listed = yaml.safe_load((config_dir() / recipe).read_text(encoding="utf-8"))
    assert listed["dataset"]["required_batch_size_multiple"] == 1


@pytest.mark.parametrize("recipe", TRAINING)
@pytest.mark.parametrize(
    "section, registry",
    [
        ("model", MODEL_DATACLASS_REGISTRY),
        ("criterion", CRITERION_DATACLASS_REGISTRY),
        ("task", TASK_DATACLASS_REGISTRY),
    ],
)
def test_lists_every_plugin_key(recipe, section, registry):
    listed = yaml.safe_load((config_dir() / recipe).read_text(encoding="utf-8"))[section]
    assert plugin_keys(registry, listed["_name"]) - set(listed) == set()


@pytest.mark.parametrize("recipe", TRAINING)
def test_composes_with_its_own_values(recipe):
    cfg = load(recipe)
    listed = yaml.safe_load((config_dir() / recipe).read_text(encoding="utf-8"))
    assert cfg.optimization.max_update == listed["optimization"]["max_update"]
    assert cfg.dataset.required_batch_size_multiple == 1
    assert cfg.model._name == listed["model"]["_name"]
    assert cfg.model.operating_point_seed == cfg.common.seed


@pytest.mark.parametrize("recipe", [name for name in PRETRAINING if "light_stochastic_tiny" not in name])
def test_pretraining_recipe_scales_down_by_plain_overrides(recipe):
    model = build_model(load(recipe, *SCALED_RUN, *SCALED_ENCODER).model, None).train()
    output = model(torch.randn(2, 16000, generator=torch.Generator().manual_seed(0)))
    targets = model.get_logits(output)[:, 0]
    assert len(targets) > 0 and targets.isfinite().all()


@pytest.mark.parametrize("recipe", [name for name in FINETUNING if re.search(r"/\d", name)])
def test_finetuning_recipe_takes_plain_overrides(recipe):
    cfg = load(
        recipe,
        *SCALED_RUN,
        "task.labels=spm",
        "criterion.post_process=sentencepiece",
        "lr_scheduler.phase_ratio=[0.2,0.3,0.5]",
        "model.w2v_path=/tmp/checkpoint_last.pt",
        "model.operating_point=s2q1k2",
        "model.squeeze_factors=[1,2]",
        "model.recipe=pretraining/w2v2_light_tiny",
        # hydra 1.0 wants the plus where a dict replaces null
        "+model.recipe_overrides={encoder_layers: 2}",
        "model.freeze_finetune_updates=1",
        "model.feature_grad_mult=1.0",
        "model.layerdrop=0.0",
        "model.dropout=0.1",
        "model.final_dropout=0.1",
        "model.mask_prob=0.3",
        "model.mask_channel_prob=0.1",
    )
    assert cfg.model.operating_point == "s2q1k2"
    assert cfg.model.recipe_overrides == {"encoder_layers": 2}
    assert cfg.task._name == "audio_ctc" and cfg.task.labels == "spm"


@pytest.mark.parametrize(
    "recipe", [f"distillation/{name}.yaml" for name in ("bigfoot_4", "distillw2v2_s3", "tiny", "streaming_480ms")]
)
def test_distillation_recipe_takes_plain_overrides(recipe):
    cfg = load(
        recipe,
        *SCALED_RUN,
        "optimization.max_epoch=1",
        "lr_scheduler.warmup_updates=1",
        "criterion.teacher=/tmp/teacher.pt",
        "criterion.teacher_dtype=bfloat16",
        "criterion.teacher_operating_point=s1q1k1",
        "criterion.teacher_cache=/tmp/cache",
        "criterion.hidden_weight=0.5",
        "criterion.hidden_map=last",
        "criterion.kl_weight=0.5",
        "criterion.temperature=2.0",
        "criterion.mmi_weight=0.5",
        "criterion.mmi_transcript_weight=0.5",
        "criterion.denominator=/tmp/graph.npz",
        "criterion.ctc_weight=0.5",
        "model.w2v_path=/tmp/student.pt",
        "model.chunk_frames=[12,24]",
        "model.left_context_frames=120",
        "model.lookahead_frames=6",
        "model.operating_point=s2q1k2",
        "model.recipe_overrides.encoder_layers=2",
        "model.apply_mask=true",
        "model.dropout=0.1",
        "model.feature_grad_mult=0.5",
    )
    assert (cfg.criterion.teacher, cfg.criterion.hidden_map, cfg.criterion.mmi_weight) == (
        "/tmp/teacher.pt",
        "last",
        0.5,
    )
    assert cfg.model.recipe_overrides.encoder_layers == 2 and cfg.model.w2v_path == "/tmp/student.pt"
    assert list(cfg.model.chunk_frames) == [12, 24] and cfg.model.left_context_frames == 120


@pytest.mark.parametrize("recipe", [f"distillation/{name}.yaml" for name in ("bigfoot_4", "light_student", "tiny")])
def test_distillation_recipe_builds_the_student_that_it_describes(recipe):
    """Scaled down; the shapes at full size are counted in tests/study."""
    scaled = {"encoder_layers": 3, "encoder_embed_dim": 32, "encoder_ffn_embed_dim": 48, "encoder_attention_heads": 2}
    scaled["conv_feature_layers"] = "[(16, 10, 5), (16, 3, 2), (16, 2, 2)]"
    cfg = load(recipe, "task.data=/tmp/data").model
    with open_dict(cfg):
        cfg.recipe_overrides = {**cfg.recipe_overrides, **scaled}
        cfg.update(normalize="tiny" in recipe, data="/tmp/data", ddp_backend="legacy_ddp", operating_point_seed=1)
    model = build_model(cfg, SimpleNamespace(target_dictionary=SimpleNamespace(symbols=list("abcd"))))
    config = model.w2v_encoder.w2v_model.config
    assert (config.depth, config.dim) == (3, 32) and config.attention_map_every == 1
    assert config.unique_layers == (2 if "light_student" in recipe else 3)
    logits = model(source=torch.randn(1, 1600), padding_mask=None)["encoder_out"]
    assert logits.shape[1:] == (1, 4) and logits.isfinite().all()


@pytest.mark.parametrize("recipe", DISTILLATION)
def test_the_command_in_a_distillation_recipe_makes_the_student_that_it_describes(recipe):
    """`w2v2-light student` with the options of the comment, applied to the teacher of the comment."""
    text = (config_dir() / recipe).read_text(encoding="utf-8").replace("\\\n#", "")
    commands = [shlex.split(line)[1:] for line in re.findall(r"(?m)^# +w2v2-light (student .*)$", text)]
    large = {"encoder_layers": 24, "unique_layers": 24, "attention_map_every": 1}
    described = load_recipe(recipe[: -len(".yaml")]).model
    streams = described.chunk_frames is not None
    if streams:  # only models with these can
        large = {**large, **LV_60K}
    model = read_recipe("pretraining/w2v2_light_tiny" if "tiny" in recipe else "pretraining/w2v2_light_large", {})
    model = model.model if "tiny" in recipe else OmegaConf.merge(model.model, large)
    if recipe.endswith("streaming_tiny.yaml"):  # any teacher of tiny shape; the one that the recipe describes
        model = OmegaConf.merge(model, described.recipe_overrides, {"conv_pos": 32})
    commands = commands[:1] if "bigfoot_12" in recipe else commands
    parser = argparse.ArgumentParser()
    student.add_arguments(parser)
    for command in commands:
        spec = student.student_spec(parser.parse_intermixed_args(command))
        chosen = parse_layers(spec.layers, model.encoder_layers) if spec.layers else ()
        model = student_config(model, chosen, spec)
    if streams:  # what stage 2 makes of the positions
        model.conv_pos = causal_kernel(model.conv_pos)
    assert network_config(model) == network_config(read_recipe(described.recipe, described.recipe_overrides).model)


@pytest.mark.parametrize(
    "recipe, weights",
    [
        ("bigfoot_12", {"kl": 1.0, "feature_penalty": 1.0}),
        ("bigfoot_4", {"kl": 1.0, "feature_penalty": 1.0}),
        *(
            (recipe, {"hidden": 0.2, "mmi": 0.64, "logits_mse": 0.16})
            for recipe in (
                *(f"distillw2v2_s{row}" for row in range(1, 6)),
                *(f"streaming_{latency}" for latency in ("240ms", "480ms", "960ms", "dynamic")),
            )
        ),
    ],
)
def test_losses_are_those_of_the_source(recipe, weights):
    criterion = load(f"distillation/{recipe}.yaml").criterion
    found = {key[: -len("_weight")]: criterion[key] for key in criterion if key.endswith("_weight") and criterion[key]}
    assert found == weights and criterion.temperature == 1.0
    if "hidden" in weights:
        assert criterion.hidden_map == "every:2"


@pytest.mark.parametrize(
    "recipe, chunks, lookahead",
    [("240ms", [12], 0), ("480ms", [24], 0), ("960ms", [48], 0), ("dynamic", [12, 24, 48], 0), ("tiny", [16], 8)],
)
def test_streaming_recipe_hears_six_seconds_and_its_chunk(recipe, chunks, lookahead):
    cfg = load(f"distillation/streaming_{recipe}.yaml")
    assert list(cfg.model.chunk_frames) == chunks
    assert (cfg.model.left_context_frames, cfg.model.lookahead_frames) == (300, lookahead)
    assert cfg.task.normalize is False and cfg.model.recipe_overrides.extractor_mode == "layer_norm"


@pytest.mark.parametrize("recipe", ["480ms", "dynamic", "tiny"])
def test_streaming_recipe_builds_a_streaming_student(recipe):
    """Scaled down; from random weights."""
    cfg = load(f"distillation/streaming_{recipe}.yaml", "task.data=/tmp/data").model
    scaled = {"encoder_layers": 2, "encoder_embed_dim": 32, "encoder_ffn_embed_dim": 48, "encoder_attention_heads": 2}
    scaled["conv_feature_layers"] = "[(8, 10, 5)] + [(8, 3, 2)] * 4 + [(8, 2, 2)] * 2"
    with open_dict(cfg):
        cfg.recipe_overrides = {**cfg.recipe_overrides, **scaled}
        cfg.update(normalize=False, data="/tmp/data", ddp_backend="legacy_ddp", operating_point_seed=1)
    model = build_model(cfg, SimpleNamespace(target_dictionary=SimpleNamespace(symbols=list("abcd")))).eval()
    config = model.w2v_encoder.w2v_model.config
    assert config.streams and config.operating_points.chunk == tuple(cfg.chunk_frames)
    wave = torch.randn(1, 48 * 320 + 1000)
    changed = torch.cat([wave[:, : 48 * 320], torch.zeros(1, 1000)], dim=1)
    first, second = (model(source=source, padding_mask=None)["encoder_out"] for source in (wave, changed))
    assert first.shape == (51, 1, 4) and first.isfinite().all()
    chunk = max(cfg.chunk_frames)
    same = (48 - cfg.lookahead_frames) // chunk * chunk
    assert torch.equal(first[:same], second[:same]) and not torch.equal(first[same:], second[same:])


@pytest.mark.parametrize("recipe", PRETRAINING)
def test_pretraining_recipe_does_not_stream(recipe):
    model = load(recipe).model
    assert (list(model.chunk_frames), model.left_context_frames, model.lookahead_frames) == ([], 300, 0)


def test_hj_pruning_has_the_papers_figures():
    """30 epochs of train-clean-100's 28,539 utterances in batches of 64, the target growing over 5 of them."""
    for name in ("hj_size", "hj_sepsize", "hj_mac", "prune_and_distil"):
        cfg = load(f"pruning/{name}.yaml", "task.data=/tmp/data")
        batch = cfg.distributed_training.distributed_world_size * cfg.dataset.batch_size
        epoch = -(-28_539 // batch)
        assert batch == 64 and cfg.criterion.report_updates == epoch == 446
        assert (cfg.optimization.max_update, cfg.criterion.ramp_updates) == (30 * epoch, 5 * epoch)
        groups = cfg.optimizer.groups
        assert list(cfg.optimization.lr) == [1.5e-4] and groups.default.lr_scheduler.warmup_updates == 3000
        assert groups.gates.lr_float == 0.02
        assert cfg.criterion.method == {"hj_size": "size", "hj_sepsize": "sepsize"}.get(name, "mac")
        assert cfg.criterion.loss == ("distill" if name == "prune_and_distil" else "ctc")


@pytest.mark.parametrize("recipe", PRUNING)
def test_pruning_recipe_trains_every_gate(recipe):
    cfg = load(recipe, "task.data=/tmp/data")
    assert list(cfg.model.prune_units) == ["conv", "heads", "ffn", "hidden"]
    assert cfg.model.feature_grad_mult == 1.0 and cfg.model.freeze_finetune_updates == 0
    assert cfg.common.fp16_no_flatten_grads is True
    network = network_config(read_recipe("pretraining/w2v2_light_base", {"unique_layers": 12}).model)
    network = dataclasses.replace(network, prune_units=tuple(cfg.model.prune_units))
    targets = {"mac": cfg.criterion.target}
    if cfg.criterion.method == "sepsize":
        targets = {"cnn": cfg.criterion.cnn_target, "transformer": cfg.criterion.target}
    elif cfg.criterion.method == "size":
        targets = {"size": cfg.criterion.target}
    check_method(cfg.criterion.method, network, targets, 32)


@pytest.mark.parametrize("recipe", PRUNING)
@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_pruning_recipe_steps_each_group_at_its_own_rate(recipe, precision):
    """What fairseq's trainer does with its optimizer; a CPU trains nothing in fp16."""
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    cfg = load(recipe, "task.data=/tmp/data", "optimization.lr=[0.25]")
    cfg.common.fp16, cfg.common.bf16 = precision == "fp16", precision == "bf16"
    modules = torch.nn.ModuleList([torch.nn.Linear(4, 4), HardConcrete(5), Multipliers(["mac"])]).to(dtype)
    modules[1].log_alpha.param_group = GATES_GROUP
    before = copy.deepcopy(modules.state_dict())
    if precision == "fp32":
        optimizer = optim.build_optimizer(cfg.optimizer, list(modules.parameters()))
    else:
        optimizer = optim.FP16Optimizer.build_optimizer(cfg, list(modules.parameters()))
    rates = lr_scheduler.build_lr_scheduler(cfg.lr_scheduler, optimizer).step_update(cfg.optimization.max_update // 4)
    optimizer.zero_grad()
    optimizer.backward(sum(parameter.float().sum() for parameter in modules.parameters()))
    optimizer.step()

    assert set(rates) == {"default", GATES_GROUP, MULTIPLIERS_GROUP}
    assert 0.1 < rates["default"] <= 0.25 and 0 < rates[GATES_GROUP] < 0.1 and rates[MULTIPLIERS_GROUP] > 0
    groups = {"0": "default", "1": GATES_GROUP, "2": MULTIPLIERS_GROUP}
    for name, value in modules.state_dict().items():
        assert value.dtype == (dtype if name.startswith("0") else torch.float32)
        # the first step of Adam, and of SGD with a gradient of 1, is as long as the learning rate
        step = (before[name].float() - value.float()).abs()
        rough = 1e-2 if name.startswith("0") and dtype != torch.float32 else 1e-4
        assert torch.allclose(step, torch.full_like(step, rates[groups[name[0]]]), rtol=0, atol=rough), name


def test_pruning_recipe_takes_plain_overrides():
    cfg = load(
        "pruning/hj_sepsize.yaml",
        *SCALED_RUN[:-1],
        "criterion.method=mac",
        "criterion.target=0.6",
        "criterion.cnn_target=0.1",
        "criterion.ramp_updates=1",
        "criterion.stiffness=10",
        "criterion.loss=distill",
        "criterion.teacher=/tmp/teacher.pt",
        "optimizer.groups.gates.lr_float=0.05",
        "optimizer.groups.default.lr_scheduler.warmup_updates=1",
        "model.w2v_path=/tmp/checkpoint_last.pt",
        "model.prune_units=[heads,ffn,hidden]",
        "model.mask_prob=0.3",
    )
    assert (cfg.criterion.method, cfg.criterion.target, cfg.optimizer.groups.gates.lr_float) == ("mac", 0.6, 0.05)
    assert list(cfg.model.prune_units) == ["heads", "ffn", "hidden"]
    assert cfg.optimizer.groups.default.lr_float == 0.001


def test_bigfoot_schedule_is_its_authors():
    """60 epochs of LibriSpeech's 281,241 utterances, warm-up over two of them, AdamW 5e-5."""
    cfg = load("distillation/bigfoot_4.yaml")
    batch = cfg.distributed_training.distributed_world_size * cfg.dataset.batch_size
    assert cfg.optimization.max_update * batch == pytest.approx(60 * 281_241, rel=1e-3)
    assert cfg.lr_scheduler.warmup_updates * batch == pytest.approx(2 * 281_241, rel=1e-3)
    assert cfg.optimization.lr == [5e-5] and cfg.model.apply_mask is False


def effective_batch(cfg):
    """Samples an update."""
    return cfg.distributed_training.distributed_world_size * cfg.optimization.update_freq[0] * cfg.dataset.max_tokens


@pytest.mark.parametrize(
    "recipe, samples",
    [
        ("pretraining/w2v2_light_base.yaml", 64 * 1_400_000),
        ("pretraining/w2v2_light_large.yaml", 128 * 1_200_000),
        ("pretraining/sew_tiny.yaml", 32 * 2_800_000),
        ("pretraining/sew_small.yaml", 64 * 1_400_000),
        ("pretraining/sew_mid.yaml", 64 * 1_400_000),
        ("pretraining/stochastic_sew_tiny.yaml", 32 * 2_800_000),
        ("pretraining/stochastic_sew_base.yaml", 64 * 1_400_000),
        ("finetuning/10m.yaml", 2 * 4 * 3_200_000),
        ("finetuning/1h.yaml", 2 * 4 * 3_200_000),
        ("finetuning/10h.yaml", 2 * 4 * 3_200_000),
        ("finetuning/100h.yaml", 2 * 4 * 3_200_000),
    ],
)
def test_effective_batch_is_that_of_the_source(recipe, samples):
    cfg = load(recipe)
    assert cfg.distributed_training.distributed_world_size == 8
    assert effective_batch(cfg) == samples


def test_w2v2_light_large_has_27_67_million_parameters():
    assert count(load("pretraining/w2v2_light_large.yaml").model) == pytest.approx(27.67e6, rel=0.005)


def test_unshared_large_equals_fairseq():
    model = load("pretraining/w2v2_light_large.yaml", "model.unique_layers=24").model
    assert count(model) == stock_count(model)
    assert count(model) == pytest.approx(317.38e6, rel=1e-4)


def test_unshared_base_equals_fairseq():
    model = load("pretraining/w2v2_light_base.yaml", "model.unique_layers=12").model
    assert count(model) == stock_count(model)


@pytest.mark.parametrize(
    "recipe, parameters",
    [
        ("pretraining/sew_tiny.yaml", 46_378_911),
        ("pretraining/sew_small.yaml", 96_339_103),
        ("pretraining/sew_mid.yaml", 181_393_567),
    ],
)
def test_sew_has_its_authors_parameters(recipe, parameters):
    assert count(load(recipe).model) == parameters


def test_sew_runs_at_one_operating_point():
    model = build_model(load("pretraining/sew_tiny.yaml", *SCALED_ENCODER[4:-2]).model, None).train()
    assert str(model.current_operating_point()) == "s2q1k1"


@pytest.mark.parametrize("recipe", ["pretraining/stochastic_sew_tiny.yaml", "pretraining/stochastic_sew_base.yaml"])
def test_stochastic_recipes_draw_from_every_mechanism(recipe):
    model = load(recipe).model
    assert list(model.squeeze_factors) == [1, 2, 3, 4]
    assert list(model.query_pools) == [1, 2] and list(model.kv_pools) == [1, 2]
