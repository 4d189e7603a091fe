"""Package metadata; tool settings are in pyproject.toml, tested versions in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="adaptive-training",
    version="0.1.0",
    description="Train image classifiers that can stop early: any timm backbone, DeepSpeed, WebDataset, W&B",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["adaptive", "adaptive.*", "launcher", "launcher.*"]),
    install_requires=[
        "torch>=2.14",
        "torchvision>=0.29",
        "deepspeed>=0.19.8,<0.20",
        "ninja>=1.11",
        "timm>=1.0.31,<2",
        "webdataset>=1.0.2,<2",
        "wandb>=0.31,<1",
        "pydantic>=2.10,<3",
        "ruamel.yaml>=0.18,<1",
        "safetensors>=0.5",
        "numpy>=1.26",
        "pillow>=11",
        "matplotlib>=3.9",
        "rich>=13.9",
        "psutil>=6",
    ],
    extras_require={
        "digits": ["scikit-learn>=1.5"],
        "test": [
            "scikit-learn>=1.5",
            "pytest>=8.3",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.110",
            "openwandb>=0.5",
            "ruff>=0.14",
            "mypy>=1.13",
            "types-psutil",
        ],
        "dev": ["pre-commit>=4"],
    },
    entry_points={"console_scripts": ["adaptive = launcher.main:main"]},
)
