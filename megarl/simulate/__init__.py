"""A training step on a simulated GPU: the real engine on tensors that have shapes and a device but no numbers.

`python -m megarl.simulate` runs one or more ranks, one after the other, in a process of its own: the C++ part must be
loaded before torch, and torch.cuda answers for a device that is not there until the process ends.
"""
