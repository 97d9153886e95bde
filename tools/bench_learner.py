"""Benchmark of the learner against a Hugging Face + PEFT loop: `trd bench learner` with the same flags."""

import sys

from trd_megatron.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["bench", "learner"]
    main()
