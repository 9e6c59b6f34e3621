"""fairseq-generate with task audio_ctc, run in this process by its own entry point."""

import logging
import re
import sys
from types import SimpleNamespace

import editdistance
import pytest
import torch

from fairseq_w2v2_light.paths import user_dir


def generate(capsys, data, model, *options):
    """Runs fairseq-generate; returns its output lines (T-, H-, D-, P-, A- and the summary)."""
    from fairseq_cli.generate import cli_main

    argv = ["fairseq-generate", str(data), "--task", "audio_ctc", "--user-dir", str(user_dir())]
    argv += ["--path", str(model.checkpoint), "--gen-subset", "test", "--num-workers", "0", *options]
    logging.getLogger().handlers.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        cli_main()
    return capsys.readouterr().out.splitlines()


def lines_of(kind, output):
    """{utterance: [fields, ...]} of the output lines that start with `kind`."""
    found = {}
    for line in output:
        match = re.match(rf"{kind}-(\d+)\t(.*)", line)
        if match:
            found.setdefault(int(match.group(1)), []).append(match.group(2).split("\t"))
    return found


def word_error_rate(output):
    references = {key: value[0][0].split() for key, value in lines_of("T", output).items()}
    hypotheses = {key: value[0][1].split() for key, value in lines_of("D", output).items()}
    errors = sum(editdistance.eval(references[key], hypotheses[key]) for key in references)
    return 100.0 * errors / sum(len(words) for words in references.values())


@pytest.mark.parametrize("count", [1, 7, 9])
def test_every_set_size_gives_as_many_hypotheses_as_references(capsys, tiny_ctc, tmp_path, count):
    data = tiny_ctc.copy_split(tmp_path / "data", count)
    output = generate(capsys, data, tiny_ctc, "--beam", "1")
    assert sorted(lines_of("T", output)) == sorted(lines_of("H", output)) == list(range(count))


def test_defaults_are_enough_and_the_best_of_five_beams_is_printed(capsys, tiny_ctc):
    output = generate(capsys, tiny_ctc.data, tiny_ctc)
    assert {len(found) for found in lines_of("H", output).values()} == {1}
    assert re.search(r"Generate test with beam=5: \w+", output[-1])


def test_references_are_the_transcripts(capsys, tiny_ctc):
    output = generate(capsys, tiny_ctc.data, tiny_ctc, "--beam", "1", "--post-process", "letter")
    transcripts = (tiny_ctc.data / "test.wrd").read_text().splitlines()
    assert {key: value[0][0] for key, value in lines_of("T", output).items()} == dict(enumerate(transcripts))


def test_the_printed_wer_of_letters_is_that_of_the_printed_lines(capsys, tiny_ctc):
    options = ("--scoring", "wer", "--post-process", "letter", "--beam", "3")
    output = generate(capsys, tiny_ctc.data, tiny_ctc, *options)
    assert output[-1] == f"Generate test with beam=3: WER: {word_error_rate(output):.2f}"


def test_the_printed_wer_of_sentencepieces_is_that_of_the_printed_lines(capsys, stochastic_ctc):
    options = ("--labels", "spm", "--scoring", "wer", "--post-process", "sentencepiece", "--beam", "1")
    output = generate(capsys, stochastic_ctc.data, stochastic_ctc, *options)
    transcripts = (stochastic_ctc.data / "test.wrd").read_text().splitlines()
    assert {key: value[0][0] for key, value in lines_of("T", output).items()} == dict(enumerate(transcripts))
    assert output[-1] == f"Generate test with beam=1: WER: {word_error_rate(output):.2f}"


def test_nbest_hypotheses_are_distinct_and_sorted(capsys, tiny_ctc):
    output = generate(capsys, tiny_ctc.data, tiny_ctc, "--beam", "8", "--nbest", "4")
    for hypotheses in lines_of("H", output).values():
        scores = [float(score) for score, _ in hypotheses]
        assert len({text for _, text in hypotheses}) == 4
        assert scores == sorted(scores, reverse=True)


def test_one_positional_score_and_one_alignment_a_token(capsys, tiny_ctc):
    output = generate(capsys, tiny_ctc.data, tiny_ctc, "--beam", "4", "--print-alignment", "hard")
    for key, ((_, text),) in lines_of("H", output).items():
        pairs = [pair.split("-") for pair in lines_of("A", output)[key][0][0].split()]
        frames = [int(frame) for frame, _ in pairs]
        assert len(lines_of("P", output)[key][0][0].split()) == len(text.split()) == len(pairs)
        assert frames == sorted(set(frames))


def test_an_operating_point_reaches_the_model(capsys, stochastic_ctc):
    def decode(point):
        options = ("--labels", "spm", "--beam", "1", "--model-overrides", f"{{'operating_point': '{point}'}}")
        return generate(capsys, stochastic_ctc.data, stochastic_ctc, *options)

    outputs = {point: lines_of("H", decode(point)) for point in ("s1q1k1", "s2q1k2", "s2q2k1")}
    assert all(len(found) == 9 for found in outputs.values())
    assert outputs["s1q1k1"] != outputs["s2q1k2"] != outputs["s2q2k1"]


def test_a_padded_batch_decodes_as_its_utterances_one_by_one(capsys, tiny_ctc):
    # Stock's layer_norm frontend does not leak padding, so the tiny stock model serves.
    together = generate(capsys, tiny_ctc.data, tiny_ctc, "--beam", "4", "--batch-size", "9")
    alone = generate(capsys, tiny_ctc.data, tiny_ctc, "--beam", "4", "--batch-size", "1")
    assert {k: v[0][1] for k, v in lines_of("H", together).items()} == {
        k: v[0][1] for k, v in lines_of("H", alone).items()
    }


def test_normalisation_follows_the_checkpoint(tiny_ctc):
    # fairseq-generate was not told --normalize; the checkpoint was trained with it.
    task = make_task(tiny_ctc.data)
    task.load_dataset("test", task_cfg=SimpleNamespace(normalize=True, sample_rate=16000))
    source = task.dataset("test")[0]["source"]
    assert source.std().item() == pytest.approx(1.0, abs=1e-2)


def make_task(data, **keys):
    from omegaconf import OmegaConf

    from fairseq_w2v2_light.tasks.audio_ctc import AudioCtcConfig, AudioCtcTask

    cfg = OmegaConf.create({"common": {"tpu": False, "seed": 1}, "task": {}})
    cfg.task = OmegaConf.structured(AudioCtcConfig(data=str(data), **keys))
    return AudioCtcTask.setup_task(cfg.task)


def test_a_checkpoint_that_does_not_say_normalize_is_refused(tiny_ctc):
    with pytest.raises(ValueError, match="does not say 'normalize'"):
        make_task(tiny_ctc.data).load_dataset("test", task_cfg=SimpleNamespace(sample_rate=16000))


def test_another_dictionary_than_the_checkpoints_is_refused(capsys, tiny_ctc, tmp_path):
    data = tiny_ctc.copy_split(tmp_path / "data", 2)
    path = data / "dict.ltr.txt"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    with pytest.raises(ValueError, match=r"dict\.ltr\.txt: .* symbol number 4 is .*, expected"):
        generate(capsys, data, tiny_ctc)


def test_a_missing_dictionary_is_named_with_those_there_are(capsys, tiny_ctc):
    with pytest.raises(FileNotFoundError, match=r"dict\.phn\.txt: no such .*dict\.ltr\.txt, dict\.spm\.txt"):
        generate(capsys, tiny_ctc.data, tiny_ctc, "--labels", "phn")


def test_a_manifest_with_fewer_labels_is_refused_before_decoding(capsys, tiny_ctc, tmp_path):
    data = tiny_ctc.copy_split(tmp_path / "data", 3)
    labels = data / "test.ltr"
    labels.write_text("".join(labels.read_text().splitlines(keepends=True)[:2]))
    with pytest.raises(ValueError, match=r"test\.ltr: 2 lines of labels"):
        generate(capsys, data, tiny_ctc)


def test_a_pretrained_checkpoint_is_refused(capsys, tiny_ctc):
    pretrained = SimpleNamespace(checkpoint=tiny_ctc.pretrained)
    with pytest.raises(ValueError, match="--path is a pre-trained encoder .* expected a CTC model: fine-tune it first"):
        generate(capsys, tiny_ctc.data, pretrained)


def test_a_model_of_a_diverged_run_is_refused(tiny_ctc):
    model = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(model.bias, float("nan"))
    with pytest.raises(ValueError, match="--path: parameter 'bias' has NaN .* take an earlier checkpoint"):
        make_task(tiny_ctc.data).build_generator([model], SimpleNamespace(beam=1))


def test_bad_audio_met_while_decoding_is_named(capsys, tiny_ctc, tmp_path):
    data = tiny_ctc.copy_split(tmp_path / "data", 5)
    lines = (data / "test.tsv").read_text().splitlines()
    lines[2] = lines[2].split("\t")[0] + "\t8999"
    (data / "test.tsv").write_text("\n".join(lines) + "\n")
    with pytest.raises(
        ValueError, match=r"test\.tsv:3: .*test1\.wav: holds \d+ samples, the manifest says 8999; prepare"
    ):
        generate(capsys, data, tiny_ctc)


def test_an_operating_point_that_the_model_was_not_trained_with_is_refused(capsys, stochastic_ctc):
    options = ("--labels", "spm", "--model-overrides", "{'operating_point': 's9q1k1'}")
    with pytest.raises(ValueError, match=r"'s9q1k1': the model was not trained with squeeze factor 9; .* \[1, 2\]"):
        generate(capsys, stochastic_ctc.data, stochastic_ctc, *options)


def test_a_malformed_dictionary_is_named(capsys, tiny_ctc, tmp_path):
    data = tiny_ctc.copy_split(tmp_path / "data", 2)
    (data / "dict.ltr.txt").write_text("A\n")
    with pytest.raises(ValueError, match=r"dict\.ltr\.txt:1: found 'A'; expected 'symbol count'"):
        generate(capsys, data, tiny_ctc)


@pytest.mark.parametrize(
    "options, message",
    [
        (("--nbest", "6"), "--nbest is 6; expected 1 to 5"),
        (("--sampling",), "does not sample"),
        (("--print-alignment", "soft"), "hard alignments only"),
        (("--prefix-size", "2"), "neither --prefix-size"),
    ],
)
def test_what_ctc_decoding_does_not_do_is_refused(capsys, tiny_ctc, options, message):
    if options == ("--sampling",):
        options = ("--sampling", "--beam", "1")
    with pytest.raises(ValueError, match=message):
        generate(capsys, tiny_ctc.data, tiny_ctc, *options)


class PeakyModel(torch.nn.Module):
    """Says at each frame what `paths` (one row an utterance) tell it, almost certainly."""

    def __init__(self, paths, symbols, lengths):
        super().__init__()
        self.logits = 20.0 * torch.nn.functional.one_hot(torch.tensor(paths), symbols).float()
        self.padding_mask = torch.arange(len(paths[0]))[None] >= torch.tensor(lengths)[:, None]

    def forward(self, **unused):
        return {"encoder_out": self.logits.transpose(0, 1), "padding_mask": self.padding_mask}

    def get_normalized_probs(self, net_output, log_probs):
        assert log_probs
        return net_output["encoder_out"].log_softmax(-1)


@pytest.mark.parametrize("beam", [1, 5])
def test_repetitions_merge_blanks_go_and_padding_is_not_read(beam):
    from fairseq_w2v2_light.tasks.audio_ctc import CtcGenerator

    model = PeakyModel([[4, 4, 0, 4, 5, 5], [0, 5, 0, 6, 6, 6]], symbols=7, lengths=[6, 3])
    generator = CtcGenerator(blank=0, pad=1, eos=2, beam=beam)
    hypotheses = generator.generate([model], {"net_input": {"source": None}})
    assert [found[0]["tokens"].tolist() for found in hypotheses] == [[4, 4, 5], [5]]
    assert [found[0]["timesteps"] for found in hypotheses] == [[0, 3, 4], [1]]
    assert hypotheses[0][0]["score"] == pytest.approx(0.0, abs=1e-4)


def test_ensembles_are_refused():
    from fairseq_w2v2_light.tasks.audio_ctc import CtcGenerator

    with pytest.raises(ValueError, match="one model at a time; found 2"):
        CtcGenerator(blank=0, pad=1, eos=2).generate([None, None], {"net_input": {}})


@pytest.mark.parametrize("count", range(1, 10))
def test_every_utterance_of_every_set_size_is_decoded(tiny_ctc, tmp_path, count):
    from fairseq import checkpoint_utils

    from fairseq_w2v2_light.tasks.audio_ctc import CtcGenerator

    task = make_task(tiny_ctc.copy_split(tmp_path / "data", count))
    models, saved = checkpoint_utils.load_model_ensemble([str(tiny_ctc.checkpoint)], task=task)
    task.load_dataset("test", task_cfg=saved.task)
    iterator = task.get_batch_iterator(task.dataset("test"), max_tokens=30000, required_batch_size_multiple=8)
    generator = CtcGenerator(blank=0, pad=1, eos=2)
    decoded = {}
    for batch in iterator.next_epoch_itr(shuffle=False):
        hypotheses = task.inference_step(generator, models, batch)
        decoded.update(zip(batch["id"].tolist(), hypotheses))
    assert sorted(decoded) == list(range(count))
    assert all(len(nbest) == 1 for nbest in decoded.values())


def test_padding_and_end_of_sentence_are_never_decoded():
    from fairseq_w2v2_light.tasks.audio_ctc import CtcGenerator

    model = PeakyModel([[1, 2, 4]], symbols=5, lengths=[3])
    model.logits[0, :2, 3] = 10.0
    (hypothesis,) = CtcGenerator(blank=0, pad=1, eos=2).generate([model], {"net_input": {}})[0]
    assert hypothesis["tokens"].tolist() == [3, 4]


def test_max_tokens_below_the_longest_utterance_is_raised(tiny_ctc, caplog):
    task = make_task(tiny_ctc.data)
    task.load_dataset("test")
    with caplog.at_level(logging.WARNING):
        iterator = task.get_batch_iterator(task.dataset("test"), max_tokens=500)
    assert sum(len(batch["id"]) for batch in iterator.next_epoch_itr(shuffle=False)) == 9
    assert "raising max_tokens from 500" in caplog.text


def test_the_audio_finetuning_keys_are_kept():
    from fairseq.tasks.audio_finetuning import AudioFinetuningConfig

    from fairseq_w2v2_light.tasks.audio_ctc import AudioCtcConfig

    inherited = {"eval_wer", "eval_wer_config", "eval_wer_post_process", "autoregressive", "normalize"}
    assert inherited <= set(AudioFinetuningConfig.__dataclass_fields__) <= set(AudioCtcConfig.__dataclass_fields__)


def test_importing_the_tasks_twice_is_harmless():
    from fairseq.tasks import TASK_REGISTRY, import_tasks

    import_tasks(str(user_dir() / "tasks"), "fairseq_w2v2_light.tasks")
    assert TASK_REGISTRY["audio_ctc"].__name__ == "AudioCtcTask"
