"""`python -m raytrain_brats.sagemaker STEP ...`: what the containers start.

In: as for `raytrain-brats sagemaker`.
Out: its exit code.
"""

import sys

from raytrain_brats.sagemaker import main

if __name__ == "__main__":
    sys.exit(main())
