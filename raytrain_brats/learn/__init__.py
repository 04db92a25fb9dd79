"""The learning side: networks, losses, augmentation, inference, metrics, all from MONAI where it has them.

In: config and tensors. Out: tensors and scores. Knows neither Ray nor the data layer.
"""

import sys
from typing import Any

# `import monai` loads all of MONAI. What only its plots, data sets and ultrasound transforms ask for, and do without
# where it is not installed, is hidden meanwhile: a third of the import's CPU time, in each worker.
_modules: dict[str, Any] = sys.modules
_hidden = {name for name in ("matplotlib", "scipy.signal", "scipy.stats") if name not in _modules}
_modules.update(dict.fromkeys(_hidden))
try:
    import monai  # noqa: F401
finally:
    for _name in _hidden:
        del _modules[_name]
