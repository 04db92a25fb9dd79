"""Encode what a network answered on the grid of the scan. Runs in tasks of `predict`.

In: a label or probabilities, the header of the scan's first file.
Out: bytes of .nii.gz that any program overlays on the scan; always the same bytes.

The scan's geometry is copied field by field, also codes of 0 and transforms that contradict each other. Nothing else of
the header is copied.
"""

import deflate
import nibabel as nib
import numpy as np
import numpy.typing as npt

# The fields that define where voxels lie, by any of the standard's three methods
_PLACE = ("dim_info", "pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d",
          "qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z")  # fmt: skip


def label_file(label_xyz: npt.NDArray[np.uint8], header: bytes) -> bytes:
    """The .nii.gz of a label (x, y, z) on the grid of the scan whose `Volume.header` is given."""
    assert label_xyz.dtype == np.uint8, label_xyz.dtype
    return _on_grid(label_xyz, header, 1)


def probability_file(probabilities_rxyz: npt.NDArray[np.float32], header: bytes) -> bytes:
    """The .nii.gz of the regions' probabilities, (x, y, z, r) in the order WT, TC, ET, on the scan's grid.

    One byte a voxel and region, in steps of 1/255 by the header's slope, which any viewer applies: NIfTI-1 has no
    float16, and float32 packs to thirty times the size. A half is rounded down, so that what is above 0.5 stays above.
    """
    steps = np.ceil(probabilities_rxyz * np.float32(255) - np.float32(0.5)).clip(0, 255)
    return _on_grid(np.moveaxis(steps.astype(np.uint8), 0, 3), header, 1 / 255)


def _on_grid(values: npt.NDArray[np.uint8], header: bytes, slope: float) -> bytes:
    scan, ours = nib.Nifti1Header(header, check=False), nib.Nifti1Header(endianness="<")
    ours.set_data_shape(values.shape)
    ours.set_data_dtype(np.uint8)
    for field in _PLACE:
        ours[field] = scan[field]
    ours["scl_slope"], ours["scl_inter"], ours["vox_offset"], ours["magic"] = slope, 0, 352, b"n+1"
    return bytes(deflate.gzip_compress(ours.binaryblock + bytes(4) + values.tobytes("F"), 6))
