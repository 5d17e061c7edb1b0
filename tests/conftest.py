"""For all tests: one thread per process, as the engine runs, so that tests beside each other do not fight for cores."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before anyone imports torch
