"""Hugging Face interchange, against transformers itself: both directions have the same logits and the same text."""

import json
import os
import sys

import numpy as np
import pytest
import soundfile
import torch
from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from tiny_checkpoints import ctc_model, finetuned, letters, perturb, random_audio, save_ctc

from fairseq_w2v2_light.cli.infer import infer
from fairseq_w2v2_light.cli.main import main
from fairseq_w2v2_light.export.from_huggingface import ABSENT_LOGIT, from_huggingface
from fairseq_w2v2_light.export.huggingface import export_huggingface
from fairseq_w2v2_light.nn.config import EncoderConfig
from fairseq_w2v2_light.nn.operating_point import OperatingPoint
from fairseq_w2v2_light.runtime.ctc import CtcModel, normalized
from fairseq_w2v2_light.runtime.decode import greedy
from fairseq_w2v2_light.runtime.load import load_ctc
from fairseq_w2v2_light.runtime.text import Labels

# transformers imports torchaudio where there is one, and the registry's is for another torch
sys.modules.setdefault("torchaudio", None)
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
transformers = pytest.importorskip("transformers", reason="Hugging Face's classes: pip install transformers")
transformers.utils.logging.disable_progress_bar()

SEW = dict(
    name="stochastic_sew",
    squeeze_factors=[2],
    query_pools=[1],
    kv_pools=[1],
    unsqueeze_residual=False,
    squeeze_tail="drop",
    conv_pos=7,
    projection_hidden_dim=24,
)
MODELS = {
    "base": dict(layout="base"),
    "large": dict(layout="large"),
    "normalised audio": dict(layout="large", task={"normalize": True}),
    "shared layers": dict(layout="large", unique_layers=2, layer_map="cycle"),
    "no projection of its own": dict(layout="base", encoder_embed_dim=16),
    "another activation": dict(layout="large", activation_fn="gelu_accurate"),
    "stochastic, unsqueezed": dict(layout="base", squeeze_factors=[1, 2], kv_pools=[1, 2], point="s1q1k1"),
    "SEW": dict(layout="base", **SEW),
    "SEW with LayerNorms": dict(layout="large", **SEW, **dict(layer_norm_first=False)),
    "stochastic SEW at one point": dict(layout="base", **{**SEW, "squeeze_factors": [1, 2, 4]}, point="s2q1k1"),
    "stochastic SEW, unsqueezed": dict(layout="base", **{**SEW, "squeeze_factors": [1, 2, 4]}, point="s1q1k1"),
    "two frames of squeeze left out": dict(layout="base", **{**SEW, "squeeze_factors": [3]}),
}
SHAPES = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    conv_dim=(16, 16, 16),
    conv_kernel=(10, 3, 2),
    conv_stride=(5, 2, 2),
    num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=4,
    codevector_dim=12,
    proj_codevector_dim=12,
    num_codevectors_per_group=6,
    vocab_size=8,
)
LARGE = dict(feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True)
# the frontend makes 44, 34, 20 and 24 frames of them: whole squeeze windows of 2
COUNTS = (900, 700, 420, 500)


def loaded(folder, architecture=None):
    """The model that transformers makes of a folder, all of its weights from there."""
    name = architecture or json.loads((folder / "config.json").read_text())["architectures"][0]
    model, report = getattr(transformers, name).from_pretrained(str(folder), output_loading_info=True)
    assert not any(report.values())
    return model.eval()


def processed(folder, waves, rate=16000):
    """What transformers' own processor makes of a batch."""
    processor = transformers.AutoProcessor.from_pretrained(str(folder))
    arrays = [wave.numpy() for wave in waves]
    return processor(arrays, sampling_rate=rate, padding=True, return_tensors="pt")


def utterances(counts=COUNTS):
    wave, _ = random_audio(*counts)
    return wave, [row[:count] for row, count in zip(wave, counts)]


def compare(theirs, ours, folder):
    """At batch 1 for each of four utterances, and for the padded batch of four."""
    wave, rows = utterances()
    with torch.no_grad():
        for row in rows:
            expected, _ = ours(row.unsqueeze(0))
            torch.testing.assert_close(theirs(**processed(folder, [row])).logits, expected, atol=1e-4, rtol=0)
        batch = processed(folder, rows)
        found = theirs(**batch).logits
        # a model with GroupNorm gets no mask from their processor: padding is audio to it, and to ours here
        lengths = torch.tensor(COUNTS) if "attention_mask" in batch else None
        expected, frames = ours(wave, lengths)
        frames = [expected.size(1)] * len(rows) if frames is None else frames.tolist()
        for found_row, expected_row, count in zip(found, expected, frames):
            torch.testing.assert_close(found_row[:count], expected_row[:count], atol=1e-4, rtol=0)
    return "attention_mask" in batch


@pytest.mark.parametrize("kind", MODELS)
def test_the_logits_are_those_of_the_checkpoint_in_both_directions(tmp_path, kind):
    keys = dict(MODELS[kind])
    point, layout = keys.pop("point", ""), keys["layout"]
    path = finetuned(tmp_path, **keys)
    options = ["--operating-point", point] if point else []
    assert main(["export", path, str(tmp_path / "hf"), "--format", "hf", *options]) == 0
    ours = load_ctc(path)
    if point:
        ours.point = OperatingPoint.parse(point)
    theirs = loaded(tmp_path / "hf")
    assert compare(theirs, ours, tmp_path / "hf") == (layout == "large")
    squeezes = ours.point.squeeze > 1
    assert isinstance(theirs, transformers.SEWForCTC if squeezes else transformers.Wav2Vec2ForCTC)

    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "back.pt")]) == 0
    back = load_ctc(tmp_path / "back.pt")
    assert back.symbols == ours.symbols and back.normalize == ours.normalize
    wave, _ = utterances()
    pair = [model(wave, torch.tensor(COUNTS))[0] for model in (back, ours)]
    torch.testing.assert_close(*pair, atol=1e-5, rtol=0)
    export_huggingface(back, tmp_path / "again")
    again = loaded(tmp_path / "again").state_dict()
    assert again.keys() == theirs.state_dict().keys()
    assert all(torch.equal(value, again[name]) for name, value in theirs.state_dict().items())


def test_a_group_norm_takes_padding_in_as_stock_fairseq_does(tmp_path):
    """What can hold for a padded batch of base with a mask: transformers has stock fairseq's logits."""
    path = finetuned(tmp_path, "wav2vec_ctc", name="wav2vec2", layout="base")
    export_huggingface(load_ctc(path), tmp_path / "hf")
    wave, rows = utterances()
    mask = torch.arange(wave.size(1)) < torch.tensor(COUNTS).unsqueeze(1)
    (stock,), _, _ = checkpoint_utils.load_model_ensemble_and_task([path])
    with torch.no_grad():
        found = loaded(tmp_path / "hf")(wave, attention_mask=mask.long()).logits
        output = stock.eval()(source=wave, padding_mask=~mask)
        expected = output["encoder_out"].transpose(0, 1)
        alone = load_ctc(path)(rows[2].unsqueeze(0))[0][0]
    for row, count in enumerate((44, 34, 20, 24)):
        torch.testing.assert_close(found[row, :count], expected[row, :count], atol=1e-4, rtol=0)
    assert (found[2, :20] - alone).abs().max() > 1e-3


def test_sew_attends_to_half_padded_windows(tmp_path):
    """What their SEW with a mask does to utterances of an odd number of frames; alone they have our logits."""
    path = finetuned(tmp_path, **MODELS["SEW with LayerNorms"])
    export_huggingface(load_ctc(path), tmp_path / "hf")
    _, rows = utterances((900, 440))  # 44 and 21 frames
    theirs, ours = loaded(tmp_path / "hf"), load_ctc(path)
    with torch.no_grad():
        batch = theirs(**processed(tmp_path / "hf", rows)).logits
        alone = ours(rows[1].unsqueeze(0))[0][0]
        torch.testing.assert_close(theirs(rows[1].unsqueeze(0)).logits[0], alone, atol=1e-4, rtol=0)
    torch.testing.assert_close(batch[0], ours(rows[0].unsqueeze(0))[0][0], atol=1e-4, rtol=0)
    assert (batch[1, :21] - alone).abs().max() > 1e-3


def test_their_feature_extractor_has_another_epsilon(tmp_path):
    """Quiet audio becomes a little louder there than in fairseq; from what fairseq makes of it the logits are ours."""
    path = finetuned(tmp_path, **MODELS["normalised audio"])
    export_huggingface(load_ctc(path), tmp_path / "hf")
    wave = utterances()[0][:1] * 0.05
    theirs = processed(tmp_path / "hf", wave)["input_values"]
    ratio = ((wave.var() + 1e-5) / (wave.var() + 1e-7)).sqrt()
    torch.testing.assert_close(theirs, normalized(wave) * ratio, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        found = loaded(tmp_path / "hf")(normalized(wave)).logits
    torch.testing.assert_close(found, load_ctc(path)(wave)[0], atol=1e-4, rtol=0)


def dictionary_of(*symbols):
    dictionary = Dictionary()
    for symbol in symbols:
        dictionary.add_symbol(symbol)
    return dictionary


@pytest.mark.parametrize(
    "dictionary",
    [
        letters("ABC|'é字"),
        dictionary_of("\u2581the", "\u2581a", "\u2581", "s", "ing", "'"),
        dictionary_of("one", "two", "three"),
    ],
    ids=["letters", "sentencepieces", "words"],
)
def test_the_processor_spells_the_text_that_we_do(tmp_path, dictionary):
    model = CtcModel(tiny_network(), dictionary.symbols).eval()
    export_huggingface(model, tmp_path / "hf")
    generator = torch.Generator().manual_seed(0)
    log_probs = torch.randn(6, 40, len(dictionary), generator=generator)
    log_probs[..., 1:4] = -50  # the labels that no model is trained to output
    log_probs[:, ::2, 0] += 2
    expected = [Labels(dictionary.symbols).text(hypothesis.tokens) for hypothesis in greedy(log_probs.log_softmax(-1))]
    processor = transformers.AutoProcessor.from_pretrained(str(tmp_path / "hf"))
    assert processor.batch_decode(log_probs.argmax(-1)) == expected and any(" " in text for text in expected)
    # and back: the labels that it was made from
    from_huggingface(tmp_path / "hf", tmp_path / "back.pt")
    assert load_ctc(tmp_path / "back.pt").symbols == list(dictionary.symbols)


def tiny_network(**keys):
    return EncoderConfig(
        **{
            **dict(conv_layers=((16, 10, 5), (16, 3, 2), (16, 2, 2)), dim=32, ffn_dim=48, heads=4),
            **dict(conv_pos=8, conv_pos_groups=4, layer_map=(0, 1)),
            **keys,
        }
    )


def hugging_face(folder, name, vocabulary=None, **keys):
    """Writes a folder as transformers does, of a random model; returns the model."""
    kind = next(kind for kind in ("Wav2Vec2", "Hubert", "SEW") if name.startswith(kind))
    shapes = {key: value for key, value in SHAPES.items() if kind == "Wav2Vec2" or "codevector" not in key}
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, f"{kind}Config")(**{**shapes, **keys})).eval()
    perturb(model, torch.Generator().manual_seed(0))
    model.save_pretrained(str(folder))
    norm = keys.get("feat_extract_norm", "group")
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=norm == "layer")
    if not name.endswith("ForCTC"):
        extractor.save_pretrained(str(folder))
        return model
    if vocabulary is None:
        vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "A": 5, "B": 6, "'": 7}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]"} if "[PAD]" in vocabulary else {}
    tokenizer = transformers.Wav2Vec2CTCTokenizer(str(folder / "vocab.json"), **special)
    transformers.Wav2Vec2Processor(extractor, tokenizer).save_pretrained(str(folder))
    return model


THEIRS = {
    "base": ("Wav2Vec2ForCTC", {}),
    "large": ("Wav2Vec2ForCTC", LARGE),
    "as wide as the frontend": ("Wav2Vec2ForCTC", dict(hidden_size=16)),
    "relu": ("Wav2Vec2ForCTC", dict(hidden_act="relu")),
    "hubert": ("HubertForCTC", LARGE),
    "hubert base": ("HubertForCTC", dict(mask_time_prob=0.0)),
    "sew": ("SEWForCTC", {}),
    "sew, as wide": ("SEWForCTC", dict(hidden_size=16, squeeze_factor=3)),
}


@pytest.mark.parametrize("pickled", (False, True))
@pytest.mark.parametrize("kind", THEIRS)
def test_their_model_becomes_ours(tmp_path, kind, pickled):
    name, keys = THEIRS[kind]
    theirs = hugging_face(tmp_path / "hf", name, **keys)
    if pickled:
        (tmp_path / "hf" / "model.safetensors").unlink()
        torch.save(theirs.state_dict(), str(tmp_path / "hf" / "pytorch_model.bin"))
    out = str(tmp_path / "ours.pt")
    assert main(["convert", str(tmp_path / "hf"), out]) == 0
    compare(theirs, load_ctc(out), tmp_path / "hf")
    (ours,), cfg, task = checkpoint_utils.load_model_ensemble_and_task([out])
    assert cfg.model._name == "light_ctc" and task.target_dictionary.symbols[4:] == ["|", "A", "B", "'"]
    wave, _ = utterances()
    output = ours.eval()(source=wave, padding_mask=None)["encoder_out"].transpose(0, 1)
    torch.testing.assert_close(output, load_ctc(out)(wave)[0], atol=1e-5, rtol=0)
    if not name.startswith("Hubert"):  # which we write as Wav2Vec2
        export_huggingface(load_ctc(out), tmp_path / "again")
        with torch.no_grad():
            pair = [model(wave).logits for model in (theirs, loaded(tmp_path / "again"))]
        torch.testing.assert_close(*pair, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("vocabulary", "symbols", "rows"),
    [
        # as in Hugging Face's own tutorial: the blank comes last, begin and end of sentence are added beyond the head
        (
            {"B": 0, "A": 1, "'": 2, "|": 3, "z": 4, "y": 5, "[UNK]": 6, "[PAD]": 7},
            ["<s>", "<pad>", "</s>", "<unk>", "B", "A", "'", "|", "z", "y"],
            [7, None, None, 6, 0, 1, 2, 3, 4, 5],
        ),
        # fewer tokens than outputs, and gaps: transformers itself adds `<s>` as 4, which is taken, and `</s>` as 5
        (
            {"<pad>": 0, "|": 3, "A": 4, "<unk>": 2},
            ["<s>", "<pad>", "</s>", "<unk>", "madeupword0000", "|", "A", "madeupword0001", "madeupword0002"],
            [0, None, 5, 2, 1, 3, 4, 6, 7],
        ),
    ],
)
def test_labels_in_another_order(tmp_path, vocabulary, symbols, rows):
    blank = vocabulary.get("[PAD]", 0)
    theirs = hugging_face(tmp_path / "hf", "Wav2Vec2ForCTC", vocabulary, pad_token_id=blank, **LARGE)
    from_huggingface(tmp_path / "hf", tmp_path / "ours.pt")
    ours = load_ctc(tmp_path / "ours.pt")
    assert ours.symbols == symbols
    wave, _ = utterances()
    with torch.no_grad():
        expected, found = theirs(wave).logits, ours(wave)[0]
    for place, row in enumerate(rows):
        column = torch.full_like(found[..., 0], ABSENT_LOGIT) if row is None else expected[..., row]
        torch.testing.assert_close(found[..., place], column, atol=1e-4, rtol=0)
    # what is absent takes no probability
    known = [place for place, row in enumerate(rows) if row is not None]
    pair = found.log_softmax(-1)[..., known], expected.log_softmax(-1)[..., [rows[place] for place in known]]
    torch.testing.assert_close(*pair, atol=1e-4, rtol=0)
    # outputs without a token are spelled as the unknown one there
    for place, row in enumerate(rows):
        if place in (1, 2, 3) or symbols[place].startswith("madeupword"):
            found[..., place] = -50
            if row is not None:
                expected[..., row] = -50
    text = [Labels(symbols).text(hypothesis.tokens) for hypothesis in greedy(found.log_softmax(-1))]
    processor = transformers.AutoProcessor.from_pretrained(str(tmp_path / "hf"))
    assert processor.batch_decode(expected.argmax(-1)) == text and any(text)


@pytest.mark.parametrize(
    ("name", "became", "keys"),
    [
        ("Wav2Vec2ForPreTraining", "w2v2_light", {}),
        ("Wav2Vec2ForPreTraining", "w2v2_light", LARGE),
        ("Wav2Vec2Model", "w2v2_light", {}),
        ("HubertModel", "w2v2_light", LARGE),
        ("SEWModel", "stochastic_sew", {}),
    ],
)
def test_a_pretrained_encoder_becomes_ours_and_is_fine_tuned(tmp_path, name, became, keys):
    theirs = hugging_face(tmp_path / "hf", name, **keys)
    out = str(tmp_path / "ours.pt")
    summary = from_huggingface(tmp_path / "hf", out)
    assert ("new: " in summary) == (name != "Wav2Vec2ForPreTraining")
    (ours,), cfg, _ = checkpoint_utils.load_model_ensemble_and_task([out])
    assert cfg.model._name == became
    wave, _ = utterances()
    encoder = theirs.wav2vec2 if name.endswith("ForPreTraining") else theirs
    with torch.no_grad():
        expected = encoder(wave).last_hidden_state
        found = ours.eval().extract_features(wave)["x"]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert torch.equal(ours.mask_emb, encoder.masked_spec_embed)
    if name.endswith("ForPreTraining"):
        with torch.no_grad():
            expected = theirs(wave)
            frames = ours.normalise(ours.features(wave)[0])
            quantized = ours.project_q(ours.quantizer(frames)["x"])
            predicted = ours.final_proj(found)
        torch.testing.assert_close(predicted, expected.projected_states, atol=1e-4, rtol=0)
        torch.testing.assert_close(quantized, expected.projected_quantized_states, atol=1e-4, rtol=0)
    tuned = ctc_model(out).train()
    tuned(source=wave, padding_mask=None)["encoder_out"].sum().backward()
    assert tuned.w2v_encoder.w2v_model.encoder.layers[0].fc1.weight.grad.abs().sum() > 0


def test_fine_tuning_goes_on_and_infer_decodes(tmp_path):
    hugging_face(tmp_path / "hf", "Wav2Vec2ForCTC")
    data = tmp_path / "data"
    data.mkdir()
    from_huggingface(tmp_path / "hf", tmp_path / "ours.pt")
    os.rename(tmp_path / "ours.dict.ltr.txt", data / "dict.ltr.txt")
    (state,) = [torch.load(tmp_path / "ours.pt", map_location="cpu")]
    dictionary = Dictionary.load(str(data / "dict.ltr.txt"))
    assert dictionary.symbols == state["task_state"]["target_dictionary"].symbols
    tuned = ctc_model(tmp_path / "ours.pt", dictionary=dictionary)
    # the same labels: the head comes along
    assert torch.equal(tuned.w2v_encoder.proj.weight, state["model"]["w2v_encoder.proj.weight"])
    task = {"_name": "audio_finetuning", "data": str(data), "labels": "ltr"}
    save_ctc(tmp_path / "tuned.pt", tuned, task, dictionary)

    lines, texts = [str(data)], []
    for index, count in enumerate((4000, 5000, 3600)):
        wave = np.random.default_rng(index).normal(scale=0.1, size=count)
        soundfile.write(data / f"{index}.wav", wave, 16000, subtype="FLOAT")
        lines.append(f"{index}.wav\t{count}")
        texts.append("A B |")
    (data / "test.tsv").write_text("\n".join(lines) + "\n")
    (data / "test.ltr").write_text("\n".join(texts) + "\n")
    (data / "test.wrd").write_text("AB\n" * 3)
    for name in ("ours", "tuned"):
        arguments = [f"task.data={data}", f"common_eval.path={tmp_path / name}.pt", "dataset.num_workers=0"]
        (result,) = infer([*arguments, f"common_eval.results_path={tmp_path / name}"])
        assert result["sentences"] == 3
    hypotheses = [(tmp_path / name / "test" / "hypo.word").read_text() for name in ("ours", "tuned")]
    assert hypotheses[0] == hypotheses[1]
    found = {line.rsplit("-", 1)[1].rstrip(")"): line.rsplit(" (", 1)[0] for line in hypotheses[0].splitlines()}
    model = load_ctc(tmp_path / "ours.pt")
    for index in range(3):
        wave = torch.from_numpy(soundfile.read(data / f"{index}.wav", dtype="float32")[0])
        (hypothesis,) = greedy(model(wave.unsqueeze(0))[0].log_softmax(-1))
        assert found[str(index)] == " ".join(Labels(model.symbols).text(hypothesis.tokens).split())


def test_a_sharded_folder(tmp_path):
    theirs = hugging_face(tmp_path / "hf", "Wav2Vec2ForCTC")
    (tmp_path / "hf" / "model.safetensors").unlink()
    theirs.save_pretrained(str(tmp_path / "hf"), max_shard_size="40KB")
    assert (tmp_path / "hf" / "model.safetensors.index.json").is_file()
    from_huggingface(tmp_path / "hf", tmp_path / "ours.pt")
    compare(theirs, load_ctc(tmp_path / "ours.pt"), tmp_path / "hf")
