"""A trained network in the forms that other programs take: ONNX, MONAI Bundle; and the card that describes it.

In: a run's config, weights and scores. Out: contents of files; `export.py` writes them.
"""
