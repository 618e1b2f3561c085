"""What a model's accuracy on a target may be, without labels: several estimates, never one."""
