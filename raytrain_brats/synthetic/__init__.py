"""Made data: phantoms drawn by a program, and further heads out of real ones. Runs in Ray's data tasks.

In: a seed; for further heads a decoded case. Out: cases, and the folders of phantoms.
"""
