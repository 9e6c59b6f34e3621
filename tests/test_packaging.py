"""What `pip install` gives: a source archive and a wheel made from it hold everything, and the wheel works alone."""

import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fairseq_w2v2_light import paths

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fairseq_w2v2_light"

pytest.importorskip("wheel", reason="making a wheel without build isolation needs the wheel package")


def run(*command, **options):
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300, **options)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel made from a source archive, made from a copy: building in the checkout would leave build/ there."""
    folder = tmp_path_factory.mktemp("packaging")
    source = folder / "source"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("fairseq_w2v2_light", "config", "requirements"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    build = "from setuptools import build_meta; print(build_meta.build_sdist('../sdist'))"
    archive = folder / "sdist" / run(sys.executable, "-c", build, cwd=source).split()[-1]
    options = ["--no-deps", "--no-build-isolation", "--no-index", "-q"]
    run(sys.executable, "-m", "pip", "wheel", *options, "-w", folder / "wheel", archive)
    (made,) = (folder / "wheel").glob("*.whl")
    return made


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def w2v2_light(site, *arguments):
    """The console command of the unpacked wheel, far from the checkout."""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    return run(sys.executable, "-m", "fairseq_w2v2_light.cli", *arguments, env=environment, cwd=site.parent).strip()


def test_the_wheel_holds_every_module(unpacked):
    for module in PACKAGE.rglob("*.py"):
        assert (unpacked / module.relative_to(ROOT)).is_file(), f"{module.relative_to(ROOT)} is not in the wheel"


def test_the_wheel_holds_every_recipe(unpacked):
    recipes = [path.relative_to(ROOT / "config") for path in (ROOT / "config").rglob("*.yaml")]
    packed = unpacked / "fairseq_w2v2_light" / "config"
    assert recipes and sorted(recipes) == sorted(path.relative_to(packed) for path in packed.rglob("*.yaml"))


def test_the_wheel_holds_nothing_else(unpacked):
    assert {path.name.split("-")[0] for path in unpacked.iterdir()} == {"fairseq_w2v2_light"}


def test_the_console_command_is_declared(unpacked):
    (entry_points,) = unpacked.glob("*.dist-info/entry_points.txt")
    parser = configparser.ConfigParser()
    parser.read(entry_points)
    assert dict(parser["console_scripts"]) == {"w2v2-light": "fairseq_w2v2_light.cli.main:main"}


def test_each_python_gets_its_fairseq(unpacked):
    (metadata,) = unpacked.glob("*.dist-info/METADATA")
    lines = [line.replace("'", '"') for line in metadata.read_text(encoding="utf-8").splitlines()]
    required = [line.replace(" ;", ";") for line in lines if line.startswith("Requires-Dist: fairseq")]
    assert sorted(required) == [
        'Requires-Dist: fairseq-fixed==0.12.3.1; python_version >= "3.11"',
        'Requires-Dist: fairseq==0.12.2; python_version < "3.11"',
    ]


def test_user_dir_of_an_installed_wheel(unpacked):
    assert Path(w2v2_light(unpacked, "user-dir")) == unpacked / "fairseq_w2v2_light"


def test_config_dir_of_an_installed_wheel(unpacked):
    assert Path(w2v2_light(unpacked, "config-dir")) == unpacked / "fairseq_w2v2_light" / "config"


def test_config_dir_of_a_checkout():
    assert paths.config_dir() == ROOT / "config"


def test_missing_recipes_are_reported(monkeypatch, tmp_path):
    (tmp_path / "config").mkdir()  # somebody else's: there is no setup.py beside it
    monkeypatch.setattr(paths, "_PACKAGE", tmp_path / "fairseq_w2v2_light")
    with pytest.raises(FileNotFoundError, match="no recipes found: expected .*fairseq_w2v2_light/config"):
        paths.config_dir()
