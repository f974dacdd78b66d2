"""The command line."""

import os

# Read once, when torch loads OpenMP, hence here. By default idle OpenMP threads spin; beside
# decoding threads or another process on the same cores, steps then take several times longer.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
