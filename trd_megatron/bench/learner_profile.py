"""Where a step's time goes, from torch's profiler on the CPU: by part of the step and by operator."""

from collections.abc import Callable
from dataclasses import dataclass

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as torch_profile

STEP = "one step"
# The record_function ranges of learner/step.py and learner/train.py; none lies inside another.
PARTS = ("teacher forward", "student forward", "KL", "backward", "optimizer", "data")
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn::_linear_pointwise")


def is_product(operator: str) -> bool:
    return operator in PRODUCTS


def is_attention(operator: str) -> bool:
    return "scaled_dot_product" in operator


@dataclass(frozen=True)
class Profile:
    """Seconds of one step: in all, of each part ("backward" includes the recomputed student forward), by operator without what it calls."""

    seconds: float
    parts: dict[str, float]
    operators: dict[str, float]  # the longest first

    @property
    def products(self) -> float:
        """Seconds in matrix products."""
        return sum(seconds for name, seconds in self.operators.items() if is_product(name))

    @property
    def attention(self) -> float:
        """Seconds in attention's own kernels, forward and backward."""
        return sum(seconds for name, seconds in self.operators.items() if is_attention(name))

    @property
    def share(self) -> float:
        """Share of the step in matrix products and attention."""
        return (self.products + self.attention) / self.seconds


def profile(step: Callable[[], object]) -> Profile:
    """Takes one step under the profiler. Raises RuntimeError if the step has not each of PARTS."""
    with torch_profile(activities=[ProfilerActivity.CPU]) as recorded, record_function(STEP):
        step()
    averages = {event.key: event for event in recorded.key_averages() if event.device_type == DeviceType.CPU}
    if missing := [name for name in (STEP, *PARTS) if name not in averages]:
        raise RuntimeError(f"the profile has no range {missing[0]}")
    operators = {name: event.self_cpu_time_total / 1e6 for name, event in averages.items() if name not in (STEP, *PARTS)}
    return Profile(
        seconds=averages[STEP].cpu_time_total / 1e6,
        parts={name: averages[name].cpu_time_total / 1e6 for name in PARTS},
        operators=dict(sorted(operators.items(), key=lambda item: -item[1])),
    )
