"""The elastic run: cluster, loop, checkpoints, ledger, validation.

In: a config, cases and a run folder. Out: the run folder, filled.
"""
