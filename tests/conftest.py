"""Tests run side by side, a process a core. So torch gets one thread in each, and in all that they start: two
multi-threaded processes on the same cores are many times slower than two with a thread each."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
