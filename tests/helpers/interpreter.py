"""Triton's interpreter, its bfloat16 arithmetic put right: as it comes, casts truncate and products are garbage.

And at twice its speed, since most of what these tests take is its bookkeeping.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["big_tiles", "correct", "sum_in_order"]


def correct() -> None:
    """From now on, casts from and to bfloat16 round as torch does, and products are those of the rounded numbers.

    Loops whose bounds are known at run time alone work in every version of Triton and NumPy.
    """
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    if getattr(InterpreterBuilder, "bfloat16_is_right", False):
        return
    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast_impl(self: Any, source: Any, kind: Any) -> Any:
        if source.dtype.scalar == tl.bfloat16 and kind.scalar != tl.bfloat16:
            return cast(self, TensorHandle(from_bits(source.data), tl.float32), kind)
        if kind.scalar == tl.bfloat16 and source.dtype.scalar != tl.bfloat16:
            return TensorHandle(to_bits(source.data), tl.bfloat16)
        return cast(self, source, kind)

    def create_dot(self: Any, a: Any, b: Any, c: Any, precision: Any, imprecise: Any) -> Any:
        wide = (TensorHandle(from_bits(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, *wide, c, precision, imprecise)

    patch_tensor = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        # Triton 3.6 reads a loop's bounds by what NumPy no longer does.
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_lang_tensor
    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast_impl, create_dot
    InterpreterBuilder.bfloat16_is_right = True
    hasten()


def hasten() -> None:
    """Leaves out what the interpreter computes and drops, and has it look up once what stays as it is."""
    import triton.language as tl
    from triton.runtime import interpreter

    # Every sum and product of integers once more, in 64 bits, for a check that is made with `debug` alone.
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)

    numpy_type, types = interpreter._get_np_dtype, {}

    def get_np_dtype(kind: Any) -> Any:
        name = kind.scalar.name
        if name not in types:
            types[name] = numpy_type(kind.scalar)
        return types[name]

    # Builtins are put in place at each launch, and at each call from one function to another.
    builtins: dict[Any, list[tuple[str, Any]]] = {}

    def patch_builtin(owner: Any, builder: Any, scope: Any) -> None:
        if owner not in builtins:
            builtins[owner] = [own for own in inspect.getmembers(owner) if tl.core.is_builtin(own[1])]
        for name, member in builtins[owner]:
            if getattr(owner, name) is member:
                interpreter._patch_attr(owner, name, member, builder, scope)

    # And so are the languages that a function sees, although within a kernel they are in place.
    patch, languages = interpreter._patch_lang, {}

    def patch_lang(function: Any) -> Any:
        seen = id(function.__globals__)
        if seen not in languages:
            languages[seen] = [own for own in function.__globals__.values() if own is tl or own is tl.core]
        if all(own.static_print is print for own in languages[seen]):
            return interpreter._LangPatchScope()
        return patch(function)

    interpreter._get_np_dtype, interpreter._patch_builtin = get_np_dtype, patch_builtin
    interpreter._patch_lang = patch_lang

    # Each tensor has a type, each type a shape, and each shape objects for its numbers, for both of them anew.
    make_block, make_tensor = tl.block_type.__init__, tl.tensor.__init__
    of_blocks: dict[Any, Any] = {}
    of_tensors: dict[Any, Any] = {(): (tl.tuple([]), tl.constexpr(1))}

    def block_type(self: Any, element: Any, shape: Any) -> None:
        sizes = tuple(own.value if isinstance(own, tl.constexpr) else own for own in shape)
        if sizes not in of_blocks:
            make_block(self, element, shape)
            of_blocks[sizes] = self.shape, self.numel, str(self.shape)
        self.element_ty = element
        self.shape, self.numel, said = of_blocks[sizes]
        self.name = f"<{said}, {element}>"

    def tensor(self: Any, handle: Any, kind: Any) -> None:
        sizes = tuple(kind.shape.values) if kind.is_block() else ()
        if sizes not in of_tensors:
            make_tensor(self, handle, kind)
            of_tensors[sizes] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, kind, kind.scalar
        self.shape, self.numel = of_tensors[sizes]

    tl.block_type.__init__, tl.tensor.__init__ = block_type, tensor


def from_bits(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    values = torch.from_numpy(np.ascontiguousarray(bits).view(np.int16)).view(torch.bfloat16).float()
    return values.numpy().reshape(bits.shape)


def to_bits(values: NDArray[Any]) -> NDArray[np.uint16]:
    rounded = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).bfloat16().view(torch.int16)
    return rounded.numpy().view(np.uint16).reshape(values.shape)


def sum_in_order(monkeypatch: Any) -> None:
    """Products that add up term by term: in BLAS, what a row comes to may hang on its place among the rows."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self: Any, a: Any, b: Any, c: Any, precision: Any, imprecise: Any) -> Any:
        left, right = (from_bits(x.data) if x.dtype.scalar == tl.bfloat16 else x.data for x in (a, b))
        total = np.zeros_like(c.data)
        for k in range(left.shape[-1]):
            total += left[..., k, None] * right[..., k, None, :]
        return TensorHandle(total + c.data, c.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


def big_tiles(monkeypatch: Any) -> None:
    """Tiles that a GPU would have no room for: a program takes thirty milliseconds here, whatever it does."""
    from pathnet.engines.triton import arrivals, configurations, endings, folding, statistics, sums
    from pathnet.engines.triton.launch import Tile

    for table in (configurations.DGRAD, configurations.STRIDED, configurations.FORWARD):
        for tiles in table.values():
            for width, tile in tiles.items():
                paths = 8 if tile.paths > 1 else 1
                monkeypatch.setitem(tiles, width, Tile(512, width, max(16, tile.depth), paths))
    for tiles in configurations.WGRAD.values():
        for width in tiles:
            monkeypatch.setitem(tiles, width, Tile(1024, 64, 512))
    for module in (sums, statistics):
        monkeypatch.setattr(module, "ROWS", Tile(64, 64, 1))
    monkeypatch.setattr(folding, "FOLDED", Tile(16, 64, 64))
    for module in (arrivals, endings):
        monkeypatch.setattr(module, "ELEMENTS", Tile(1 << 15, 1, 1))
