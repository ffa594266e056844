"""The rollout side: vLLM servers, how they are started and found, and how trainers talk to them. Only this folder imports vllm."""

import os

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch is imported: c10d prints C++ stack traces when a store goes away
