"""Grouped experts against megatron-core's sequential ones: same parameters, same results, in a world of one rank."""

from __future__ import annotations

import pytest
import torch

from megarl.engine.parallel import destroy_parallel
from tools.one_rank import expert_layer, one_rank

# isort: split
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer.moe.experts import SequentialMLP

from megarl.engine import experts as module
from megarl.engine.experts import GroupedExperts, _stack, uneven_width

HIDDEN, WIDTH = 32, 24
COUNTS = {
    "uneven": [5, 1, 17, 2],
    "some experts without a token": [0, 9, 0, 4],
    "last expert without a token": [3, 3, 3, 0],
    "one expert takes all": [0, 0, 12, 0],
    "no token at all": [0, 0, 0, 0],
    "one expert": [7],
}


@pytest.fixture(scope="module", autouse=True)
def world():
    yield one_rank()
    destroy_parallel()


def make(kind, experts=4, dtype=torch.float32, **changes):
    changes |= dict(params_dtype=dtype, bf16=dtype == torch.bfloat16, moe_router_topk=1, moe_router_pre_softmax=True)
    return expert_layer(kind, experts, HIDDEN, WIDTH, **changes)


def make_pair(**kwargs):
    """Sequential and grouped experts of equal weights."""
    sequential, grouped = make(SequentialMLP, **kwargs), make(GroupedExperts, **kwargs)
    grouped.load_state_dict(sequential.state_dict())
    return sequential, grouped


def inputs(counts, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = sum(counts)
    x = torch.randn(rows, HIDDEN, generator=generator).to(dtype).requires_grad_()
    probs = torch.rand(rows, generator=generator).requires_grad_()
    return x, torch.tensor(counts), probs, torch.randn(rows, HIDDEN, generator=generator).to(dtype)


def run(experts, counts, forward=None, **kwargs):
    """Output, gradients of the input, of the probabilities and of every parameter."""
    x, tokens, probs, grad = inputs(counts, **kwargs)
    out, bias = (forward or experts)(x, tokens, probs)
    assert bias is None
    out.backward(grad)
    weights = {name: p.main_grad if hasattr(p, "main_grad") else p.grad for name, p in experts.named_parameters()}
    return {"out": out.detach(), "x": x.grad, "probs": probs.grad, **weights}


def close(got, want, relative=1e-6):
    assert got.keys() == want.keys()
    for name in want:
        scale = float(want[name].abs().max()) if want[name].numel() else 0.0
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=relative * max(scale, 1e-12), msg=name)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_grouped_experts_equal_sequential_ones(counts):
    sequential, grouped = make_pair(experts=len(counts))
    close(run(grouped, counts), run(sequential, counts))


@pytest.mark.parametrize("rows", [1, 4, 6, 100])
def test_blocks_of_experts_equal_all_at_once(rows, monkeypatch):
    monkeypatch.setattr(module, "CACHE_BYTES", rows * 2 * WIDTH * 4)
    sequential, grouped = make_pair()
    for counts in COUNTS.values():
        if len(counts) == 4:
            blocks = module._blocks(counts, rows)
            assert [e for block in blocks for e in range(4)[block]] == list(range(4))
            assert all(sum(counts[block]) <= rows or sum(c > 0 for c in counts[block]) == 1 for block in blocks)
            close(run(grouped, counts), run(sequential, counts))
        sequential.zero_grad(), grouped.zero_grad()


def test_probabilities_on_the_input():
    sequential, grouped = make_pair(moe_apply_probs_on_input=True)
    close(run(grouped, [4, 0, 3, 6]), run(sequential, [4, 0, 3, 6]))


def test_bfloat16():
    """Where the sequential experts round, the grouped ones do: in bf16
    between the products, in float32 at the probabilities.
    """
    sequential, grouped = make_pair(dtype=torch.bfloat16)
    got, want = (run(e, [40, 0, 30, 6], dtype=torch.bfloat16) for e in (grouped, sequential))
    assert {name: t.dtype for name, t in got.items()} == {name: t.dtype for name, t in want.items()}
    close({k: v.float() for k, v in got.items()}, {k: v.float() for k, v in want.items()}, 2**-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_megatrons_fused_activation(dtype, monkeypatch):
    """What a GPU runs compiled (engine/profile.py), here by torch's ordinary operators."""
    calls = []
    for name in ("weighted_swiglu", "weighted_swiglu_back"):
        function = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, name=name, function=function: calls.append(name) or function(*args)
        )
    sequential, grouped = make_pair(dtype=dtype)
    grouped.config.bias_activation_fusion = True
    got, want = (run(e, [40, 0, 30, 6], dtype=dtype) for e in (grouped, sequential))
    assert calls == ["weighted_swiglu", "weighted_swiglu", "weighted_swiglu_back"]
    assert {name: t.dtype for name, t in got.items()} == {name: t.dtype for name, t in want.items()}
    close(
        {k: v.float() for k, v in got.items()},
        {k: v.float() for k, v in want.items()},
        2**-7 if dtype == torch.bfloat16 else 1e-6,
    )


def test_activation_recompute():
    sequential, grouped = make_pair()

    def forward(x, tokens, probs):
        return checkpoint(lambda a, b: grouped(a, tokens, b)[0], False, x, probs), None

    close(run(grouped, [5, 1, 0, 8], forward), run(sequential, [5, 1, 0, 8]))


@pytest.mark.parametrize("distributed_optimizer", [False, True])
def test_gradients_accumulate_in_megatrons_buffers(distributed_optimizer):
    """Three micro-batches, one of them empty; under the distributed optimizer the weights lie in its buffer."""
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=distributed_optimizer)
    results = []
    for experts in make_pair():
        wrapped = DistributedDataParallel(experts.config, ddp, experts)
        for _ in range(2):  # the second time after a reset
            wrapped.zero_grad_buffer()
            for seed, counts in enumerate(([5, 1, 0, 8], [0, 0, 0, 0], [2, 2, 2, 2])):
                result = run(experts, counts, wrapped, seed=seed)
        assert all(p.grad is None for p in experts.parameters())
        results.append(result)
    close(results[1], results[0])


def test_frozen_weights_get_no_gradient():
    _, grouped = make_pair()
    grouped.requires_grad_(False)
    result = run(grouped, [5, 1, 0, 8])
    assert result["x"].abs().sum() > 0 and all(p.grad is None for p in grouped.parameters())


def test_parameters_and_checkpoint_are_those_of_the_sequential_experts():
    sequential, grouped = make_pair()
    shapes = lambda module: {name: (p.shape, getattr(p, "allreduce", None)) for name, p in module.named_parameters()}
    assert list(shapes(grouped).items()) == list(shapes(sequential).items())
    sharded = lambda module: [(name, t) for name, t in module.sharded_state_dict().items() if t.data is not None]
    keys = lambda module: {name: (t.key, t.data.shape, t.replica_id) for name, t in sharded(module)}
    assert keys(grouped) == keys(sequential)


def test_weights_are_stacked_without_a_copy_and_follow_updates():
    _, grouped = make_pair()
    weights = grouped._weights("linear_fc1")
    assert _stack(weights).data_ptr() == weights[0].data_ptr()
    with torch.no_grad():
        weights[2].fill_(7.0)
    assert torch.equal(_stack(weights), torch.stack(list(weights))) and _stack(weights)[2].eq(7).all()
    for order in ([3, 2, 1, 0], [0, 1, 3, 2], [0, 2]):  # elsewhere in memory: a copy, or a view of other spacing
        chosen = [weights[i] for i in order]
        assert torch.equal(_stack(chosen), torch.stack(chosen))
    weights[1].data = weights[1].data.clone()
    assert torch.equal(_stack(weights), torch.stack(list(weights)))


def test_what_grouped_experts_cannot_do_is_refused():
    with pytest.raises(ValueError, match="engine.experts=sequential"):
        make(GroupedExperts, activation_func_clamp_value=1.0)
    assert make(SequentialMLP, activation_func_clamp_value=1.0)


@pytest.mark.parametrize(
    ("hidden", "width", "itemsize", "says"),
    [
        (32, 24, 4, None),
        (32, 24, 2, None),
        (32, 22, 4, "the experts' width on a rank 22 is no multiple of 4"),
        (32, 20, 2, "the experts' width on a rank 20 is no multiple of 8"),
        (36, 24, 2, "hidden_size 36 is no multiple of 8"),
    ],
)
def test_fault_13_widths_that_grouped_mm_takes(hidden, width, itemsize, says):
    assert uneven_width(hidden, width, itemsize) == says
    make_these = lambda: expert_layer(  # noqa: E731
        GroupedExperts, 2, hidden, width, params_dtype={4: torch.float32, 2: torch.bfloat16}[itemsize]
    )
    if says:
        with pytest.raises(ValueError, match=says):
            make_these()
    else:
        x = torch.randn(5, hidden, dtype={4: torch.float32, 2: torch.bfloat16}[itemsize], requires_grad=True)
        make_these()(x, torch.tensor([2, 3]), torch.ones(5))[0].sum().backward()


@pytest.mark.parametrize("garbage", [True, False])
def test_an_expert_without_rows_has_no_gradient_whatever_the_kernel_leaves(garbage, monkeypatch):
    """Blackwell's kernel does not write that block of a weight gradient; here it holds NaN."""
    counts, original = COUNTS["some experts without a token"], torch.nn.functional.grouped_mm

    def grouped_mm(a, b, offs):
        out = original(a, b, offs=offs)
        if b.dim() == 2:
            out[offs.diff(prepend=offs.new_zeros(1)) == 0] = torch.nan
        return out

    sequential, grouped = make_pair()
    want = run(sequential, counts)
    monkeypatch.setattr(module.F, "grouped_mm", grouped_mm)
    monkeypatch.setattr(module, "leaves_garbage", lambda device: garbage)
    got = run(grouped, counts)
    if not garbage:
        assert any(value.isnan().any() for value in got.values())
        return
    close(got, want)


@pytest.mark.parametrize(("capability", "garbage"), [((9, 0), False), ((10, 0), True), ((12, 0), True)])
def test_which_gpus_leave_garbage(capability, garbage, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert module.leaves_garbage.__wrapped__(torch.device("cuda", 0)) == garbage
    assert not module.leaves_garbage(torch.device("cpu"))
