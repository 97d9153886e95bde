"""Checkpoint conversion without installing a command: the same as `trd convert`. See docs/checkpoints.md."""

import sys

from trd_megatron.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["convert"]
    main()
