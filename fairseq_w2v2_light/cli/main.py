"""`w2v2-light VERB`: one thin module a verb, imported only when its verb is called.

A verb's module has `add_arguments(parser)` and `run(args) -> int`. One that sets `PASS_THROUGH = True` parses its
own command line: it has `run(args)` alone and finds every argument after the verb in `args.rest`.
"""

import argparse
import difflib
import importlib
import os
import sys
import traceback
from typing import List, Optional, Sequence

from fairseq_w2v2_light import __version__
from fairseq_w2v2_light.trust import TRUST_HELP, TRUST_OPTION, trusting_checkpoints

PROGRAM = "w2v2-light"

VERBS = {
    "user-dir": ("user_dir", "print the absolute path for fairseq's common.user_dir"),
    "config-dir": ("config_dir", "print the absolute path of the recipes, for fairseq's --config-dir"),
    "prepare": ("prepare", "make manifests, labels and a dictionary from audio and transcripts"),
    "convert": (
        "convert",
        "turn a fairseq checkpoint or a Hugging Face folder into a checkpoint of ours",
    ),
    "student": ("student", "make a small model with layers of a large one, to distil into"),
    "prune": ("prune", "remove what the gates of a checkpoint closed, and write a smaller one that computes the same"),
    "denominator": ("denominator", "build the n-gram graph that LF-MMI needs from training transcripts"),
    "cost": ("cost", "count parameters, multiply-accumulates, bytes and memory of a recipe or a model"),
    "stability": ("stability", "compare what layers make of their input, and the layers with each other"),
    "bench": ("bench", "time models on this machine, beside other implementations with the same weights"),
    "export": ("export", "write a fine-tuned checkpoint as a model folder, which needs no fairseq"),
    "quantize": ("quantize", "write a fine-tuned model as a model folder with int8 weights: smaller and faster"),
    "transcribe": ("transcribe", "turn recordings into text, JSON, subtitles or CTM, in batches"),
    "stream": ("stream", "transcribe a file or a microphone as the audio arrives, with a streaming checkpoint"),
    "evaluate": ("evaluate", "score a model, or texts, against references: WER, CER, and how fast it was"),
    "tradeoff": (
        "tradeoff",
        "measure accuracy, speed, MACs and size of models at their operating points: table, CSV, page",
    ),
    "lm": ("lm", "make an n-gram language model of a small text, as an ARPA file"),
    "tune-lm": ("tune_lm", "find the weights of a language model on a development set"),
    "infer": ("infer", "decode with fairseq's examples/speech_recognition/new/infer.py"),
}

# those that read checkpoints, and take --trust-checkpoint
CHECKPOINT_VERBS = (
    *("convert", "student", "prune", "cost", "stability", "bench", "tradeoff", "export", "stream", "infer"),
    *("transcribe", "evaluate", "quantize", "tune-lm"),
)

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Runs one verb and returns the exit code.

    Bad values and missing files (ValueError, OSError) and missing packages become one message on stderr and exit
    code 2; any other exception is a bug of ours and keeps its traceback. W2V2_LIGHT_DEBUG=1 shows the traceback
    of the former too.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        _silence_stdout()
        return EXIT_BROKEN_PIPE
    except KeyboardInterrupt:
        print(f"\n{_name(arguments)}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if _is_our_own_module(error):
            raise
        if os.environ.get("W2V2_LIGHT_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
        print(f"{_name(arguments)}: error: {_message(error)}", file=sys.stderr)
        return EXIT_USAGE


def _dispatch(arguments: List[str]) -> int:
    if not arguments:
        print(_help(), file=sys.stderr)
        return EXIT_USAGE
    verb, rest = arguments[0], arguments[1:]
    if verb in ("-h", "--help", "help"):
        print(_help())
        return 0
    if verb == "--version":
        print(f"{PROGRAM} {__version__}")
        return 0
    if verb not in VERBS:
        raise ValueError(_unknown(verb))
    if verb in CHECKPOINT_VERBS and TRUST_OPTION in rest:
        with trusting_checkpoints():
            return _run(verb, [argument for argument in rest if argument != TRUST_OPTION])
    return _run(verb, rest)


def _run(verb: str, rest: List[str]) -> int:
    module_name, purpose = VERBS[verb]
    module = importlib.import_module(f"fairseq_w2v2_light.cli.{module_name}")
    if getattr(module, "PASS_THROUGH", False):
        return module.run(argparse.Namespace(rest=rest))
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} {verb}", description=purpose[0].upper() + purpose[1:] + ".", allow_abbrev=False
    )
    module.add_arguments(parser)
    if verb in CHECKPOINT_VERBS:
        parser.add_argument(TRUST_OPTION, action="store_true", help=TRUST_HELP)
    return module.run(parser.parse_args(rest))


def _help() -> str:
    width = max(len(verb) for verb in VERBS)
    lines = [f"  {verb:<{width}}  {purpose}" for verb, (_, purpose) in VERBS.items()]
    return "\n".join(
        [
            f"usage: {PROGRAM} VERB [arguments]",
            "",
            "Small and fast wav2vec 2.0 models for fairseq.",
            "",
            "verbs:",
            *lines,
            "",
            f"`{PROGRAM} VERB --help` explains a verb; `{PROGRAM} --version` prints the version.",
        ]
    )


def _unknown(verb: str) -> str:
    close = difflib.get_close_matches(verb.lower().replace("_", "-"), VERBS, n=1)
    suggestion = f"; did you mean {close[0]!r}?" if close else ""
    return f"unknown verb {verb!r}{suggestion} (verbs: {', '.join(VERBS)})"


def _name(arguments: List[str]) -> str:
    return f"{PROGRAM} {arguments[0]}" if arguments and arguments[0] in VERBS else PROGRAM


def _message(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"this verb needs the Python package {error.name!r}, which is not installed here"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def _is_our_own_module(error: Exception) -> bool:
    """A missing module of this package is a broken installation or a bug, not the caller's mistake."""
    name = error.name if isinstance(error, ModuleNotFoundError) else None
    return bool(name) and name.split(".")[0] == "fairseq_w2v2_light"


def _silence_stdout() -> None:
    """Points stdout at /dev/null: the interpreter flushes it once more on exit and would complain again."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


if __name__ == "__main__":
    sys.exit(main())
