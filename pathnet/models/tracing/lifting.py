"""Convolutions and batch normalisations that a trace holds as functions of weights, as modules again.

So a trace by ``torch.export``, or through a subclass that calls the functions itself, has live statistics, and the
forms that fused engines know are found in it too.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pathnet.models.pointwise import Pointwise

__all__ = ["lift"]

aten = torch.ops.aten

CONVOLUTIONS = {F.conv2d, torch.conv2d, aten.conv2d.default, aten.conv2d.padding}
NORMALISATIONS = {F.batch_norm, torch.batch_norm, aten.batch_norm.default}
NAMES: dict[Any, tuple[str, ...]] = {
    target: ("input", "weight", "bias", "stride", "padding", "dilation", "groups") for target in CONVOLUTIONS
}
NAMES[F.batch_norm] = tuple(inspect.signature(F.batch_norm).parameters)
NAMES |= dict.fromkeys(
    (torch.batch_norm, aten.batch_norm.default),
    ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn"),
)
CONVOLUTION_DEFAULTS = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
NORMALISATION_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(F.batch_norm).parameters.items()
    if parameter.default is not inspect.Parameter.empty
}
TENSORS = {"weight", "bias", "running_mean", "running_var"}
OF_DIMENSIONS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def lift(graph: fx.Graph, held: dict[str, Any], model: nn.Module, ranks: Mapping[fx.Node, int]) -> list[fx.Node]:
    """Replaces such functions in place, where their weights and statistics are held as they are.

    The module is the model's own where it is a plain one of torch, and otherwise a new one of the same tensors.

    Args:
        held: what the graph names; modules are added.
        model: whose names the graph uses.
        ranks: the number of dimensions of what each operation gives.

    Returns:
        The batch normalisations in evaluation mode that stay functions, their statistics fixed.
    """
    made: dict[tuple[Any, ...], str] = {}
    fixed = []
    for node in list(graph.nodes):
        if node.op != "call_function" or not (node.target in CONVOLUTIONS or node.target in NORMALISATIONS):
            continue
        given = _given(node)
        tensors = {name: _held(value, held) for name, value in given.items() if name in TENSORS}
        plain = all(value is None or isinstance(value, Tensor) for value in tensors.values())
        convolves = node.target in CONVOLUTIONS
        if not plain or not (isinstance(tensors["weight" if convolves else "running_var"], Tensor)):
            fixed += [] if convolves or given.get("training") is True else [node]
            continue
        owner = str(given["weight" if convolves else "running_var"].target).rpartition(".")[0]
        settings = {name: value for name, value in given.items() if name not in TENSORS and name != "input"}
        key = (convolves, *(id(tensor) for tensor in tensors.values()), str(settings))
        if key not in made:
            module = _module(tensors, settings, _submodule(model, owner), convolves, ranks[node])
            if module is None:
                fixed += [] if convolves else [node]
                continue
            made[key] = _new_name(owner or "lifted", held)
            held[made[key]] = module
        node.op, node.target, node.args, node.kwargs = "call_module", made[key], (given["input"],), {}
    return fixed


def _given(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by name."""
    defaults = CONVOLUTION_DEFAULTS if node.target in CONVOLUTIONS else NORMALISATION_DEFAULTS
    return {**defaults, **dict(zip(NAMES[node.target], node.args, strict=False)), **node.kwargs}


def _held(value: Any, held: Mapping[str, Any]) -> Any:
    """The tensor of an argument, None where none is given, or what else it is."""
    if isinstance(value, fx.Node) and value.op == "get_attr":
        return held[str(value.target)]
    return value


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _new_name(name: str, held: Mapping[str, Any]) -> str:
    while name in held:
        name += "_"
    return name


def _module(
    tensors: Mapping[str, Any], settings: Mapping[str, Any], own: nn.Module | None, convolves: bool, rank: int
) -> nn.Module | None:
    """A module that does what the function does; None where it is not in evaluation mode."""
    made: nn.Module
    if convolves:
        weight, bias = tensors["weight"], tensors["bias"] is not None
        channels = weight.shape[1] * settings["groups"], weight.shape[0]
        made = nn.Conv2d(*channels, tuple(weight.shape[2:]), bias=bias, **_pairs(settings), device="meta")
    else:
        # Of another module nobody knows whether its mode has a say.
        if not isinstance(own, nn.modules.batchnorm._BatchNorm) or settings["training"] is not False:
            return None
        affine = tensors["weight"] is not None
        made = OF_DIMENSIONS[rank](len(tensors["running_var"]), settings["eps"], own.momentum, affine, device="meta")
        made.num_batches_tracked = own.num_batches_tracked
    if own is not None and type(own) in (type(made), Pointwise) and _alike(own, made, tensors):
        return own
    made.training = False if own is None else own.training
    for name, tensor in tensors.items():
        if tensor is not None and name in ("weight", "bias") and not isinstance(tensor, nn.Parameter):
            return None
        setattr(made, name, tensor)
    return made


def _pairs(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A convolution's settings as its module keeps them."""

    def pair(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return tuple(value) * (2 // len(value))
        return value if isinstance(value, str) else (value, value)

    return {name: value if name == "groups" else pair(value) for name, value in settings.items()}


def _alike(own: nn.Module, made: nn.Module, tensors: Mapping[str, Any]) -> bool:
    """Whether a module of the model has these tensors and settings."""
    if any(getattr(own, name, None) is not tensor for name, tensor in tensors.items()):
        return False
    settings = ("stride", "padding", "dilation", "groups", "eps", "padding_mode")
    return all(getattr(own, name, None) == getattr(made, name, None) for name in settings)
