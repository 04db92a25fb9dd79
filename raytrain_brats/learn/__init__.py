"""Networks, losses, augmentation, inference, from MONAI where it has them. Runs in workers and predict tasks.

In: config and tensors. Out: tensors. Imports neither Ray nor the data layer.
"""

import raytrain_brats.scoring  # noqa: F401 - it imports MONAI without what is dear
