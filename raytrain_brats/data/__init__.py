"""From files to patches: manifest, decode, preprocess, store, sampler, stream. Runs in data tasks.

In: a case's .nii.gz files, or its object in a store. Out: patches at positions.
"""
