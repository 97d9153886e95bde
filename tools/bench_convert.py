"""Benchmark of checkpoint conversion against cp: `trd bench convert` with the same flags."""

import sys

from trd_megatron.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["bench", "convert"]
    main()
