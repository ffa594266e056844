"""python -m megarl.simulate: ranks to simulate as JSON on standard input, one a line, what each recorded as one line of
JSON on standard output. The command line starts it (`megarl plan --trace`), and so do tests.

A request: {"keys": ["model.path=...", ...], "world": N, "rank": R}, and where wanted "packs" and "minibatches"; with
"recompute" it asks for what recompute saves (recompute.py) in place of a step.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from dataclasses import asdict

from megarl.errors import UserError
from megarl.simulate.shim import load_shim


def main() -> int:
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    try:
        load_shim()
    except UserError as error:
        print(json.dumps({"refused": str(error)}), file=out)
        return 2
    from megarl.simulate.cuda import install

    install()
    from megarl.config import load_config
    from megarl.simulate.figures import figures
    from megarl.simulate.recompute import trace_recompute
    from megarl.simulate.step import simulate

    for line in sys.stdin:
        request = json.loads(line)
        config = load_config(request.get("config"), request["keys"])
        try:
            if request.get("recompute"):
                found = asdict(trace_recompute(config, request["world"], request["rank"]))
            else:
                counts = {key: request[key] for key in ("packs", "minibatches") if key in request}
                found = figures(simulate(config, request["world"], request["rank"], **counts))
        except Exception as error:
            traceback.print_exc(limit=-8)
            notes = getattr(error, "__notes__", [])
            found = {"failed": " ".join([f"{type(error).__name__}: {error}", *notes])}
        print(json.dumps(found), file=out, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
