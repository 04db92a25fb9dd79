"""What `scripts/bench` runs, how it counts: a meter of process trees, our routes through Ray, other libraries' loaders.

In: a folder of generated cases. Out: per pipeline CPU seconds of all its processes, wall time, memory, bytes on disk.
"""
