"""Messages between pipeline stages whose shapes nobody has to send:
every rank of a replica knows the lengths of all its packs.

megarl's answer to two things in megatron-core 0.16 (p2p_communication.py, _communicate_shapes).
With packs of different lengths a message with the shape and a device synchronisation precede
each tensor. And with PP = 2 under the interleaved schedule, where the next and the previous
stage are one rank, the shapes are paired wrongly. Held by tests/unit/test_pipeline.py (PP 2 to
8, VPP 1 to 4), by tests/parallel/ranks.py, interleaved_packs, and by the equality table.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron.core import parallel_state
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.process_groups_config import ProcessGroupCollection

from megarl.weights.map.layout import Coord, Layout


class StageMessages(P2PCommunicator):
    """For one run of a pipeline schedule. What comes from a neighbour
    comes in the order in which it computes: the schedule's table.
    """

    def __init__(self, config: Any, layout: Layout, coord: Coord, padded: list[int]) -> None:
        """`padded`: the padded length of each pack of this replica, in tokens, before CP and SP cut it."""
        super().__init__(parallel_state.get_pipeline_model_parallel_group(), config)
        cut = layout.cp * (layout.tp if config.sequence_parallel else 1)
        self.shapes = [[length // cut, 1, config.hidden_size] for length in padded]
        table = get_schedule_table(len(padded), layout.vpp, config.microbatch_group_size_per_vp_stage or layout.pp)
        self.from_previous = self._arrivals(table, never=layout.vpp - 1 if coord.pp == 0 else None)
        backward = [(number, layout.vpp - 1 - chunk) for number, chunk in table]
        self.from_next = self._arrivals(backward, never=0 if coord.pp == layout.pp - 1 else None)

    def _arrivals(self, computed: list[tuple[int, int]], never: int | None) -> Iterator[list[int]]:
        """Shapes in the order of a neighbour's (pack, chunk); chunk
        `never` is the model's end, whose result goes to no stage.
        """
        return (self.shapes[number] for number, chunk in computed if chunk != never)

    def _communicate_shapes(
        self, tensor_send_next: Any, tensor_send_prev: Any, recv_prev: bool, recv_next: bool
    ) -> tuple[list[int], list[int]]:
        nothing = [0, 0, 0]
        return next(self.from_previous) if recv_prev else nothing, next(self.from_next) if recv_next else nothing


def schedule_groups() -> ProcessGroupCollection:
    """The groups of megatron-core's own default; its schedules take them only together with a communicator."""
    groups = ProcessGroupCollection()
    groups.tp = parallel_state.get_tensor_model_parallel_group()
    groups.cp = parallel_state.get_context_parallel_group()
    groups.pp = parallel_state.get_pipeline_model_parallel_group()
    groups.embd = parallel_state.get_embedding_group(check_initialized=False)
    groups.pos_embd = parallel_state.get_position_embedding_group(check_initialized=False)
    groups.dp_cp = parallel_state.get_data_parallel_group(with_context_parallel=True, partial_data_parallel=False)
    # since 0.19: where experts have a bias, and of the default
    groups.tp_dp_cp = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    groups.dp = parallel_state.get_data_parallel_group(with_context_parallel=False, partial_data_parallel=False)
    return groups
