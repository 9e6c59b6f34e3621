"""A program that runs a verb where fairseq, and what comes with it, cannot be imported."""

WITHOUT_FAIRSEQ = """
import sys
from importlib.machinery import ModuleSpec

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("fairseq", "hydra", "omegaconf", "torchaudio", "editdistance", "sentencepiece"):
            return ModuleSpec(name, self)  # torch looks for some of them, and does not import them

    def create_module(self, spec):
        raise ImportError(f"{spec.name} is blocked")

    def exec_module(self, module):
        pass

sys.meta_path.insert(0, Block())
from fairseq_w2v2_light.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
