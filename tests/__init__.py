"""By kind: `unit` (no Ray), `ray` (a real one), `faults` (things break), `rigs` (whole machines); `support` is shared.

A test imports the package and tests.support, and `scripts` only where it is about a script; never another test.
"""
