"""What tells people how a run goes, while it goes; `run/` imports nothing of it. Runs in the driver.

In: rows and events of the run folder, the cluster. Out: lines on the terminal, gauges for Prometheus, the cost.
"""
