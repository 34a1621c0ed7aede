"""Networks as a stem, residual building blocks and a head."""

from pathnet.models.highway_blocks import HighwayBlock, highway
from pathnet.models.postactivation import PostactBlock, resnet
from pathnet.models.preactivation import PreactBlock, preact_resnet, preact_resnet_imagenet
from pathnet.models.residual_net import Block, FusedForm, PostActivationForm, ResidualNet, Unit
from pathnet.models.vgg_layers import VggLayer, vgg
from pathnet.models.weights import build, fingerprint, load, save

__all__ = [
    "Block",
    "FusedForm",
    "HighwayBlock",
    "PostActivationForm",
    "PostactBlock",
    "PreactBlock",
    "ResidualNet",
    "Unit",
    "VggLayer",
    "build",
    "fingerprint",
    "highway",
    "load",
    "preact_resnet",
    "preact_resnet_imagenet",
    "resnet",
    "save",
    "vgg",
]
