"""Models: the paper's, timm's, and where their feature maps and residual branches are read."""

from vitscope.models.alternet import alternet
from vitscope.models.convnet import convnet, preresnet, resnext
from vitscope.models.pretrained import timm_model
from vitscope.models.stages import build_up
from vitscope.models.vit import convit, vit

__all__ = ["alternet", "build_up", "convit", "convnet", "preresnet", "resnext", "timm_model", "vit"]
