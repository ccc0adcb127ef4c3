"""Model families of the goldens, one file each: what differs between them, as in src/model/families.

A family is a subclass of base.Family (or of qwen.Qwen) and its line in FAMILIES. Its `variants` are random tiny checkpoints,
one dictionary each; make_model.py writes every one with its outputs and importance factors.
"""

from .llava_onevision import LlavaOnevision
from .qwen2_5_vl import Qwen25VL
from .qwen2_vl import Qwen2VL
from .qwen3_vl import Qwen3VL

FAMILIES = [Qwen2VL(), Qwen25VL(), LlavaOnevision(), Qwen3VL()]


def of(model_type):
    """The family of a `model_type` of config.json."""
    return next(family for family in FAMILIES if family.model_type == model_type)
