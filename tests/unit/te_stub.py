"""A stand-in for Transformer Engine that holds parameters and computes
nothing but packed attention: for tests of names and arguments.

megatron-core's own wrappers (extensions/transformer_engine.py) are built on these classes, so the names and shapes of
parameters are theirs. What each real class registers:
transformer_engine/pytorch/module/{linear,layernorm_linear,grouped_linear}.py. What attention
takes, and of which shapes and dtypes: the docstring of forward in
pytorch/attention/dot_product_attention/dot_product_attention.py, arguments that release 2.11 has too.
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
    def __init__(
        self, in_features, out_features, *, bias=True, tp_size=1, parallel_mode=None, params_dtype=None, **kwargs
    ):
        super().__init__()
        rows = out_features // tp_size if parallel_mode == "column" else out_features
        columns = in_features // tp_size if parallel_mode == "row" else in_features
        self.weight = Parameter(torch.zeros(rows, columns, dtype=params_dtype))
        if bias:
            self.bias = Parameter(torch.zeros(rows, dtype=params_dtype))


class LayerNormLinear(Linear):
    def __init__(self, in_features, out_features, **kwargs):
        super().__init__(in_features, out_features, **kwargs)
        self.layer_norm_weight = Parameter(torch.zeros(in_features))


class GroupedLinear(_Module):
    def __init__(self, num_gemms, in_features, out_features, *, params_dtype=None, **kwargs):
        super().__init__()
        for i in range(num_gemms):
            weight = Parameter(torch.zeros(out_features, in_features, dtype=params_dtype))
            self.register_parameter(f"weight{i}", weight)


class RMSNorm(_Module):
    def __init__(self, normalized_shape=None, *, hidden_size=None, **kwargs):  # the second: the older name
        super().__init__()
        self.weight = Parameter(torch.zeros(normalized_shape or hidden_size))


class DotProductAttention(_Module):
    def forward(
        self,
        query_layer,
        key_layer,
        value_layer,
        attention_mask=None,
        qkv_format=None,
        cu_seqlens_q=None,
        cu_seqlens_kv=None,
        cu_seqlens_q_padded=None,
        cu_seqlens_kv_padded=None,
        max_seqlen_q=None,
        max_seqlen_kv=None,
        attn_mask_type=None,
        pad_between_seqs=None,
    ):
        """[t, heads, dim], groups of key and value heads -> [t, heads *
        dim]: causal attention inside each sequence of cu_seqlens.
        """
        assert attention_mask is None and qkv_format == "thd" and attn_mask_type == "padding_causal"
        padded = cu_seqlens_q_padded is not None or cu_seqlens_kv_padded is not None or pad_between_seqs
        assert not padded, "no padding between sequences"
        for cu_seqlens, longest, rows in (
            (cu_seqlens_q, max_seqlen_q, query_layer),
            (cu_seqlens_kv, max_seqlen_kv, key_layer),
        ):
            assert (
                rows.dim() == 3
                and cu_seqlens.dtype == torch.int32
                and cu_seqlens.dim() == 1
                and cu_seqlens.device == rows.device
            )
            assert type(longest) is int and longest == int(cu_seqlens.diff().max()) and int(cu_seqlens[-1]) == len(rows)
        self.seen = {"shape": tuple(query_layer.shape), "cu_seqlens": cu_seqlens_q}
        edges = cu_seqlens_q.tolist()
        outs = []
        for a, b in zip(edges, edges[1:]):
            q, k, v = (rows[a:b].transpose(0, 1) for rows in (query_layer, key_layer, value_layer))
            out = torch.nn.functional.scaled_dot_product_attention(
                q[None], k[None], v[None], is_causal=True, enable_gqa=True
            )
            outs.append(out[0].transpose(0, 1).flatten(1))
        return torch.cat(outs)


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
        return (
            importlib.machinery.ModuleSpec(name, self, is_package=True)
            if name.split(".")[0] == "transformer_engine"
            else None
        )

    def create_module(self, spec):
        return _Stub(spec.name)

    def exec_module(self, module):
        pass


def install() -> None:
    """Before anything imports megatron."""
    sys.meta_path.insert(0, _Finder())
    for name in (
        "transformer_engine",
        "transformer_engine.pytorch",
        "transformer_engine.common",
        "transformer_engine.common.recipe",
    ):
        importlib.import_module(name)
