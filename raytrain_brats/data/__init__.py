"""From files to patches: manifest, decode, preprocess, store, plan, stream.

In: NIfTI cases. Out: per-rank ordered patches. No torch here; only `stream` knows Ray.
"""
