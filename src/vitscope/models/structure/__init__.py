"""Structure of a model: taps, residual units, parameter groups and attention weights."""

from vitscope.models.structure.residual_structure import Part, Piece, Read, parts
from vitscope.models.structure.residual_units import Unit, known_units
from vitscope.models.structure.taps import Tap, known_taps

__all__ = ["Part", "Piece", "Read", "Tap", "Unit", "known_taps", "known_units", "parts"]
