"""Modules that others import and that an agent never looks into: they load when somebody does.

Laws of the file: it changes when a module is loaded, never what it does; what is loaded already stays as it is.
`importlib.util.LazyLoader` does not do: in Python 3.11 a second `import` of a lazy submodule loads it.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


class _Unloaded(ModuleType):
    """Stands where the module will stand."""

    def __getattr__(self, name: str) -> Any:
        # The import system asks for these of every module that it finds, and must not be what loads it.
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


def leave_unloaded(name: str) -> None:
    """Lets `import` of a submodule (`package.module`) do nothing until one of its attributes is asked for."""
    if name in sys.modules:
        return
    package, _, child = name.rpartition(".")
    sys.modules[name] = stand_in = _Unloaded(name)
    setattr(importlib.import_module(package), child, stand_in)
