"""Elastic training of 3D brain-tumour segmentation on Ray.

In: BraTS or MSD Task01 cases as .nii.gz, on a local disk or on S3.
Out: a trained network, its scores, predictions and a report; see README.md.
"""

__version__ = "0.1.0"
