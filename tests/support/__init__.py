"""What tests share: cases, proxies, simulated runs, machines and containers of rigs.

A test imports the package and what is here, and `scripts` only where it is about a script (test_layers.py).
"""

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The checkout."""
