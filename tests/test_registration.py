"""Registration with fairseq, whichever is imported first."""

import os
import subprocess
import sys

import pytest

from fairseq_w2v2_light.paths import user_dir

CHECK = (
    "from fairseq.models import MODEL_REGISTRY; from fairseq.criterions import CRITERION_REGISTRY;"
    "from fairseq.tasks import TASK_REGISTRY;"
    "assert {'w2v2_light', 'stochastic_sew', 'light_ctc'} <= set(MODEL_REGISTRY), 'models';"
    "assert 'light_contrastive' in CRITERION_REGISTRY and {'audio_ctc', 'light_pretraining'} <= set(TASK_REGISTRY)"
)


def python(code):
    path = os.pathsep.join([str(user_dir().parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    "imports",
    [
        "import fairseq_w2v2_light, fairseq",
        "import fairseq, fairseq_w2v2_light",
        "import fairseq_w2v2_light.models",
        "import fairseq_w2v2_light.tasks",
        "import fairseq_w2v2_light.compat",
        "import fairseq_w2v2_light.study.configured",
        "import fairseq_w2v2_light.criterions",
        "import fairseq_w2v2_light; from fairseq.checkpoint_utils import load_checkpoint_to_cpu",
    ],
)
def test_everything_is_registered_in_any_order(imports):
    result = python(f"{imports}; {CHECK}")
    assert result.returncode == 0, result.stderr


def test_the_network_does_not_import_fairseq():
    code = "import sys, fairseq_w2v2_light.nn; from fairseq_w2v2_light.runtime import decode, streaming; "
    result = python(code + "assert not {'fairseq', 'hydra', 'omegaconf'} & set(sys.modules)")
    assert result.returncode == 0, result.stderr


def test_works_where_fairseq_is_missing():
    code = (
        "import importlib.abc, sys\n"
        "class Block(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('fairseq', 'hydra', 'omegaconf'): raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "import fairseq_w2v2_light.nn\n"
        "from fairseq_w2v2_light.runtime import decode, streaming\n"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr
