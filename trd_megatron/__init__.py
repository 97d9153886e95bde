"""Trajectory-Refined Distillation with a Megatron-Core learner."""

__version__ = "0.1.0"
