"""What `scripts/gpu_check` and `scripts/bench step` measure: importable where Ray is not installed."""

from scripts.gpu_parts import without_ray

without_ray.stand_in()
