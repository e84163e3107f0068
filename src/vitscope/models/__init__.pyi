"""Public functions of the package, for static checkers; `tests/models/test_model_names.py` compares them with the files."""

from vitscope.models.alternet import alternet as alternet
from vitscope.models.alternet_layout import build_up as build_up
from vitscope.models.convnet import convnet as convnet
from vitscope.models.convnet import preresnet as preresnet
from vitscope.models.convnet import resnext as resnext
from vitscope.models.convnext import convnext as convnext
from vitscope.models.mixer import mixer as mixer
from vitscope.models.official_checkpoints import load_official_state_dict as load_official_state_dict
from vitscope.models.pit import pit as pit
from vitscope.models.swin import swin as swin
from vitscope.models.timm_model import timm_model as timm_model
from vitscope.models.vit import convit as convit
from vitscope.models.vit import vit as vit

def functions() -> dict[str, str]: ...
