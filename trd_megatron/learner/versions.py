"""Which megatron-core the learner was tested with. Imports no Megatron: preflight asks before any work is done."""

import os
from importlib import metadata

from trd_megatron.errors import UserError

TESTED = ("0.16.1",)
ALLOW = "TRD_ALLOW_UNTESTED"  # environment variable, "1": go on with another version; `trd run --allow-untested` sets it for the ranks


def installed() -> str:
    """The version of the installed megatron-core. Raises UserError if there is none."""
    try:
        return metadata.version("megatron-core")
    except metadata.PackageNotFoundError:
        raise UserError(f"the learner needs megatron-core: pip install megatron-core=={TESTED[-1]}") from None


def check(version: str) -> None:
    """Raises UserError unless this megatron-core was tested or the user wants it anyway."""
    if version not in TESTED and os.environ.get(ALLOW) != "1":
        raise UserError(
            f"megatron-core {version} was not tested with this learner (tested: {', '.join(TESTED)}): "
            f"pip install megatron-core=={TESTED[-1]}, or go on with --allow-untested"
        )
