"""nnU-Net beside raytrain_brats: what runs in nnU-Net's process, and what scores both."""
