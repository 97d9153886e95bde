"""Where the metrics of each optimizer step go: metrics.jsonl, tensorboard and, if configured, Weights & Biases."""

import json
import secrets
import shutil
from pathlib import Path
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter

from trd_megatron.config import Config, to_dict
from trd_megatron.errors import UserError
from trd_megatron.run_dir import atomic_write, write_json

METRICS = "metrics.jsonl"
WANDB = "wandb.json"  # the id of the run there


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line that a crash cut short is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            lines.append(json.loads(line))
    return lines


class _Sink(Protocol):
    def write(self, metrics: dict[str, Any]) -> None: ...

    def close(self, failed: bool) -> None: ...


class Log:
    """All sinks of a run, while training goes on. A context manager: what is written stays, however the block ends."""

    def __init__(self, folder: Path, done: int, config: Config, *, active: bool) -> None:
        """folder: train/. done: the step that training goes on from; what was written after it is dropped, not doubled.

        active False (all ranks but one): writes nothing. Raises UserError if Weights & Biases refuses the run.
        """
        self._sinks: list[_Sink] = []
        if not active:
            return
        path = folder / METRICS
        kept = [line for line in read_metrics(path) if line["step"] <= done] if path.exists() else []
        if config.logging.wandb_project is not None:  # first: it alone can fail
            self._sinks.append(_Wandb(folder, kept, config))
        self._sinks += [_Lines(path, kept), _Board(folder / "tensorboard", done)]

    def write(self, metrics: dict[str, Any]) -> None:
        """One step's metrics, step among them; numbers, or None where there is no value."""
        for sink in self._sinks:
            sink.write(metrics)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for sink in self._sinks:
            sink.close(failed=kind is not None)


class _Lines:
    """metrics.jsonl: one object a step."""

    def __init__(self, path: Path, kept: list[dict[str, Any]]) -> None:
        with atomic_write(path) as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)
        self._file = path.open("a", encoding="utf-8")

    def write(self, metrics: dict[str, Any]) -> None:
        self._file.write(json.dumps(metrics) + "\n")
        self._file.flush()

    def close(self, failed: bool) -> None:
        self._file.close()


def _curves(metrics: dict[str, Any]) -> dict[str, float]:
    """Name of the curve -> value, of what has one in this step."""
    return {f"train/{name}": value for name, value in metrics.items() if name != "step" and value is not None}


class _Board:
    """Tensorboard hides what it was told after the step that training goes on from."""

    def __init__(self, folder: Path, done: int) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=done + 1)

    def write(self, metrics: dict[str, Any]) -> None:
        for name, value in _curves(metrics).items():
            self._writer.add_scalar(name, value, metrics["step"])

    def close(self, failed: bool) -> None:
        self._writer.close()


class _Wandb:
    """A Weights & Biases run that a resumed training goes on with. Its key comes from the environment and stays there.

    Online nothing can be taken back: a step that is repeated after a crash keeps its first values there, and what the crash
    lost is sent again. Offline no start knows what an earlier one had on disk when it died, so each writes the whole run anew.
    """

    def __init__(self, folder: Path, kept: list[dict[str, Any]], config: Config) -> None:
        import wandb

        path = folder / WANDB
        if not path.exists():
            write_json(path, {"id": secrets.token_hex(8)})
        run_id = json.loads(path.read_text(encoding="utf-8"))["id"]
        for older in folder.glob(f"wandb/offline-run-*-{run_id}*"):
            shutil.rmtree(older)
        try:
            self._run: Any = wandb.init(
                project=config.logging.wandb_project,
                id=run_id,
                resume="allow",
                mode=config.logging.wandb_mode,
                name=config.name,
                config=to_dict(config),
                dir=str(folder),
                settings=wandb.Settings(console="off"),  # standard output is how the stage hears of the steps
            )
        except wandb.Error as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"logging.wandb_project: Weights & Biases refuses ({reason}); logging.wandb_mode=offline needs no server"
            ) from None
        self._next = self._run.step  # 0 for a new run, else one after the last that it holds
        for line in kept:
            self.write(line)

    def write(self, metrics: dict[str, Any]) -> None:
        if metrics["step"] >= self._next:
            self._run.log(_curves(metrics), step=metrics["step"], commit=True)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
