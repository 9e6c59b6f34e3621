"""The console command: dispatch, messages, exit codes."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from fairseq_w2v2_light import __version__
from fairseq_w2v2_light.cli import main as cli

ROOT = Path(cli.__file__).parents[2]


@pytest.fixture
def verb(monkeypatch):
    """Registers the verb `fake`; returns a function that gives it a body (and its PASS_THROUGH)."""

    def register(run, pass_through=False, add_arguments=lambda parser: None):
        module = types.ModuleType("fairseq_w2v2_light.cli.fake")
        module.run, module.add_arguments, module.PASS_THROUGH = run, add_arguments, pass_through
        monkeypatch.setitem(sys.modules, "fairseq_w2v2_light.cli.fake", module)
        monkeypatch.setitem(cli.VERBS, "fake", ("fake", "do nothing"))

    monkeypatch.delenv("W2V2_LIGHT_DEBUG", raising=False)
    return register


def raising(error):
    def run(args):
        raise error

    return run


def test_help_lists_every_verb_with_its_help_line(capsys):
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    for name, (_, purpose) in cli.VERBS.items():
        assert any(line.split() == [name, *purpose.split()] for line in printed.splitlines())


def test_no_verb_prints_the_help_on_stderr(capsys):
    assert cli.main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "usage: w2v2-light VERB" in captured.err


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"w2v2-light {__version__}\n"


@pytest.mark.parametrize("typed, meant", [("confg-dir", "config-dir"), ("user_dir", "user-dir"), ("Cost", "cost")])
def test_unknown_verb_suggests_the_closest(typed, meant, capsys):
    assert cli.main([typed]) == 2
    error = capsys.readouterr().err
    assert f"unknown verb '{typed}'; did you mean '{meant}'?" in error and "Traceback" not in error


def test_unknown_verb_unlike_any_lists_them_all(capsys):
    assert cli.main(["xyzzy"]) == 2
    error = capsys.readouterr().err
    assert "did you mean" not in error and ", ".join(cli.VERBS) in error


def test_the_verbs_exit_code_is_returned(verb):
    verb(lambda args: 7)
    assert cli.main(["fake"]) == 7


def test_arguments_reach_the_verb(verb):
    seen = []
    verb(
        lambda args: seen.append(args.number) or 0, add_arguments=lambda parser: parser.add_argument("number", type=int)
    )
    assert cli.main(["fake", "3"]) == 0
    assert seen == [3]


def test_pass_through_receives_everything_unparsed(verb):
    seen = []
    verb(lambda args: seen.append(args.rest) or 0, pass_through=True)
    assert cli.main(["fake", "--help", "a=b", "--x"]) == 0
    assert seen == [["--help", "a=b", "--x"]]


def test_unknown_option_exits_2(verb, capsys):
    verb(lambda args: 0)
    with pytest.raises(SystemExit) as stop:
        cli.main(["fake", "--nope"])
    assert stop.value.code == 2
    assert "w2v2-light fake: error: unrecognized arguments: --nope" in capsys.readouterr().err


def test_bad_value_is_one_line_without_traceback(verb, capsys):
    verb(raising(ValueError("manifest train.tsv, line 3: no tab")))
    assert cli.main(["fake"]) == 2
    assert capsys.readouterr().err == "w2v2-light fake: error: manifest train.tsv, line 3: no tab\n"


@pytest.mark.parametrize(
    "action, message",
    [
        (lambda folder: open(folder / "absent.tsv"), "absent.tsv: No such file or directory"),
        (lambda folder: open(folder), "Is a directory"),
        (lambda folder: (folder / "file").write_text("") or os.listdir(folder / "file"), "file: Not a directory"),
        (lambda folder: raising(FileNotFoundError("no checkpoint at x.pt"))(None), "error: no checkpoint at x.pt"),
    ],
)
def test_file_errors_name_the_file(action, message, verb, capsys, tmp_path):
    verb(lambda args: action(tmp_path))
    assert cli.main(["fake"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("w2v2-light fake: error: ") and message in error and "Errno" not in error


def test_missing_package_is_named(verb, capsys):
    verb(lambda args: __import__("a_package_that_is_not_there"))
    assert cli.main(["fake"]) == 2
    assert "needs the Python package 'a_package_that_is_not_there'" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(verb):
    verb(raising(AttributeError("ours")))
    with pytest.raises(AttributeError, match="ours"):
        cli.main(["fake"])


def test_a_missing_module_of_ours_keeps_its_traceback(verb, monkeypatch):
    monkeypatch.setitem(cli.VERBS, "fake", ("not_written", "do nothing"))
    with pytest.raises(ModuleNotFoundError, match="not_written"):
        cli.main(["fake"])


@pytest.mark.parametrize("value, shown", [("1", True), ("0", False), ("", False)])
def test_debug_shows_the_traceback(value, shown, verb, capsys, monkeypatch):
    monkeypatch.setenv("W2V2_LIGHT_DEBUG", value)
    verb(raising(ValueError("bad")))
    assert cli.main(["fake"]) == 2
    error = capsys.readouterr().err
    assert ("Traceback" in error) is shown and error.endswith("w2v2-light fake: error: bad\n")


def test_interrupt_exits_130(verb, capsys):
    verb(raising(KeyboardInterrupt()))
    assert cli.main(["fake"]) == 130
    assert "w2v2-light fake: interrupted" in capsys.readouterr().err


def test_a_closed_pipe_is_silent():
    code = (
        "import sys, types; from fairseq_w2v2_light.cli import main as cli;"
        "module = types.ModuleType('fairseq_w2v2_light.cli.fake'); module.PASS_THROUGH = True;"
        "module.run = lambda args: print('line\\n' * 100000) or 0;"
        "sys.modules[module.__name__] = module; cli.VERBS['fake'] = ('fake', 'print much');"
        "sys.exit(cli.main(['fake']))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True
    )
    process.stdout.readline()
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(timeout=120) == 141
    assert "Error" not in error and "Traceback" not in error


def test_user_dir_is_the_absolute_package(capsys):
    assert cli.main(["user-dir"]) == 0
    printed = Path(capsys.readouterr().out.strip())
    assert printed.is_absolute() and printed == ROOT / "fairseq_w2v2_light"


def test_config_dir_and_its_groups(capsys):
    assert cli.main(["config-dir"]) == 0
    root = Path(capsys.readouterr().out.strip())
    assert root.is_absolute() and (root / "pretraining").is_dir()
    assert cli.main(["config-dir", "pretraining"]) == 0
    assert Path(capsys.readouterr().out.strip()) == root / "pretraining"


@pytest.mark.parametrize("group", ["pretrainin", "..", "", "pretraining/."])
def test_config_dir_refuses_an_unknown_group(group, capsys):
    assert cli.main(["config-dir", group]) == 2
    error = capsys.readouterr().err
    assert f"no group {group!r}" in error and "pretraining" in error


def test_every_verb_has_a_module():
    for name, (module, purpose) in cli.VERBS.items():
        assert name == name.lower() and purpose and not purpose.endswith(".")
        assert (Path(cli.__file__).parent / f"{module}.py").is_file(), f"verb {name}: no cli/{module}.py"
