"""What a process needs not load: torchmetrics, which lightning imports, imports every optional library that it finds.

scipy for sound and transformers for text take 3 core-seconds of every start where they are installed, and nothing here
uses them through torchmetrics; tests/cli/test_start_up.py fails without this page. Once torchmetrics is there, both can
be imported as ever.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError
from unittest.mock import patch

UNUSED = ("scipy", "transformers")


def load_torchmetrics() -> None:
    """Import it as where no library of `UNUSED` is installed; what was imported before stays visible to it."""
    from lightning_utilities.core import imports

    hidden = [name for name in UNUSED if name not in sys.modules]
    known = imports._version

    def version(name: str) -> str:
        if name in hidden:
            raise PackageNotFoundError(name)
        return known(name)

    sys.modules.update(dict.fromkeys(hidden))
    try:
        with patch.object(imports, "_version", version):
            import torchmetrics  # noqa: F401
    finally:
        for name in hidden:
            del sys.modules[name]
        imports.package_available.cache_clear()
