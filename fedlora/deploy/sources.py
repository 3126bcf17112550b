"""What is imported from the Flower app of a run: Python sources that were signed, and nothing else.

Python would rather take a compiled file from `__pycache__`, or a shared library, than the source beside it.
"""

import importlib.machinery
import sys
from pathlib import Path
from types import CodeType


class _Source(importlib.machinery.SourceFileLoader):
    """Compiles the source, whatever lies in `__pycache__`."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


def only(app: Path) -> None:
    """Import modules from an app too, after all that are installed, and only from its `.py` files.

    Not before it is known that a site runs what comes with a run: libraries look for what is not installed.
    """
    root = app.absolute()
    if str(root) in sys.path:
        return

    def hook(path: str) -> importlib.machinery.FileFinder:
        if not Path(path).absolute().is_relative_to(root):
            raise ImportError("not of the app")
        return importlib.machinery.FileFinder(path, (_Source, [".py"]))

    sys.dont_write_bytecode = True
    sys.path_hooks.insert(0, hook)
    sys.path_importer_cache.clear()
    sys.path.append(str(root))
