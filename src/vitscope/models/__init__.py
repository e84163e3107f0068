"""Models: the paper's, timm's, and where their feature maps and residual branches are read."""

from vitscope.models.alternet import alternet
from vitscope.models.alternet_layout import build_up
from vitscope.models.convnet import convnet, preresnet, resnext
from vitscope.models.convnext import convnext
from vitscope.models.mixer import mixer
from vitscope.models.official_checkpoints import load_official_state_dict
from vitscope.models.pit import pit
from vitscope.models.swin import swin
from vitscope.models.timm_model import timm_model
from vitscope.models.vit import convit, vit

__all__ = [
    "alternet",
    "build_up",
    "convit",
    "convnet",
    "convnext",
    "load_official_state_dict",
    "mixer",
    "pit",
    "preresnet",
    "resnext",
    "swin",
    "timm_model",
    "vit",
]
