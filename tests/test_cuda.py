"""What runs on a GPU equals what runs on the CPU, and fairseq trains every kind of model there. Skipped without one."""

import numpy as np
import pytest
import torch
from noise_corpus import SMALL_RUN, TINY_PRETRAINING, write_noise_corpus
from tiny_checkpoints import LAYOUTS, MODELS, SHAPE, SHARED, STOCHASTIC, finetuned, perturb, random_audio

from fairseq_w2v2_light.cli.main import main
from fairseq_w2v2_light.criterions import LightContrastive
from fairseq_w2v2_light.criterions.denominator import estimate
from fairseq_w2v2_light.criterions.lfmmi import distillation_lfmmi, lfmmi_loss
from fairseq_w2v2_light.models import W2V2LightConfig, W2V2LightModel
from fairseq_w2v2_light.runtime.load import load_ctc
from fairseq_w2v2_light.runtime.prepare import prepare_
from fairseq_w2v2_light.runtime.recognizer import Recognizer
from fairseq_w2v2_light.study.bench import SYMBOLS
from fairseq_w2v2_light.study.experiment import PLAIN, train
from fairseq_w2v2_light.study.training import compare_updates

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SAMPLES = (1215, 990, 601)
KINDS = {**MODELS, "pruned": dict(layout="large", layer_heads=[0, 2, 1], layer_ffn=[40, 0, 7], head_dim=8)}


@pytest.fixture(autouse=True)
def exact_products():
    """fp32 as the CPU has it: by default convolutions round their operands to TF32 on a GPU."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_noise_corpus(tmp_path_factory.mktemp("corpus"))


def close(found, expected, tolerance):
    """Whether a tensor of the GPU is one of the CPU, but for a share of its largest value."""
    scale = max(1e-6, float(expected.abs().max()))
    assert found.shape == expected.shape
    assert float((found.float().cpu() - expected).abs().max()) <= tolerance * scale


@pytest.mark.parametrize("kind", KINDS)
def test_logits_at_every_point(kind, tmp_path):
    model = load_ctc(finetuned(tmp_path, **KINDS[kind]))
    there = load_ctc(tmp_path / "ctc.pt").cuda()
    wave, _ = random_audio(*SAMPLES)
    for point in model.config.operating_points.points():
        for lengths in (None, torch.tensor(SAMPLES)):
            with torch.no_grad():
                expected, frames = model(wave, lengths, point)
                found, found_frames = there(wave.cuda(), lengths, point)
            if lengths is None:
                close(found, expected, 2e-5)
                continue
            assert found_frames.tolist() == frames.tolist()
            for row, count in enumerate(frames.tolist()):
                close(found[row, :count], expected[row, :count], 2e-5)


@pytest.mark.parametrize("kind", ("base", "stochastic", "streaming"))
def test_recognizer(kind, tmp_path):
    checkpoint = finetuned(tmp_path, **MODELS[kind], task={"normalize": kind == "base"})
    waves = [wave.numpy() for wave in random_audio(9000, 7000, 5001)[0]]
    expected = Recognizer.from_pretrained(checkpoint).log_probs(waves)
    for dtype, tolerance in (("float32", 5e-5), ("bfloat16", 0.1)):
        recognizer = Recognizer.from_pretrained(checkpoint, dtype=dtype, device="cuda")
        assert recognizer.dtype == dtype and recognizer.model.head.weight.is_cuda
        for found, row in zip(recognizer.log_probs(waves), expected):
            assert found.dtype == np.float32
            close(torch.from_numpy(found), torch.from_numpy(row), tolerance)


def test_int8_folders_run_in_bfloat16(tmp_path):
    checkpoint = finetuned(tmp_path, **MODELS["base"])
    assert main(["export", checkpoint, str(tmp_path / "int8"), "--dtype", "int8"]) == 0
    recognizer = Recognizer.from_pretrained(tmp_path / "int8", device="cuda")
    wave = random_audio(9000)[0][0].numpy()
    expected = Recognizer.from_pretrained(tmp_path / "int8", dtype="float32").log_probs([wave])[0]
    assert recognizer.dtype == "bfloat16"
    close(torch.from_numpy(recognizer.log_probs([wave])[0]), torch.from_numpy(expected), 0.1)
    with pytest.raises(ValueError, match="int8 was asked for, which runs on CPUs; choose bfloat16 or float32"):
        prepare_(load_ctc(checkpoint), "int8", device="cuda")


def test_transcribe_and_evaluate(corpus, tmp_path, capsys, monkeypatch):
    checkpoint = finetuned(tmp_path, **MODELS["stochastic"])
    texts = []
    capsys.readouterr()
    for device in ("cpu", "cuda"):
        arguments = ["transcribe", str(corpus / "0.wav"), str(corpus / "1.wav"), "--model", checkpoint]
        assert main([*arguments, "--device", device]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != ""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for options in (["--all-points"], ["--auto-operating-point", "--budget", "rtf=100"]):
        assert main(["evaluate", str(corpus), "--model", checkpoint, "--device", "cuda", *options]) == 0
        assert ", cuda, greedy" in capsys.readouterr().out


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("changes", ({}, {**SHARED, **STOCHASTIC}), ids=("plain", "shared-stochastic"))
def test_pretraining_loss_and_gradients(layout, changes):
    torch.manual_seed(0)
    here = W2V2LightModel(W2V2LightConfig(**{**SHAPE, **LAYOUTS[layout], **changes, "operating_point_seed": 1}))
    perturb(here, torch.Generator().manual_seed(0))
    there = W2V2LightModel(here.cfg)
    there.load_state_dict(here.state_dict())
    there.cuda()
    source, _ = random_audio(1215, 1215)
    frames = here(source, mask=False, features_only=True)["x"].size(1)
    mask = (torch.arange(frames) // 3 % 3 == 0).repeat(2, 1)
    criterion = LightContrastive(None, loss_weights=[0.1, 10.0], collapse_perplexity=0.0)
    losses = []
    for model in (here, there):
        device = next(model.parameters()).device
        torch.manual_seed(0)
        inputs = {"source": source.to(device), "mask_indices": mask.to(device)}
        loss, _, _ = criterion(model.eval(), {"net_input": inputs, "id": torch.arange(2)})
        loss.backward()
        losses.append(loss.detach())
    close(losses[1].reshape(1), losses[0].reshape(1), 1e-4)
    gradients = {name: value.grad for name, value in there.named_parameters() if value.grad is not None}
    compared = {name: value.grad for name, value in here.named_parameters() if value.grad is not None}
    assert gradients.keys() == compared.keys() and len(compared) > 10
    largest = max(float(value.abs().max()) for value in compared.values())
    for name, expected in compared.items():
        assert float((gradients[name].cpu() - expected).abs().max()) <= 1e-4 * largest, name


@pytest.mark.parametrize("order", (2, 3))
def test_lfmmi(order):
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(4, len(SYMBOLS), (3, 12), generator=generator)
    graph = estimate(targets.tolist(), SYMBOLS, order=order)
    logits, teacher = 2 * torch.randn(2, 3, 60, len(SYMBOLS), generator=generator)
    lengths, target_lengths = torch.tensor([60, 51, 40]), torch.tensor([12, 9, 7])
    results = []
    for device in ("cpu", "cuda"):
        scores = logits.to(device, copy=True).requires_grad_()
        loss = lfmmi_loss(scores, lengths, targets.to(device), target_lengths, graph)
        distilled = distillation_lfmmi(scores, teacher.to(device), lengths, graph)
        (loss.sum() + distilled.sum()).backward()
        results.append((loss.detach(), distilled.detach(), scores.grad))
    for expected, found in zip(*results):
        close(found, expected, 1e-4)


@pytest.fixture(scope="module")
def tuned(corpus, tmp_path_factory):
    """A model that the GPU pre-trained and fine-tuned for a few updates, both in fp16."""
    out = tmp_path_factory.mktemp("trained")
    start = train(
        "pretraining/light_stochastic_tiny",
        corpus,
        out / "pretrained",
        [*SMALL_RUN, *TINY_PRETRAINING, "common.fp16=true", "common.fp16_init_scale=1"],
        3,
    )
    overrides = [*SMALL_RUN, f"model.w2v_path={start}", "common.fp16=true", "common.fp16_init_scale=1"]
    return train("finetuning/tiny", corpus, out / "finetuned", overrides, 3)


@pytest.mark.parametrize("precision", ("fp32", "fp16", "bf16", "amp"))
@pytest.mark.parametrize("kind", ("finetuning/tiny", "distillation/tiny", "streaming", "pruning/tiny", "lfmmi"))
def test_training(kind, precision, corpus, tuned, tmp_path):
    if (kind, precision) == ("pruning/tiny", "amp"):
        pytest.skip("fairseq's AMP optimizer knows no groups of parameters")
    recipe = {"streaming": "distillation/streaming_tiny", "lfmmi": "distillation/tiny"}.get(kind, kind)
    overrides = [*SMALL_RUN, *([] if precision == "fp32" else [f"common.{precision}=true"])]
    overrides += ["common.fp16_init_scale=1"] if precision == "fp16" else []
    if recipe.startswith("distillation"):
        overrides += [f"criterion.teacher={tuned}", "criterion.hidden_map=every:1"]
        overrides += ["criterion.hidden_weight=0.0"] if kind == "streaming" else []
    if kind == "lfmmi":
        graph = tmp_path / "graph.npz"
        assert main(["denominator", str(corpus), str(graph)]) == 0
        overrides += [f"criterion.denominator={graph}", "criterion.mmi_weight=1.0"]
    # a streaming model hears audio that is not normalised, and begins with random weights here
    overrides += [] if kind == "streaming" else [f"model.w2v_path={tuned}"]
    checkpoint = train(recipe, corpus, tmp_path / "out", overrides, 3)
    weights = torch.load(str(checkpoint), map_location="cpu", weights_only=False)["model"]
    assert all(bool(value.isfinite().all()) for value in weights.values())
    if kind != "streaming":
        before = torch.load(str(tuned), map_location="cpu", weights_only=False)["model"]
        name = "w2v_encoder.proj.weight"
        assert not torch.equal(weights[name].float(), before[name].float())


def test_updates_beside_stock_fairseq():
    stock, ours = compare_updates("pretraining/light_stochastic_tiny", PLAIN, 1.0, 2, updates=1, device="cuda")
    assert stock.peak_bytes > 0 and ours.peak_bytes > 0
    assert ours.difference < 1e-4
