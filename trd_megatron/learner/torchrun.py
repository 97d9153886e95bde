"""torchrun that dies with the process that started it, and takes its ranks along."""

import sys

from torch.distributed.run import main

from trd_megatron.processes import die_with_parent

if __name__ == "__main__":
    die_with_parent()
    main(sys.argv[1:])
