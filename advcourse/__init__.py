"""Adversarial examples and robustness certificates: the package behind the executable course."""

__version__ = "0.1.0"


def setup(seed=0, threads=1):
    """Prepare a notebook: seed torch, set the number of threads, apply the plot style, return the device to use.

    One thread by default, in torch, NumPy and SciPy: two threads on a busy two-core machine cost ten times the time.
    """
    import os

    for library in ("OMP", "OPENBLAS", "MKL"):  # read when NumPy and SciPy load, so before they do
        os.environ.setdefault(f"{library}_NUM_THREADS", str(threads))
    import torch

    from advcourse.plot import use_style

    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    use_style()
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
