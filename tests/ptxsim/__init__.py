"""A functional, adversarially scheduled interpreter of PTX for kernels that have not met a GPU yet."""

from .device import Device, Struct, load_module
from .faults import Fault
from .schedule import Schedule
from .tensor_map import TensorMap

__all__ = ["Device", "Fault", "Schedule", "Struct", "TensorMap", "load_module"]
