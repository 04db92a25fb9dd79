"""From files to patches: manifest, decode, preprocess, store, sampler, stream.

In: a case's .nii.gz files, or its object in a store. Out: patches at positions. Runs in data tasks.
"""
