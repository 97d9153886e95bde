"""Lets torchvision be imported beside a torch that its compiled operators were not built for. Imported by trd_sglang_cpu.pth at every
start of this environment's Python; it does nothing until torchvision is imported."""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_libraries: list[Any] = []  # torch.library forgets the operators of a Library that is collected


class _AfterExtension(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Runs torchvision.extension as it is; if it found no compiled operators, declares the two that torchvision describes next."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        if name != "torchvision.extension":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            self._loader = spec.loader
            spec.loader = self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        if module._has_ops():
            return
        import torch

        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)


sys.meta_path.insert(0, _AfterExtension())
