"""Turnwise's library: everything that two stages need. See README.md for the map of every file."""

import os

__version__ = "0.1.0"

# Set before torch loads its OpenMP: small operations on a busy machine otherwise wait in long spins
# for a thread that has no core (a step of the demo's policy took 5.5 s in place of 0.2).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
