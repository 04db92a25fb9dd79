"""The elastic run: driver, controller, workers, checkpoints, journal, validation. Each module says where it runs.

In: a config, cases and a run folder. Out: the run folder, filled. Runs in the driver, the controller and workers.
"""
