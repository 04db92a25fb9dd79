"""The learning side: networks, losses, augmentation, inference, metrics, all from MONAI where it has them.

In: config and tensors. Out: tensors and scores. Knows neither Ray nor the data layer.
"""
