"""A stand-in for Transformer Engine that holds parameters and computes nothing: for tests of names, never of results.

megatron-core's own wrappers (extensions/transformer_engine.py) are built on these classes, so the names and shapes of parameters are
theirs. What each real class registers: transformer_engine/pytorch/module/{linear,layernorm_linear,grouped_linear}.py.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from contextlib import nullcontext
from types import ModuleType

import torch
from torch.nn import Module, Parameter


class _Module(Module):
    def __init__(self, *args, **kwargs):
        super().__init__()


class Linear(_Module):
    def __init__(self, in_features, out_features, *, tp_size=1, parallel_mode=None, params_dtype=None, **kwargs):
        super().__init__()
        rows = out_features // tp_size if parallel_mode == "column" else out_features
        columns = in_features // tp_size if parallel_mode == "row" else in_features
        self.weight = Parameter(torch.zeros(rows, columns, dtype=params_dtype))


class LayerNormLinear(Linear):
    def __init__(self, in_features, out_features, **kwargs):
        super().__init__(in_features, out_features, **kwargs)
        self.layer_norm_weight = Parameter(torch.zeros(in_features))


class GroupedLinear(_Module):
    def __init__(self, num_gemms, in_features, out_features, *, params_dtype=None, **kwargs):
        super().__init__()
        for i in range(num_gemms):
            self.register_parameter(f"weight{i}", Parameter(torch.zeros(out_features, in_features, dtype=params_dtype)))


class RMSNorm(_Module):
    def __init__(self, hidden_size, **kwargs):
        super().__init__()
        self.weight = Parameter(torch.zeros(hidden_size))


class DotProductAttention(_Module):
    def forward(self, query, key, value, attention_mask, **kwargs):
        self.seen = {"shape": tuple(query.shape), **kwargs}
        return query.flatten(1)


def get_cpu_offload_context(*args, **kwargs):
    return nullcontext(), lambda x: x


class _Stub(ModuleType):
    __version__ = "2.11.0"
    __path__: list[str] = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        found = globals().get(name)
        value = found if callable(found) else _Stub(name) if name.islower() else type(name, (_Module,), {})
        setattr(self, name, value)
        return value


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "transformer_engine" else None

    def create_module(self, spec):
        return _Stub(spec.name)

    def exec_module(self, module):
        pass


def install() -> None:
    """Before anything imports megatron."""
    sys.meta_path.insert(0, _Finder())
    for name in ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.common", "transformer_engine.common.recipe"):
        importlib.import_module(name)
