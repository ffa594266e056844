"""What hadolint (tools/test.sh) cannot know: that the Dockerfile's pins
are setup.py's, and that nothing floats or runs as root.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_image_is_pinned_as_setup_is_and_does_not_run_as_root() -> None:
    text, setup = (ROOT / "Dockerfile").read_text(), (ROOT / "setup.py").read_text()
    [image] = re.findall(r"^FROM (\S+)$", text, re.M)
    assert re.fullmatch(r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3", image)
    pins = re.findall(r"([\w.-]+)==([\w.]+)", text)
    assert {name for name, _ in pins} == {"megatron-core", "nvidia-dali-cuda130", "torch", "vllm"}
    for name, version in pins:
        assert f'"{name}=={version}"' in setup, f"{name}=={version} is not what setup.py pins"
    assert re.findall(r"^USER (.*)$", text, re.M)[-1] == "10001"
    assert re.search(r"^HEALTHCHECK .*megarl", text, re.M)
    copied = [name for source in re.findall(r"^COPY (.*) \S+$", text, re.M) for name in source.split()]
    assert all((ROOT / name).exists() for name in copied), copied
    commands = set(re.findall(r"\b(checkpoints_conversion|examples|tools|megarl)/\w", (ROOT / "README.md").read_text()))
    assert commands <= set(copied), "the README names files of a folder that the image lacks"
