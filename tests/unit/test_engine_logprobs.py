"""The engine's log-probabilities against transformers' on the same checkpoint, with and without renormalised gates."""

from __future__ import annotations

import json
import sys
import weakref
from pathlib import Path

import pytest
import torch

from megarl.config import load_config
from megarl.engine.batch import make_packs
from megarl.engine.build import build_engine
from megarl.engine.parallel import destroy_parallel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tools.tiny_model import make_tiny_model

LENGTHS = (23, 9, 40)


@pytest.mark.parametrize("experts", ["grouped", "sequential"])
@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_log_probabilities_equal_those_of_transformers(norm_topk_prob, experts, tmp_path):
    from transformers import AutoModelForCausalLM

    path = make_tiny_model(tmp_path / "model", layers=2)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "norm_topk_prob": norm_topk_prob}))
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(3, 20, (n,), generator=generator) for n in LENGTHS]

    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        logprobs = [reference(t[None]).logits[0, :-1].log_softmax(-1).gather(1, t[1:, None]).squeeze(1) for t in tokens]

    engine = build_engine(load_config(None, [f"model.path={path}", f"engine.experts={experts}"]))
    assert engine.model.config.moe_router_pre_softmax is not norm_topk_prob
    at = engine.model.parallel
    [pack] = make_packs([list(range(len(tokens)))], tokens, [1] * len(tokens), at.layout, at.coord)
    [(scored, _)] = engine.logprobs([pack], "record")
    for start, want in zip(pack.starts, logprobs):
        torch.testing.assert_close(scored[start : start + len(want)], want, rtol=1e-5, atol=1e-5)

    memory, head = [], engine._head  # the schedule holds what a pack gave until it has the next one's

    def counting(pack, logits, temperature):
        assert not any(earlier() for earlier in memory), "an earlier pack's logits are still there"
        memory.append(weakref.ref(logits.untyped_storage()))
        return head(pack, logits, temperature)

    engine._head = counting
    again = engine.logprobs([pack, pack, pack], "off")
    assert len(memory) == 3 and all(torch.equal(one.logprobs, scored) for one in again)
    destroy_parallel()
