"""Train and evaluate a recipe: `python train.py --recipe NAME [--section.key value ...]`.

Also the entry for torchrun. The same as `accel train`.
"""

import sys

from accel.cli.start import start

if __name__ == "__main__":
    sys.exit(start("train:main", sys.argv[1:]))
