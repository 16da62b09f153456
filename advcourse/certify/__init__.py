"""Certificates: lower bounds on the distance to the nearest adversarial example, and the exact distance.

The public names are imported when first used, so that `import advcourse.certify` needs no solver.
"""
from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

_HOME = {       # public name: the module that defines it
    "Affine": "network", "MaxPool": "network", "Network": "network", "Relu": "network", "network": "network",
    "bounds": "bounds", "certified_radius": "bounds", "margin_bound": "bounds", "margin_bounds": "bounds",
    "crown": "crown",
    "encode": "encode",
    "unstable": "bounds", "Certificate": "certificate", "minimal_distortion": "exact", "verify": "exact", "worst_margin": "exact",
}

__all__ = sorted(_HOME)


class _Package(ModuleType):
    """A submodule `bounds` defines the function `bounds`: the package's attribute of that name is the function."""

    def __getattr__(self, name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOME and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *_HOME]


sys.modules[__name__].__class__ = _Package
