"""Names of the phases that a simulated rank goes through, in their order. Imports no torch."""

BUILD = ("model", "gradient buffers", "optimizer", "critic")
POLICY = ("pi_old pass", "gradients", "optimizer step")  # the first with the reference's pass
STEP = (*POLICY, "values", "critic gradients", "critic step", "metrics")
