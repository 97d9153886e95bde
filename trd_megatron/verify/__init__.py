"""Verification: does a response solve its problem? Light to import; the heavy libraries live in child processes."""

from trd_megatron.verify.math import MathVerifier, verify_math
from trd_megatron.verify.verdict import Verdict

__all__ = ["MathVerifier", "Verdict", "verify_math"]
