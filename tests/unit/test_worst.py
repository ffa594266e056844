"""Which tokens of a batch the engines differ on most, and that they come with the right neighbours."""

from __future__ import annotations

import torch

from megarl.engine.batch import make_packs
from megarl.observe.worst import AFTER, COUNT, logprobs_of, worst_of
from megarl.weights.map.layout import Layout


def test_the_worst_tokens_of_packs() -> None:
    layout = Layout(world=1)
    tokens = [torch.arange(10, 20), torch.arange(30, 60)]
    packs = make_packs([[0, 1], []], tokens, [3, 5], layout, layout.coord(0))
    for pack in packs:
        pack.passes.old_logprobs = pack.rollout.logprobs - 1
    (pack, _) = packs
    assert pack.passes.old_logprobs is not None
    pack.passes.old_logprobs[0] = -9.0  # predicts a prompt token: does not count
    pack.passes.old_logprobs[8] = -5.0  # the last token of the first response
    pack.passes.old_logprobs[9 + 20] = float("nan")  # a NaN is no difference that sorts; the loss refuses it elsewhere
    pack.passes.old_logprobs[9 + 10] = float("-inf")
    first, second, *rest = worst_of(packs)
    assert (first["token"], first["before"][-1], first["before"][0], first["after"]) == (
        [41],
        40,
        30,
        list(range(42, 42 + AFTER)),
    )
    assert (second["token"], second["before"], second["after"], second["trainer"]) == (
        [19],
        list(range(10, 19)),
        [],
        -5.0,
    )
    assert len(rest) == COUNT - 2 and all(row["difference"] == 1 for row in rest)


def test_the_worst_tokens_do_not_depend_on_the_packs() -> None:
    layout = Layout(world=1)
    tokens = [torch.arange(12), torch.arange(20, 32)]
    differences = [torch.arange(11) + 0.5, torch.arange(11) + 0.25]  # a little less in the second response
    for assigned in ([[0, 1]], [[0], [1]], [[1], [0]]):
        packs = make_packs(assigned, tokens, [1, 1], layout, layout.coord(0))
        for pack in packs:
            pack.passes.old_logprobs = torch.cat([differences[i] for i in pack.responses])
        assert [row["difference"] for row in worst_of(packs)] == [10.5, 10.25, 9.5, 9.25, 8.5, 8.25, 7.5, 7.25]


def test_the_log_probabilities_of_the_responses_that_are_shown() -> None:
    layout = Layout(world=1)
    tokens = [torch.arange(10, 20), torch.arange(30, 60), torch.arange(5)]
    packs = make_packs([[2, 0], [1]], tokens, [3, 5, 4], layout, layout.coord(0))
    for pack in packs:
        pack.passes.old_logprobs = -pack.labels.float()
    found = logprobs_of(packs, {0, 2})
    assert found == {0: [-float(token) for token in range(13, 20)], 2: [-4.0]}
    packs[0].passes.old_logprobs = None  # another stage
    assert logprobs_of(packs, {0, 2}) == {}
