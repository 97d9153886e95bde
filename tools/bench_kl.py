"""Benchmark of the loss against other ways to compute it: `trd bench kl` with the same flags."""

import sys

from trd_megatron.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["bench", "kl"]
    main()
