"""From the configuration of a NeMo launcher to `trd launch` (tools/nemo_launcher.py)."""

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trd_megatron.config import leaves, quoted

KINDS = {"bcm": "slurm", "k8s": "kubernetes", "interactive": "local"}


def arguments(values: Mapping[str, Any]) -> list[str]:
    """The words after `trd launch`. Raises ValueError for a cluster.type that is none of KINDS."""
    cluster = dict(values["cluster"])
    kind = cluster.pop("type")
    if kind not in KINDS:
        raise ValueError(f"cluster.type={kind}: must be one of {', '.join(KINDS)}")
    settings = {"experiment": values["experiment"], "cluster": KINDS[kind]}
    settings |= {"run_dir": f"{values['base_results_dir']}/{values['experiment']}"} | dict(_flat(values["overrides"]))
    settings |= {f"cluster.{key}": value for key, value in cluster.items() if value not in (None, {}, [])}
    images = {"learner_image": values["container"], "rollout_image": values["rollout_container"] or values["container"]}
    settings |= {f"cluster.{key}": image for key, image in images.items() if image is not None}
    if values["container_mounts"]:
        settings["cluster.mounts"] = values["container_mounts"]
    if values["env_vars"]:
        settings["cluster.env"] = values["env_vars"]
    words = [f"{key}={_hydra(value)}" for key, value in settings.items()]
    return [*words, "--stages", ",".join(values["stages"]), *(["--dry-run"] if values["dry_run"] else [])]


def _flat(overrides: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value): what Hydra nests in a command line's +overrides.learner.learning_rate=1e-5. A setting that is a mapping itself
    stays whole."""
    settings = dict(leaves())
    for name, value in overrides.items():
        key = f"{before}{name}"
        if isinstance(value, Mapping) and key not in settings:
            yield from _flat(value, f"{key}.")
        else:
            yield key, value


def launch(values: Mapping[str, Any]) -> int:
    """Runs `trd launch`; its exit code."""
    try:
        words = arguments(values)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return subprocess.run([sys.executable, "-m", "trd_megatron.cli", "launch", *words], check=False).returncode


def _hydra(value: Any) -> str:
    """A value as an override spells it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_hydra(item)}" for key, item in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ",".join(map(_hydra, value)) + "]"
    return quoted(value) if isinstance(value, str) else str(value)
