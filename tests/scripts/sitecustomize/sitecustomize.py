"""For scripts that stay as they are: no 45 s of compiling a CPU kernel that training never calls.

Put this directory on PYTHONPATH. Python then imports this file before anything else; DeepSpeed itself is not imported
here, which would take seconds in every process of a launcher.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

BUILDER = "deepspeed.ops.op_builder.cpu.comm"


class Uncompiled(MetaPathFinder):
    """Lets the kernel's builder say that this machine cannot build it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != BUILDER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def load_then_patch(module: ModuleType) -> None:
            load(module)
            module.ShareMemCommBuilder.is_compatible = lambda self, verbose=False: False

        spec.loader.exec_module = load_then_patch  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Uncompiled())
