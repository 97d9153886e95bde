"""Run while the learner image is built: python check_learner.py TORCH MEGATRON_CORE. Fails where the base is not what was expected.

Imports nothing that needs a GPU's driver.
"""

import sys
from importlib import metadata

import megatron.core
import torch

wanted_torch, wanted_megatron = sys.argv[1:]
# NVIDIA calls its builds 2.13.0a0+commit.nv26.06.
assert torch.__version__.startswith(wanted_torch), f"torch {torch.__version__}, not {wanted_torch}"
assert torch.version.cuda is not None, "torch has no CUDA"
assert not torch.__file__.startswith(sys.prefix), f"{torch.__file__} is not the base's torch"
assert megatron.core.__version__ == wanted_megatron, f"megatron-core {megatron.core.__version__}, not {wanted_megatron}"
for name in ("transformer_engine", "apex", "triton"):
    print(name, metadata.version(name))  # raises if the base lacks it
