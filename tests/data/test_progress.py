from fairseq_w2v2_light.data import progress as module


def test_items_pass_and_lines_tell_how_far(monkeypatch, capsys):
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0.0)
    assert list(module.progress("abc", "reading", 3)) == ["a", "b", "c"]
    assert capsys.readouterr().err.splitlines() == ["reading: 1 of 3", "reading: 2 of 3", "reading: 3 of 3"]


def test_short_work_is_silent(capsys):
    assert list(module.progress(range(100), "reading")) == list(range(100))
    assert capsys.readouterr().err == ""
