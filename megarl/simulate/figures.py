"""What a simulated rank recorded, as figures that JSON can hold."""

from __future__ import annotations

from typing import Any

from megarl.simulate.ledger import Ledger
from megarl.simulate.step import Simulated

POINTS = 400  # of the curve
LARGEST = 10


def figures(found: Simulated) -> dict[str, Any]:
    """Bytes and counts. `waits` and `sent` are of the whole batch: `minibatches` times `packs` packs."""
    ledger = found.ledger
    return {
        "rank": found.rank,
        "world": found.world,
        "packs": found.packs,
        "minibatches": found.minibatches,
        "moe_layers": found.moe_layers,
        "seconds": found.seconds,
        "cpu_seconds": found.cpu_seconds,
        "peaks": {
            phase: {"bytes": peak.bytes, "lines": [[str(line), size] for line, size in peak.lines[:LARGEST]]}
            for phase, peak in ledger.peaks().items()
        },
        "flops": dict(ledger.flops),
        "curve": _thinned(ledger),
        "waits": [[w.phase, w.what, str(w.line), w.line.place, n] for w, n in ledger.waits.most_common()],
        "copies": [[w.phase, w.what, str(w.line), w.line.place, n] for w, n in ledger.copies.most_common()],
        "unknown": [[w.phase, w.what, str(w.line), w.line.place, n] for w, n in ledger.unknown.most_common()],
        "sent": [
            [s.phase, s.group, list(s.ranks), s.kind, s.line.place, ledger.calls[s], size]
            for s, size in ledger.sent.most_common()
        ],
    }


def _thinned(ledger: Ledger) -> list[list[Any]]:
    """[phase, events since the start, bytes]: of each stretch of events the highest point."""
    points = ledger.curve()
    each = max(1, len(points) // POINTS)
    thinned: list[list[Any]] = []
    for i in range(0, len(points), each):
        at = max(range(i, min(i + each, len(points))), key=lambda n: points[n][1])
        thinned.append([points[at][0], at, points[at][1]])
    return thinned
