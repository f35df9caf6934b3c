"""Keep the warnings of other libraries off the screen."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

SHOW_WARNINGS = "TEACHER_CACHE_WARNINGS"
_LOGGERS = (
    "huggingface_hub", "matplotlib", "mlflow", "numcodecs", "onnx", "onnxscript", "open_clip", "PIL", "ray", "timm",
    "torch", "torchvision", "wandb", "zarr",
)  # fmt: skip


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Inside, warnings of other libraries are not printed; errors that they log are. Our own are printed by `warn`.

    TEACHER_CACHE_WARNINGS=1, python -W and PYTHONWARNINGS show them again.
    """
    if os.environ.get(SHOW_WARNINGS, "0") not in {"", "0"} or sys.warnoptions:
        yield
        return
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # read when huggingface_hub is imported
    root, handler = logging.getLogger(), logging.StreamHandler()
    handler.setLevel(logging.ERROR)
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root.addHandler(handler)  # without a handler, the first warning of the root logger installs one for all levels
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            root.removeHandler(handler)
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
