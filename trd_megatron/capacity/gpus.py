"""What the planner knows of GPUs: NVIDIA's data sheets, and how much of that work gets: assumptions, nothing was measured."""

from dataclasses import dataclass

from trd_megatron.errors import UserError
from trd_megatron.learner.flops import PEAKS

# Shares of a peak that are reached. Assumptions, from what is commonly reported of Megatron and SGLang on such GPUs.
TRAINING = 0.40  # of FLOP/s, by all that is computed, recomputation included; sequences of some thousand tokens
PREFILL = 0.50  # of FLOP/s
DECODE_BANDWIDTH = 0.60  # of memory bandwidth, reading weights and keys and values
DECODE_FLOPS = 0.50  # of FLOP/s, in large batches
LINKS = 0.70  # of NVLink's and the network's bandwidth; nothing is assumed to overlap
KERNELS_S = 3e-3  # of one decoding step besides reading and multiplying
REDUCE_S = 15e-6  # latency of one all-reduce inside a node


@dataclass(frozen=True)
class GPU:
    """memory: bytes that a process can have. Bytes/s: bandwidth of it, link of NVLink one way, network of its share of the node's."""

    name: str
    memory: float
    bandwidth: float
    link: float
    network: float

    def flops(self, dtype: str) -> float:
        """Dense FLOP/s. Raises UserError for a type that the GPU has no tensor cores for."""
        peaks = PEAKS[self.name]
        if dtype not in peaks:
            raise UserError(f"{self.name} does not multiply in {dtype}: set learner.{dtype}=none, or another cluster.gpu")
        return peaks[dtype] * 1e12


GPUS = {
    "A100-40GB": GPU("NVIDIA A100-SXM4-40GB", 39.4 * 2**30, 1.555e12, 300e9, 25e9),
    "A100-80GB": GPU("NVIDIA A100-SXM4-80GB", 79.2 * 2**30, 2.039e12, 300e9, 25e9),
    "H100": GPU("NVIDIA H100 80GB HBM3", 79.2 * 2**30, 3.35e12, 450e9, 50e9),
    "H200": GPU("NVIDIA H200", 139.8 * 2**30, 4.8e12, 450e9, 50e9),
    "B200": GPU("NVIDIA B200", 178.4 * 2**30, 7.7e12, 900e9, 50e9),
}
