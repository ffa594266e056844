"""Which tensor comes when from a neighbouring stage: megatron-core's
schedules with megarl's messages, the stages as threads.

A pass of a chunk is replaced by one that checks what came and makes up what goes; packs differ in length.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.pipeline_parallel import p2p_communication, schedules
from megatron.core.process_groups_config import ProcessGroupCollection

from megarl.engine import pipeline
from megarl.engine.device import setup_device
from megarl.weights.map.layout import Layout

setup_device()
HIDDEN, WAIT_S = 2, 60.0
here = threading.local()  # of a stage: its group, its config, its messages, the passes it made


class Group:
    """In place of a process group."""

    def __init__(self, rank=0, size=1):
        self.rank, self.size = lambda: rank, lambda: size


def tensor_of(pack, chunk, stage, sign):
    return torch.full(here.messages.shapes[pack], sign * (1.0 + pack * 100 + chunk * 10 + stage))


def forward(function, data, model, count, came, store, config, *, current_microbatch, vp_stage=0, **_):
    (came,) = came if isinstance(came, list) else (came,)
    pack, stage, stages = current_microbatch, here.group.rank(), here.group.size()
    if (vp_stage, stage) == (0, 0):
        assert came is None
    else:
        assert torch.equal(came, tensor_of(pack, *((vp_stage, stage - 1) if stage else (vp_stage - 1, stages - 1)), 1))
    out = tensor_of(pack, vp_stage, stage, 1)
    out.of = pack, vp_stage
    here.passes.append(out.of)
    return (out if here.chunks > 1 else [out]), torch.zeros((), dtype=torch.int)


def backward(entered, out, came, *_):
    alone = not isinstance(out, list)
    out, came = (out, came) if alone else (out[0], came[0])
    (pack, chunk), stage, stages = out.of, here.group.rank(), here.group.size()
    if (chunk, stage) == (here.chunks - 1, stages - 1):
        assert came is None
    else:
        assert torch.equal(came, tensor_of(pack, *((chunk, stage + 1) if stage < stages - 1 else (chunk + 1, 0)), -1))
    here.passes.append(out.of)
    grad = None if (chunk, stage) == (0, 0) else tensor_of(pack, chunk, stage, -1)
    return grad if alone else [grad]


@pytest.fixture
def channels(monkeypatch):
    """Queues by (sender, receiver, group); what happens in a stage's thread is of that stage."""
    found, lock = {}, threading.Lock()

    def channel(*ends):
        with lock:
            return found.setdefault(ends, Queue())

    def isend(tensor, dst, group):
        channel(here.group.rank(), dst, isinstance(group, Group)).put(tensor.clone())
        return SimpleNamespace(wait=lambda: None)

    def irecv(tensor, src, group):
        sent = channel(src, here.group.rank(), isinstance(group, Group))
        return SimpleNamespace(wait=lambda: tensor.data.copy_(sent.get(timeout=WAIT_S)))

    replaced = {
        "isend": isend,
        "irecv": irecv,
        "get_backend": lambda group=None: "gloo",
        "get_global_rank": lambda group, rank: rank,
    }
    for name, function in replaced.items():
        monkeypatch.setattr(dist, name, function)
    monkeypatch.setattr(pipeline.parallel_state, "get_pipeline_model_parallel_group", lambda: here.group)
    for module in (schedules, p2p_communication):  # the second asks since 0.19
        monkeypatch.setattr(module, "is_pp_first_stage", lambda group: group.rank() == 0, raising=False)
        monkeypatch.setattr(module, "is_pp_last_stage", lambda group: group.rank() == group.size() - 1, raising=False)
    for name, function in {
        "forward_step": forward,
        "backward_step": backward,
        "get_model_config": lambda model: here.config,
    }.items():
        monkeypatch.setattr(schedules, name, function)
    monkeypatch.setattr(schedules, "get_model_type", lambda model: None)
    monkeypatch.setattr(schedules, "deallocate_output_tensor", lambda *args: None)
    return found


def run_stage(stage, stages, chunks, padded, forward_only):
    here.group, here.chunks, here.passes = Group(stage, stages), chunks, []
    own = dict(
        pipeline_dtype=torch.float32, variable_seq_lengths=True, batch_p2p_comm=False, barrier_with_L1_time=False
    )
    own |= dict(
        pipeline_model_parallel_size=stages, virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None
    )
    here.config = ModelParallelConfig(**own)
    here.config.__dict__.update(hidden_size=HIDDEN, mtp_standalone=False, fine_grained_activation_offloading=False)
    layout = Layout(pp=stages, vpp=chunks, world=stages)
    here.messages = pipeline.StageMessages(here.config, layout, layout.coord(stage), padded)
    schedule = "with_interleaving" if chunks > 1 else "without_interleaving"
    groups = ProcessGroupCollection(tp=Group(), cp=Group(), pp=here.group, embd=None, pos_embd=None, dp_cp=Group())
    getattr(schedules, f"forward_backward_pipelining_{schedule}")(
        forward_step_func=None,
        data_iterator=[None] * chunks,
        model=[torch.nn.Identity() for _ in range(chunks)],
        num_microbatches=len(padded),
        seq_length=max(padded),
        micro_batch_size=1,
        forward_only=forward_only,
        p2p_communicator=here.messages,
        pg_collection=groups,
    )
    assert next(here.messages.from_previous, None) is None, (
        "a tensor from the previous stage was awaited and not received"
    )
    assert forward_only or next(here.messages.from_next, None) is None
    return here.passes


@pytest.mark.parametrize("forward_only", [False, True])
@pytest.mark.parametrize(
    ("stages", "chunks", "packs"),
    [
        (2, 1, 1),
        (2, 1, 5),
        (4, 1, 2),
        (3, 1, 7),
        (2, 2, 2),
        (2, 2, 6),
        (2, 4, 8),
        (3, 3, 6),
        (4, 2, 4),
        (4, 3, 12),
        (5, 2, 10),
        (8, 4, 16),
    ],
)
def test_every_tensor_has_the_shape_that_was_foreseen(channels, stages, chunks, packs, forward_only):
    padded = [8 * (1 + (7 * number) % 13) + 64 * number for number in range(packs)]
    assert len(set(padded)) == packs
    with ThreadPoolExecutor(stages) as pool:
        runs = [pool.submit(run_stage, stage, stages, chunks, padded, forward_only) for stage in range(stages)]
        passes = [run.result() for run in runs]
    assert all(len(each) == packs * chunks * (1 if forward_only else 2) for each in passes)
    assert all(channel.empty() for channel in channels.values())
