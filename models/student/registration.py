"""Tell transformers of the model type `latefusion` when both packages are imported, without importing transformers."""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from typing import Any

AUTO = "transformers.models.auto.configuration_auto"  # where transformers lists the types that it knows


def announce() -> None:
    """Register the type now if transformers is imported, else as soon as it is: a refusal must not wait for torch."""
    if AUTO in sys.modules:
        _register()
    elif not any(isinstance(finder, _OnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OnImport())


def _register() -> None:
    from transformers import AutoConfig  # lazy: transformers is loaded by whoever needs it

    from latefusion.models.student.whole import MODEL_TYPE, LateFusionConfig

    AutoConfig.register(MODEL_TYPE, LateFusionConfig, exist_ok=True)


class _OnImport(MetaPathFinder):
    """Waits for transformers' list of types, and finds nothing itself."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != AUTO:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_register(module: Any) -> None:
            run(module)
            _register()

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec
