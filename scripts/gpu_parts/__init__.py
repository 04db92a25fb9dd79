"""What `scripts/gpu_check` and `scripts/bench step` measure; needs no Ray."""
