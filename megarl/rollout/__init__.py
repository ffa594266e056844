"""The rollout side: vLLM servers, how they are started and found, and how trainers talk to them. Only this folder imports vllm."""
