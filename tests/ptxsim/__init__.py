"""A functional, adversarially scheduled interpreter of PTX for kernels that have not met a GPU yet."""

from .launch import Device, Struct, load_module
from .machine import Fault, Schedule
from .tensor import TensorMap

__all__ = ["Device", "Fault", "Schedule", "Struct", "TensorMap", "load_module"]
