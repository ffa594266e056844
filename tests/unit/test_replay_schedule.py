"""Replay where forwards, backwards and recomputes alternate, and where one of them raises."""

from __future__ import annotations

import pytest
import torch

from megarl.engine.parallel import destroy_parallel
from megarl.replay.context import replay_schedule
from tests.unit.routers import (
    ROWS,
    every_kind,
    live_routes,
    make_input,
    make_router,
    map_of,
    random_routes,
    route,
    upstream,
)
from tools.one_rank import one_rank

# isort: split
from megatron.core.tensor_parallel import checkpoint


@pytest.fixture(scope="module", autouse=True)
def world():
    yield one_rank()
    destroy_parallel()


@every_kind
@pytest.mark.parametrize("order", ["1F1B", "all forwards first"])
def test_trap_05_several_forwards_before_the_first_backward(kind, order):
    """Recompute takes the routes first in, first out. The gradient is
    the one without recompute; a forward-only pass leaves nothing.
    """
    router, inputs = make_router(kind), [make_input(seed) for seed in range(4)]
    routes = [random_routes(seed) for seed in range(4)]
    steps = (
        ["f0", "f1", "b0", "f2", "b1", "f3", "b2", "b3"]
        if order == "1F1B"
        else ["f0", "f1", "f2", "f3", "b0", "b1", "b2", "b3"]
    )

    def gradient(recompute):
        router.zero_grad()
        outs = {}
        with replay_schedule([[router]]) as replay:
            for what, i in steps:
                i = int(i)
                if what == "b":
                    outs[i].backward(upstream())
                    continue
                x = inputs[i].clone().requires_grad_()
                with replay.forward(0, routes[i][:, None], replay=True):
                    outs[i] = checkpoint(lambda a: router(a)[0], False, x) if recompute else router(x)[0]
            left = [len(hook.used) for hook in replay._hooks[0]]
        return router.weight.grad.clone(), left

    want, _ = gradient(recompute=False)
    with torch.no_grad(), replay_schedule([[router]], False) as replay:  # forward only, with routes of its own
        for x in inputs:
            with replay.forward(0, random_routes(9)[:, None], replay=True):
                router(x)
            assert not replay._hooks[0][0].used  # 3.2 GB of them a rank for 235B parameters, which nobody reads
    got, left = gradient(recompute=True)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert left == [0]


@every_kind
def test_trap_06_recompute_sees_the_routes_that_were_used_live_rows_too(kind):
    """Between forward and recompute the router changes, so that routing
    anew would choose others: the used routes come back.
    """
    router, x, routes = make_router(kind), make_input(), random_routes()
    present = torch.arange(ROWS) % 3 > 0
    own = live_routes(router, x)
    used = torch.where(present[:, None], routes, own)
    maps = []

    def forward(a):
        gates, chosen = router(a)
        maps.append(chosen)
        return gates

    leaf = x.clone().requires_grad_()
    with replay_schedule([[router]]) as replay:
        with replay.forward(0, routes[:, None], present, replay=True) as record:
            out = checkpoint(forward, False, leaf)
        assert torch.equal(record.stacked()[0][:, 0].long(), own)
        with torch.no_grad():
            router.weight.copy_(make_router(kind, seed=7).weight)
        out.backward(upstream())
    assert len(maps) == 2 and torch.equal(maps[0], map_of(used)) and torch.equal(maps[1], maps[0])
    assert not torch.equal(map_of(live_routes(router, x)), maps[0])


@pytest.mark.parametrize("where", ["in a forward", "between forwards", "in a recompute"])
def test_nothing_is_left_after_an_exception(where):
    router, x, routes = make_router("softmax"), make_input(), random_routes()
    plain = router(x)[0].detach()
    runs = []

    def forward(a):
        runs.append(a)
        if where == "in a recompute" and len(runs) == 2:
            raise RuntimeError(where)
        return router(a)[0]

    with pytest.raises(RuntimeError), replay_schedule([[router]]) as replay:
        rows = ROWS - 1 if where == "in a forward" else ROWS  # one row of routes too few
        with replay.forward(0, routes[:rows, None], replay=True):
            out = checkpoint(forward, False, x.clone().requires_grad_())
        if where == "between forwards":
            raise RuntimeError(where)
        out.backward(upstream())
    assert len(runs) == (2 if where == "in a recompute" else 1)
    assert router.router_replay is None and torch.equal(router(x)[0], plain)
    assert torch.equal(route(router, x)[0], plain)
