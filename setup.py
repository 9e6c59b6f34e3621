"""Packaging of fairseq_w2v2_light: `pip install .`, `pip install -e .`, wheels and source archives."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKAGE = "fairseq_w2v2_light"


class BuildWithConfig(build_py):
    """Copies the top-level recipes into the package, so that an installed wheel has them too."""

    def run(self):
        super().run()
        if not getattr(self, "editable_mode", False):
            target = Path(self.build_lib) / PACKAGE / "config"
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(ROOT / "config", target, ignore=shutil.ignore_patterns("__pycache__", ".*"))


def version() -> str:
    text = (ROOT / PACKAGE / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE).group(1)


def long_description() -> str:
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.is_file() else ""


PLOT = ["matplotlib"]
SYNTH = ["espeakng-loader"]
EXPORT = ["safetensors"]
RESAMPLE = ["soxr"]
LM = ["flashlight-text"]
ONNX = ["onnx", "onnxruntime", "onnxscript"]

setup(
    name="fairseq-w2v2-light",
    version=version(),
    description="Small and fast wav2vec 2.0 models as a fairseq plugin",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    packages=find_packages(include=[PACKAGE, f"{PACKAGE}.*"]),
    cmdclass={"build_py": BuildWithConfig},
    include_package_data=False,
    python_requires=">=3.9",
    # The runtime alone needs no fairseq: see requirements/runtime.txt
    install_requires=[
        'fairseq-fixed==0.12.3.1; python_version >= "3.11"',
        'fairseq==0.12.2; python_version < "3.11"',
        'numpy; python_version >= "3.11"',
        'numpy<1.24; python_version < "3.11"',
        "torch>=2.1",
        "soundfile",
        "editdistance",
        "sentencepiece",
    ],
    extras_require={
        "plot": PLOT,
        "synth": SYNTH,
        "demo": SYNTH + PLOT,
        "export": EXPORT,
        "resample": RESAMPLE,
        "lm": LM,
        "onnx": ONNX,
        # transformers and onnx are what exports are compared with, where a new torch runs them
        "test": ["pytest", "ruff"] + SYNTH + PLOT + EXPORT + RESAMPLE + LM,
        "interchange": ONNX + ["transformers"],
    },
    entry_points={"console_scripts": [f"w2v2-light = {PACKAGE}.cli.main:main"]},
    classifiers=[
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Multimedia :: Sound/Audio :: Speech",
    ],
    zip_safe=False,
)
