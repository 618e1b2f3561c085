"""Training: plans, steps, the loop, evaluation, run folders."""
