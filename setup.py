"""Packaging of trd_megatron. conf/ travels inside the package as trd_megatron/conf."""

from pathlib import Path

from setuptools import find_packages, setup

CONF = Path(__file__).parent / "conf"
conf_files = sorted(str(path.relative_to(CONF)) for path in CONF.rglob("*.yaml"))

setup(
    name="trd_megatron",
    version="0.1.0",
    description="Trajectory-Refined Distillation with a Megatron-Core learner",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=[*find_packages(include=["trd_megatron", "trd_megatron.*"]), "trd_megatron.conf"],
    package_dir={"trd_megatron.conf": "conf"},
    package_data={
        "trd_megatron.bench": ["*.json"],
        "trd_megatron.conf": conf_files,
        "trd_megatron.data": ["*.jsonl"],
        "trd_megatron.report": ["*.css", "*.j2"],
    },
    install_requires=[
        "aiohttp>=3.12",
        "hydra-core>=1.3.2",
        "jinja2>=3.1",
        "math-verify>=0.9",
        "matplotlib>=3.9",
        "megatron-core==0.16.1",
        "numpy>=2",
        "omegaconf>=2.3",
        "peft>=0.18",
        "psutil>=6",
        "pyarrow>=20",
        "pyyaml>=6",
        "rich>=13.9",
        "safetensors>=0.5",
        "tensorboard>=2.18",
        "torch>=2.13,<2.14",  # divergence/products.py calls a private operator of oneDNN's
        "transformers>=5.0",
        "typer>=0.15",
    ],
    extras_require={
        "quickstart": ["accelerate>=1.10", "gguf>=0.17", "reasoning-gym==0.1.25"],
        "gpu": ["transformer-engine[pytorch]>=2.1"],  # built for the CUDA that torch has; apex comes with NVIDIA's images
        "bench": ["liger-kernel==0.8.5", "trl==1.16.0"],  # the peers of `trd bench kl`
        "code": ["evalplus==0.3.1", "nvidia-livecodebench==26.3"],  # humaneval_plus, mbpp_plus; and the peer of livecodebench's test
        # Each in an environment of its own, see tools/launch/requirements.txt (make launch-env).
        "launch": ["leptonai<0.47", "nemo-run[kubeflow]==0.11.1"],
        "nemo": ["nemo-toolkit[core]==3.0.0"],
        "wandb": ["wandb>=0.31"],  # logging.wandb_project
        "dev": [
            "hypothesis>=6.150",
            "mypy>=1.18",
            "pytest>=8.4",
            "pytest-timeout>=2.4",
            "pytest-xdist>=3.8",
            "ruff>=0.14",
            # The version that torch 2.13.0's CUDA build pins.
            "triton==3.7.1; platform_system == 'Linux' and platform_machine == 'x86_64'",
        ],
    },
    entry_points={"console_scripts": ["trd = trd_megatron.cli:main"]},
)
