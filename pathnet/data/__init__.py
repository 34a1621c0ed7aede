"""Images and labels: digits, CIFAR-10 in two layouts, folders of classes, synthetic images; and batches of any."""

from pathnet.data.batches import Batches
from pathnet.data.built_in import digits, synthetic
from pathnet.data.cifar import cifar10
from pathnet.data.folders import class_folders
from pathnet.data.images import Data
from pathnet.data.loading import load
from pathnet.data.splits import Images, InMemory, OnDisk

__all__ = [
    "Batches",
    "Data",
    "Images",
    "InMemory",
    "OnDisk",
    "cifar10",
    "class_folders",
    "digits",
    "load",
    "synthetic",
]
