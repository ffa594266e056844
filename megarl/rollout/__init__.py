"""The trainer's side of rollouts: client, registry, roll call, fleet, sync leader, wire format. Never imports vllm."""

import os

os.environ.setdefault(
    "TORCH_CPP_LOG_LEVEL", "ERROR"
)  # before torch is imported: c10d prints C++ stack traces when a store goes away
