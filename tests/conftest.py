"""What holds for every test."""

import os

import torch

# Tiny tensors on cores that the processes of pytest-xdist share: threads that wait for each other cost more than they
# give. The variable is for whatever a test starts.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
