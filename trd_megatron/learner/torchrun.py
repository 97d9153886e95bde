"""torchrun that dies with the process that started it, and takes its ranks along."""

import sys

from trd_megatron.processes import die_with_parent

if __name__ == "__main__":
    die_with_parent()  # before torch is imported, which takes seconds
    from torch.distributed.run import main

    main(sys.argv[1:])
