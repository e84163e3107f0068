"""Structure of a model: taps, residual units, parameter groups and attention weights."""

from vitscope.core.tap import Tap
from vitscope.models.structure.attention_units import AttentionUnit, attention_units, reading_attention_units
from vitscope.models.structure.coverage import refuse_missing_units, warn_missing_units
from vitscope.models.structure.declared_units import UnitDescription, declare_units
from vitscope.models.structure.residual_structure import ModelComponent, Read, ResidualUnit, parts
from vitscope.models.structure.residual_units import Unit, known_units
from vitscope.models.structure.structure_table import Structure, StructureUnit
from vitscope.models.structure.taps import known_taps, missing_units, reading, units_without_tap

__all__ = [
    "AttentionUnit",
    "ModelComponent",
    "Read",
    "ResidualUnit",
    "Structure",
    "StructureUnit",
    "Tap",
    "Unit",
    "UnitDescription",
    "attention_units",
    "declare_units",
    "known_taps",
    "known_units",
    "missing_units",
    "parts",
    "reading",
    "reading_attention_units",
    "refuse_missing_units",
    "units_without_tap",
    "warn_missing_units",
]
