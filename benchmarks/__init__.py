"""Speed and science measurements; see README.md beside this file."""

import os

# Read when torch is imported. Threads that wait actively measure what else the machine does, not the program.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
