"""The engine's log-probabilities against transformers' on the same checkpoint, with and without renormalised gates."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from unittest import mock

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
    destroy_parallel()


def test_the_output_layer_computes_the_rows_of_responses_alone(tmp_path):
    """Numbers and gradients are those of all rows; a pack without a response computes one row."""
    path = make_tiny_model(tmp_path / "model", layers=1)
    tokens = [3 + torch.arange(n) % 17 for n in LENGTHS]
    engine = build_engine(load_config(None, [f"model.path={path}"]))
    at = engine.model.parallel
    computed = []
    head = engine.model.bare[0].output_layer
    head.register_forward_hook(lambda layer, given, out: computed.append(out[0].shape[0]))

    [every] = make_packs([[0, 1, 2]], tokens, [1, 1, 1], at.layout, at.coord)
    responses, empty = make_packs([[0, 1, 2], []], tokens, [20, 9, 4], at.layout, at.coord)
    wanted = responses.mask.bool()
    with mock.patch.object(engine, "_computed", wraps=engine._computed) as looked_for:
        scores = engine.logprobs([every, responses, empty], "off")
    assert looked_for.call_count == 3
    assert computed == [69, 3 + 0 + 36, 1] and int(wanted.sum()) == 39
    for of_all, of_responses in zip(scores[0], scores[1]):
        torch.testing.assert_close(of_responses[wanted], of_all[wanted], rtol=1e-5, atol=1e-6)
        assert not of_responses[~wanted].any()

    gradients = []
    for pack in (every, responses):
        out = engine.model.chunks[0]
        engine._head_rows = engine._computed(pack)
        logits = out(pack.tokens[None], pack.positions[None], None, packed_seq_params=pack.sequences)
        logprobs, entropy = engine._head(pack, logits, 1.0)
        total = ((logprobs - 0.1 * entropy) * wanted).sum()
        gradients.append(torch.autograd.grad(total, [*engine.model.bare[0].parameters()], allow_unused=True))
    for one, other in zip(*gradients):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    destroy_parallel()
