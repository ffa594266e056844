"""Names of the phases that a simulated rank goes through, in their order. Imports no torch."""

BUILD = ("model", "gradient buffers", "optimizer")
STEP = ("pi_old pass", "gradients", "optimizer step", "metrics")
