"""The rollout process: a vLLM server, how it is supervised, and what receives weights
inside it. Only this folder imports vllm.
"""

import os

os.environ.setdefault(
    "TORCH_CPP_LOG_LEVEL", "ERROR"
)  # before torch is imported: c10d prints C++ stack traces when a store goes away
