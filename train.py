"""Train and evaluate a recipe: `python train.py --recipe NAME [--section.key value ...]`.

Also the entry for torchrun. The same as `accel train`.
"""

import sys

from accel.cli.rendering import run_guarded
from accel.cli.train import main

if __name__ == "__main__":
    sys.exit(run_guarded(main, sys.argv[1:]))
