"""Corrections of Triton's interpreter, whose bfloat16 casts truncate and whose bfloat16 products are garbage.

They also double its speed, since its bookkeeping takes most of these tests' time.
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
    """Make casts from and to bfloat16 round as torch does, and products those of the rounded numbers, from now on.

    Loops whose bounds are known at run time alone then work in every version of Triton and NumPy.
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
        # Triton 3.6 reads a loop's bounds by a conversion that NumPy no longer supports.
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_lang_tensor
    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast_impl, create_dot
    InterpreterBuilder.bfloat16_is_right = True
    hasten()


def hasten() -> None:
    """Skip what the interpreter computes for nothing, and cache what it looks up again and again."""
    import triton.language as tl
    from triton.runtime import interpreter

    # The overflow check repeats every integer sum and product in 64 bits; only `debug` needs it.
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)

    numpy_type, types = interpreter._get_np_dtype, {}

    def get_np_dtype(kind: Any) -> Any:
        name = kind.scalar.name
        if name not in types:
            types[name] = numpy_type(kind.scalar)
        return types[name]

    # The interpreter patches builtins at each launch, and at each call from one function to another.
    builtins: dict[Any, list[tuple[str, Any]]] = {}

    def patch_builtin(owner: Any, builder: Any, scope: Any) -> None:
        if owner not in builtins:
            builtins[owner] = [pair for pair in inspect.getmembers(owner) if tl.core.is_builtin(pair[1])]
        for name, member in builtins[owner]:
            if getattr(owner, name) is member:
                interpreter._patch_attr(owner, name, member, builder, scope)

    # And it patches the languages that a function sees, although within a kernel they are patched already.
    patch, languages = interpreter._patch_lang, {}

    def patch_lang(function: Any) -> Any:
        seen = id(function.__globals__)
        if seen not in languages:
            languages[seen] = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        if all(language.static_print is print for language in languages[seen]):
            return interpreter._LangPatchScope()
        return patch(function)

    interpreter._get_np_dtype, interpreter._patch_builtin = get_np_dtype, patch_builtin
    interpreter._patch_lang = patch_lang

    # Each tensor has a type and a shape, each type has a shape, and each shape makes objects for its numbers again.
    make_block, make_tensor = tl.block_type.__init__, tl.tensor.__init__
    of_blocks: dict[Any, Any] = {}
    of_tensors: dict[Any, Any] = {(): (tl.tuple([]), tl.constexpr(1))}

    def block_type(self: Any, element: Any, shape: Any) -> None:
        sizes = tuple(size.value if isinstance(size, tl.constexpr) else size for size in shape)
        if sizes not in of_blocks:
            make_block(self, element, shape)
            of_blocks[sizes] = self.shape, self.numel, str(self.shape)
        self.element_ty = element
        self.shape, self.numel, printed = of_blocks[sizes]
        self.name = f"<{printed}, {element}>"

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
    """Make products add up term by term: in BLAS, a row's result may depend on its place among the rows."""
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
    """Use tiles too large for a GPU, since an interpreted program takes thirty milliseconds whatever it does."""
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
