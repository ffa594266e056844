"""A held slice passes for the whole tensor where loaders cut inside it, and refuses everything else by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megarl.server.partial import PartialTensor, partial_tensor
from megarl.weights.rect import Rect

FULL = torch.arange(48.0).view(8, 6)
ROWS = partial_tensor(FULL[2:4], Rect((2, 0), (2, 6)), (8, 6), "w")
COLUMNS = partial_tensor(FULL[:, 3:], Rect((0, 3), (8, 3)), (8, 6), "w")

CUTS: list[tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]] = [
    (ROWS, lambda w: w.narrow(0, 2, 2)),
    (ROWS, lambda w: w[3:4]),
    (ROWS, lambda w: w.chunk(4)[1]),
    (ROWS, lambda w: w[3]),
    (ROWS, lambda w: w.unsqueeze(0).unbind()[0].narrow(0, 2, 2)),
    (ROWS, lambda w: w[:, 1:3].narrow(0, 2, 2)),
    (COLUMNS, lambda w: w.narrow(1, 3, 3)),
    (COLUMNS, lambda w: w.narrow(0, 1, 3).narrow(-1, 4, 2)),
    (COLUMNS, lambda w: w[1].narrow(0, 3, 2)),
    (COLUMNS, lambda w: w.unsqueeze(0)[0][:, 3:]),
]


@pytest.mark.parametrize(("partial", "cut"), CUTS)
def test_cuts_inside_what_is_held(partial: torch.Tensor, cut: Callable[[torch.Tensor], torch.Tensor]) -> None:
    assert partial.shape == FULL.shape and partial.ndim == 2 and partial.dtype == FULL.dtype
    found = cut(partial)
    assert not isinstance(found, PartialTensor) and torch.equal(found, cut(FULL))


@pytest.mark.parametrize(
    "use",
    [
        lambda: torch.empty(8, 6).copy_(COLUMNS),
        lambda: torch.empty(8, 3).copy_(COLUMNS.narrow(1, 0, 3)),
        lambda: torch.empty(8, 3).copy_(COLUMNS.narrow(1, 2, 3)),
        lambda: ROWS.unbind()[0],
        lambda: COLUMNS.clone(),
        lambda: COLUMNS.to(torch.bfloat16),
        lambda: ROWS + 1,
    ],
)
def test_anything_else_is_refused_by_name(use: Callable[[], torch.Tensor]) -> None:
    with pytest.raises(
        RuntimeError, match=r"PartialTensor\(w, \(\d, \d\) at \(\d, \d\) of \(\d, \d\)\): vLLM's loader"
    ):
        use()


def test_a_whole_tensor_is_itself() -> None:
    assert partial_tensor(FULL, Rect.whole((8, 6)), (8, 6), "w") is FULL
