"""`pip install .` gives ortholora, lora and lori, and nothing else."""

import importlib.metadata
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
MODULES = {"ortholora.py", "lora.py", "lori.py"}


def run(*command, **how):
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, **how)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The names in the sdist, and the wheel that was built from it: offline, with the setuptools that is here."""
    try:
        version = importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        version = "0"
    if int(version.split(".")[0]) < 77:
        pytest.skip(f"building needs setuptools 77 or newer, {version} is installed")
    folder = tmp_path_factory.mktemp("built")
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "runs", "results")
    shutil.copytree(ROOT, folder / "source", ignore=ignored)  # building leaves folders behind
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run("-c", code, folder, cwd=folder / "source")
    [sdist] = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    run("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, sdist)
    [wheel] = folder.glob("*.whl")
    return names, wheel


def test_the_wheel_holds_three_modules(built):
    with zipfile.ZipFile(built[1]) as archive:
        names = archive.namelist()
    assert {name for name in names if ".dist-info/" not in name} == MODULES
    assert any(name.endswith("LICENSE") for name in names)


def test_the_sdist_holds_what_it_takes_to_build(built):
    assert {name for name in built[0] if name.endswith(".py") and "/" not in name} - {"setup.py"} == MODULES
    assert {"pyproject.toml", "README.md", "LICENSE"} <= built[0]


def test_the_three_import_on_their_own(built, tmp_path):
    """Of all that there is, the interpreter sees the wheel and, for torch, the site-packages; no checkout, no .pth."""
    with zipfile.ZipFile(built[1]) as archive:
        archive.extractall(tmp_path)
    paths = f"{tmp_path}:{Path(torch.__file__).parents[1]}"
    code = "import ortholora, lora, lori; print(ortholora.__file__, lora.__file__, lori.__file__)"
    found = run("-S", "-c", code, cwd="/", env={"PYTHONPATH": paths}).split()
    assert [Path(name).parent for name in found] == [tmp_path] * 3


def test_metadata(built):
    with zipfile.ZipFile(built[1]) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        lines = archive.read(name).decode().splitlines()
    assert {"Name: ortholora", "License-Expression: Apache-2.0", "Requires-Dist: torch>=2.6"} <= set(lines)
    assert sum(line.startswith("Requires-Dist") for line in lines) == 1  # and no upper bound
