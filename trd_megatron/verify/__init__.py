"""Verification: does a response solve its problem? Light to import; the heavy libraries live in child processes."""

from trd_megatron.verify.code import CodeVerifier, verify_code
from trd_megatron.verify.math import MathVerifier, verify_math
from trd_megatron.verify.math_types import ANSWER_TYPES, check_points
from trd_megatron.verify.verdict import Verdict

__all__ = ["ANSWER_TYPES", "CodeVerifier", "MathVerifier", "Verdict", "check_points", "verify_code", "verify_math"]
