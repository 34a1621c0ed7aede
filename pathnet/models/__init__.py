"""Networks as a stem, residual building blocks and a head."""

from pathnet.models.preact_resnet import PreactBlock, preact_resnet, preact_resnet_imagenet
from pathnet.models.residual_net import Block, FusedForm, ResidualNet, Unit
from pathnet.models.weights import build, fingerprint, load, save

__all__ = [
    "Block",
    "FusedForm",
    "PreactBlock",
    "ResidualNet",
    "Unit",
    "build",
    "fingerprint",
    "load",
    "preact_resnet",
    "preact_resnet_imagenet",
    "save",
]
