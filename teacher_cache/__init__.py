"""The public names of teacher-cache, importable beside a project's own `train.py`, `pipeline/` or `cache_tools.py`:

    from teacher_cache import TeacherCache, create_student, losses

Each is imported on first use. `train` and `pipeline` are common names, so `teacher_cache.packages` sees to it that they
mean the packages beside this one.
"""

from typing import TYPE_CHECKING, Any

__all__ = [
    "CacheError",
    "CachedDataset",
    "TeacherCache",
    "ViewRecipe",
    "ViewTargets",
    "__version__",
    "build_cache",
    "codecs",
    "create_student",
    "evaluate",
    "evaluate_student",
    "fusion",
    "load_student",
    "losses",
    "measure",
    "open_images",
    "write_report",
]

if TYPE_CHECKING:
    from cache_tools import CacheError, TeacherCache, ViewTargets, codecs, fusion
    from cache_tools.images import open_images
    from cache_tools.views import ViewRecipe
    from pipeline.build import build_cache
    from pipeline.evaluate import evaluate_student
    from teacher_cache.datasets import CachedDataset
    from train import losses
    from train.checkpoints import load_student
    from train.cost import measure
    from train.evaluate import evaluate
    from train.report import write_report
    from train.students import create_student

    __version__: str

_MODULES = {
    "CacheError": "cache_tools.errors",
    "CachedDataset": "teacher_cache.datasets",
    "TeacherCache": "cache_tools.reader",
    "ViewRecipe": "cache_tools.views.recipe",
    "ViewTargets": "cache_tools.targets",
    "__version__": "cache_tools",
    "build_cache": "pipeline.build",
    "codecs": "cache_tools",
    "create_student": "train.students",
    "evaluate": "train.evaluate",
    "evaluate_student": "pipeline.evaluate",
    "fusion": "cache_tools",
    "load_student": "train.checkpoints",
    "losses": "train",
    "measure": "train.cost",
    "open_images": "cache_tools.images",
    "write_report": "train.report",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from teacher_cache.packages import import_own

    value = import_own(_MODULES[name], name)
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
