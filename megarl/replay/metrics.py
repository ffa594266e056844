"""Routing agreement as sums over rows, one value a MoE layer: added up over packs and
ranks before anything is divided.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megarl.replay.routes import agreement


class RoutingSums:
    """Sums of one rank. Rows are those that predict a response token;
    `columns` are this rank's layers among all MoE layers.
    """

    def __init__(self, layers: int, columns: list[int]) -> None:
        self.columns = columns
        self.agree = torch.zeros(layers, dtype=torch.float64)
        self.rows = torch.zeros(layers, dtype=torch.float64)
        self.differs: list[Tensor] = []  # bool [rows] a pack: some layer of this rank differs
        self.worst_gap = 0.0  # of a row that disagrees, in score

    def add(self, live: Tensor, other: Tensor, rows: Tensor, gap: Tensor | None = None) -> None:
        """live, other: [rows of the pack here, layers here, K]; rows: bool, the ones that count."""
        same = live is other  # pi_old's routes, where it had no pass of its own
        agree = torch.ones(int(rows.sum()), live.shape[1]) if same else agreement(live[rows], other[rows])
        self.agree[self.columns] += agree.double().sum(0)
        self.rows[self.columns] += float(rows.sum())
        self.differs.append((agree < 1).any(1))
        if gap is not None and agree.numel():
            self.worst_gap = max(self.worst_gap, float((gap[rows] * (agree < 1)).max()))
