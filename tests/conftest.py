"""Settings for the whole suite."""

import os

# Set before torch is imported: the test models are so small that threads cost more than they bring.
os.environ.setdefault("OMP_NUM_THREADS", "1")
