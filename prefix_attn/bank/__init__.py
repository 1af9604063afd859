"""The prefix bank: each task's keys and values once, for every layer of one frozen model."""

from prefix_attn.bank.bank import PrefixBank
from prefix_attn.bank.base import Base
from prefix_attn.bank.fingerprint import Fingerprint
from prefix_attn.bank.geometry import Geometry, LayerGeometry
from prefix_attn.bank.memory import MemoryUsage

__all__ = ["Base", "Fingerprint", "Geometry", "LayerGeometry", "MemoryUsage", "PrefixBank"]
