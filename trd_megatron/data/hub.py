"""Files of data sets on the Hugging Face hub: the one place that downloads them.

The hub's own cache keeps them (HF_HOME moves it), a token for gated sets comes from HF_TOKEN in the environment. Nothing but the files
named is fetched, and none of a repository's code is run.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from trd_megatron.errors import UserError

DOWNLOAD = "where there is a network (`trd prepare --download-only`)"


@dataclass(frozen=True)
class HubFiles:
    """Files of a data set's repository: names in it, or patterns with * such as ALL/train-*.parquet. Every one must match a file."""

    repository: str
    patterns: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.repository} ({', '.join(self.patterns)})"


def locate(files: HubFiles, *, way_out: str) -> list[Path]:
    """The files, in the order of the patterns: from the hub's cache where they lie, else from the hub.

    What is cached is not asked for again, so that a run neither needs the network nor changes with the repository; `fetch` does that.
    way_out: what the user can do instead, ends the error's message. Raises UserError if a file cannot be had.
    """
    try:
        return _cached(files)
    except OSError:
        return fetch(files, way_out=way_out)


def is_cached(files: HubFiles) -> bool:
    """Whether `locate` needs no download."""
    try:
        return bool(_cached(files))
    except OSError:
        return False


def _cached(files: HubFiles) -> list[Path]:
    """Raises FileNotFoundError if not all of the files are in the cache."""
    from huggingface_hub import snapshot_download

    folder = snapshot_download(files.repository, repo_type="dataset", allow_patterns=list(files.patterns), local_files_only=True)
    return matching(Path(folder), files)


def fetch(files: HubFiles, *, way_out: str) -> list[Path]:
    """The files as the hub has them now; where it cannot be reached, those in its cache. Raises UserError if a file cannot be had."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (  # HTTPError: of the HTTP library the hub client uses
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
    )

    try:
        folder = Path(snapshot_download(files.repository, repo_type="dataset", allow_patterns=list(files.patterns)))
        return matching(folder, files)
    except (HTTPError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if isinstance(error, LocalEntryNotFoundError):
            reason = f"it cannot be reached, and {constants.HF_HUB_CACHE} does not hold all of it"
        if constants.HF_HUB_OFFLINE:
            reason = f"HF_HUB_OFFLINE is set, and {constants.HF_HUB_CACHE} does not hold all of it"
        raise UserError(f"{files} did not come from the Hugging Face hub ({reason}): {way_out}") from error


def revision(path: Path) -> str | None:
    """The commit of a file in the hub's cache; None for another file."""
    parts = path.parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts[:-1] else None


def matching(folder: Path, files: HubFiles) -> list[Path]:
    """Raises FileNotFoundError where a pattern matches nothing, or where one of the parts -00000-of-00009 is missing."""
    found: list[Path] = []
    for pattern in files.patterns:
        matching = sorted(folder.glob(pattern))
        missing = pattern if not matching else _missing_part(path.name for path in matching)
        if missing:
            raise FileNotFoundError(f"{missing} is missing")
        found += matching
    return found


def _missing_part(names: Iterable[str]) -> str | None:
    """A file of a set in parts that is not among `names`, None if all are."""
    have = set(names)
    for name in have:
        match = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})(\..*)", name)
        for index in range(int(match[2]) if match else 0):
            assert match is not None
            part = f"{match[1]}-{index:05d}-of-{match[2]}{match[3]}"
            if part not in have:
                return part
    return None
