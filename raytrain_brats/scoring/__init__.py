"""How near a prediction is to the truth: overlap, surfaces, lesions by a challenge's rules. Runs in tasks of `evaluate`
and `postprocess`, in workers and their scorers.

In: masks or label values of one case, its spacing. Out: numbers by region.
"""

import sys
from typing import Any

# `import monai` loads all of MONAI. Modules that only its plots, data sets and ultrasound transforms import, and which
# are optional for it, are hidden meanwhile: that saves a third of the import's CPU time in each worker.
_modules: dict[str, Any] = sys.modules
_hidden = {name for name in ("matplotlib", "scipy.signal", "scipy.stats") if name not in _modules}
_modules.update(dict.fromkeys(_hidden))
try:
    import monai  # noqa: F401
finally:
    for _name in _hidden:
        del _modules[_name]
