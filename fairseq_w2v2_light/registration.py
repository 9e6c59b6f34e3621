"""Registers the plugin with fairseq as soon as a process imports fairseq, and never imports fairseq by itself.

So `import fairseq_w2v2_light` is quick and works without fairseq (the runtime, most verbs of the command line), and
the order in which a program imports the two does not matter.
"""

import importlib.abc
import importlib.util
import logging
import sys


def register() -> None:
    """Registers models, criterions and tasks; imports fairseq."""
    from . import compat, criterions, models, tasks  # noqa: F401


def register_with_fairseq() -> None:
    """Registers now if fairseq is imported, else right after it will be."""
    if "fairseq" in sys.modules:
        register()
    elif not any(isinstance(finder, _AfterFairseq) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterFairseq())


class _AfterFairseq(importlib.abc.MetaPathFinder):
    """Finds fairseq as Python would, and calls `register` when its import is done."""

    def find_spec(self, name, path=None, target=None):
        if name != "fairseq":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("fairseq")
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module):
                # fairseq advises everyone who imports it, on stderr, to install tensorboardX
                logging.getLogger("fairseq.tasks.text_to_speech").setLevel(logging.WARNING)
                execute(module)
                register()

            spec.loader.exec_module = execute_and_register
        return spec
