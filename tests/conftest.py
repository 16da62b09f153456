"""One torch thread per process: two threads on a busy two-core machine cost ten times the time."""
import torch

torch.set_num_threads(1)
