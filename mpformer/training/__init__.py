"""The trainer: optimisation, accumulation, checkpoints and probes."""
