"""Lets SGLang be imported on a machine without a GPU and without the packages of its kernels, in whose place stand modules of nothing."""

import importlib.abc
import importlib.machinery
import sys
import types
from unittest.mock import MagicMock

KERNELS = (
    "sgl_kernel", "flashinfer", "deep_gemm", "flash_mla", "deep_ep", "quack", "tilelang", "cutlass", "flash_attn", "sglang.srt._native",
)


class Nothing(types.ModuleType):
    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        value = MagicMock(name=f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        if name in KERNELS or name.split(".")[0] in KERNELS:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return Nothing(spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.insert(0, Finder())
