"""LMMs-Eval's own functions: single modules loaded from their files.

    pip install --no-deps lmms-eval==0.7.3

The packages that these modules import for other purposes are replaced by empty ones.
"""

import importlib.util
import sys
from pathlib import Path
from unittest.mock import MagicMock

import yaml

HARNESS = Path(next(iter(importlib.util.find_spec("lmms_eval").submodule_search_locations)))


def load(path):
    """The module in the package's file `path`, without its ending."""
    spec = importlib.util.spec_from_file_location(path.replace("/", "_"), HARNESS / f"{path}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def task(path):
    """A task's settings: its YAML file and the one it includes; functions are left out."""
    settings = yaml.load((HARNESS / path).read_text(), Loader)
    if "include" in settings:
        settings = task(f"{path.rsplit('/', 1)[0]}/{settings['include']}") | settings
    return settings


class Loader(yaml.SafeLoader):
    pass


Loader.add_constructor("!function", lambda loader, node: None)

for name in ("loguru", "sacrebleu", "lmms_eval", "lmms_eval.api", "lmms_eval.tasks", "lmms_eval.tasks._task_utils",
             "lmms_eval.tasks._task_utils.file_utils"):
    sys.modules[name] = MagicMock()
keep = MagicMock()
keep.register_metric = keep.register_aggregation = lambda *names, **options: lambda function: function
sys.modules["lmms_eval.api.registry"] = keep
sys.modules["lmms_eval.tasks._task_utils.vqa_eval_metric"] = load("tasks/_task_utils/vqa_eval_metric")
