"""The README's words, run."""

import re
from pathlib import Path

import soundfile
import torch
from tiny_checkpoints import (
    LAYOUTS,
    SHAPE,
    container,
    ctc_model,
    finetuned,
    letters,
    perturb,
    random_audio,
    save_checkpoint,
    save_ctc,
)

from fairseq_w2v2_light.export.folder import export_folder
from fairseq_w2v2_light.models import W2V2LightConfig, W2V2LightModel

README = Path(__file__).resolve().parents[1] / "README.md"


def run_snippet(containing):
    """Runs the one Python snippet with this text in it."""
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (snippet,) = [snippet for snippet in snippets if containing in snippet]
    exec(compile(snippet, str(README), "exec"), {})


def test_api_snippet_runs(capsys):
    run_snippet("extract_features")
    assert capsys.readouterr().out.splitlines() == ["s1q1k1 (2, 49, 192)", "s2q1k2 (2, 49, 192)"]


def test_streaming_snippet_runs(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    config = W2V2LightConfig(**{**SHAPE, **LAYOUTS["large"], "chunk_frames": [16], "left_context_frames": 32})
    weights = W2V2LightModel(config).state_dict()
    model = ctc_model(save_checkpoint(tmp_path / "pretrained.pt", container(config, "w2v2_light"), weights))
    perturb(model, torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.w2v_encoder.proj.weight.mul_(5)
        model.w2v_encoder.proj.bias[letters().unk()] = -100
    save_ctc(tmp_path / "streaming.pt", model, dictionary=letters())
    soundfile.write(str(tmp_path / "speech.wav"), random_audio(16000)[0][0].numpy() * 0.1, 16000)
    monkeypatch.chdir(tmp_path)
    run_snippet("StreamingRecognizer")
    *_, whole, resumed = capsys.readouterr().out.replace("\r", "\n").splitlines()
    assert len(resumed) > 20 and whole.startswith(resumed + " [('")


def test_recogniser_snippet_runs(tmp_path, monkeypatch, capsys):
    export_folder(finetuned(tmp_path, layout="large"), tmp_path / "model")
    for name in ("a.wav", "b.flac"):
        soundfile.write(str(tmp_path / name), random_audio(16000)[0][0].numpy() * 0.1, 16000)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()  # fairseq prints what it builds
    run_snippet("Recognizer.from_pretrained")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ")[0] for line in lines[::2]] == ["a.wav", "b.flac"]
    assert all(line.startswith("[") and line.endswith("]") for line in lines[1::2])


def test_every_verb_and_recipe_that_the_readme_names_exists():
    from fairseq_w2v2_light.cli.main import VERBS
    from fairseq_w2v2_light.models.recipe import recipe_path

    text = README.read_text(encoding="utf-8")
    assert set(re.findall(r"(?m)^ *w2v2-light ([a-z-]+)", text)) <= set(VERBS)
    for recipe in set(re.findall(r"pretraining/\w+", text)) - {"pretraining/NAME"}:
        assert recipe_path(recipe).is_file()


def test_every_script_that_the_documents_name_exists():
    texts = [README.with_name(name).read_text(encoding="utf-8") for name in ("README.md", "RESULTS.md")]
    named = {path for text in texts for path in re.findall(r"(?:examples|benchmarks)/\w+(?:/\w+)?\.py", text)}
    makefile = README.with_name("Makefile").read_text(encoding="utf-8")
    named |= {f"examples/{path}" for path in re.findall(r"\$\(EXAMPLE\)/(\S+)", makefile)}
    named |= {f"benchmarks/{path}" for path in re.findall(r"\$\(BENCHMARK\)/(\S+)", makefile)}
    assert len(named) > 12
    assert [path for path in sorted(named) if not (README.parent / path).is_file()] == []
