"""How long a rollout server may be silent. Imports nothing: refusals come before torch is imported."""

STALE_S = 15.0  # a worker that has not beaten for so long is taken for dead
ANSWER_S = 10.0  # a server that takes longer to say its version is left out of a step and of a sync
