"""A caller's arrays: of NumPy, PyTorch, pandas or polars, or lists, read by name and checked."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pathnet.checks import check_flag, check_integer, check_number, check_tensor, described

__all__ = ["Array", "Arrays", "Columns", "Frame", "Integers", "by_name"]

Array: TypeAlias = NDArray[np.float64]
Integers: TypeAlias = NDArray[np.int64]


@runtime_checkable
class Frame(Protocol):
    """A table of columns by name, such as a DataFrame of pandas or polars."""

    @property
    def columns(self) -> Any:
        """Names of the columns."""

    def __getitem__(self, name: Any, /) -> Any: ...


Arrays: TypeAlias = Mapping[str, Any] | Frame


def by_name(values: Arrays) -> dict[str, Any]:
    """Return the arrays of a mapping or a table, by name."""
    return {name: values[name] for name in (values if isinstance(values, Mapping) else values.columns)}


class Columns:
    """Arrays by name, each checked when it is read.

    Args:
        name: name of the argument in errors.
        values: the arrays.
        needed: the names that must be there.
        optional: the names that may be there; others are refused, since they may be misspelt.

    Attributes:
        name: name of the argument in errors.
        is_table: whether the arrays are columns of a table, which holds a single value in every row.

    Raises:
        ValueError: ``values`` is something else, or a name is missing or unknown.
    """

    def __init__(self, name: str, values: object, needed: Collection[str], optional: Collection[str] = ()) -> None:
        if not isinstance(values, Mapping | Frame):
            raise ValueError(f"{name}: expected arrays by name ({', '.join(needed)}), got {described(values)}")
        self.name = name
        self._values, self.is_table = by_name(values), not isinstance(values, Mapping)
        if missing := [column for column in needed if column not in self._values]:
            got = ", ".join(map(str, self._values)) or "none"
            raise ValueError(f"{name}: expected an array {missing[0]!r}, got {got}")
        if unknown := [column for column in self._values if column not in (*needed, *optional)]:
            known = ", ".join((*needed, *optional))
            raise ValueError(f"{name}: expected arrays among {known}, got {described(unknown[0])}")

    def __contains__(self, column: str) -> bool:
        return self._values.get(column) is not None

    def __getitem__(self, column: str) -> Any:
        """Return a value as it is."""
        return self._values[column]

    def place(self, column: str) -> str:
        """Return the name of an array in errors."""
        return f"{self.name}[{column!r}]"

    def array(
        self,
        column: str,
        dimensions: Collection[int] = (1,),
        least: float = -math.inf,
        most: float = math.inf,
        nan: bool = False,
    ) -> Array:
        """Return a copy of an array as float64.

        Args:
            column: its name.
            dimensions: the accepted numbers of dimensions.
            least, most: inclusive bounds; without them, infinities are allowed.
            nan: whether NaN is allowed.

        Raises:
            ValueError: it holds no numbers, or is empty, of another shape, or out of bounds.
        """
        place = self.place(column)
        values = _plain(place, self._values[column])
        if values.ndim not in dimensions or not values.size:
            expected = " or ".join(map(str, dimensions)) + " dimension" + "s" * (max(dimensions) > 1)
            raise ValueError(f"{place}: expected values in {expected}, got the shape {list(values.shape)}")
        wrong = ~((values >= least) & (values <= most) | (np.isnan(values) & nan))
        if wrong.any():
            bounds = "" if math.isinf(least) else f" of at least {least:g}"
            bounds += "" if math.isinf(most) else f", at most {most:g}" if bounds else f" of at most {most:g}"
            raise ValueError(f"{place}: expected numbers{bounds}{' or NaN' if nan else ''}, got {values[wrong][0]}")
        return values

    def integers(
        self, column: str, least: float, most: float = 2**53, dimensions: Collection[int] = (1,)
    ) -> Integers:
        """Return a copy of an array as int64; see `array`."""
        values = self.array(column, dimensions, least, most)
        if (broken := values != np.rint(values)).any():
            raise ValueError(f"{self.place(column)}: expected integers, got {values[broken][0]}")
        return values.astype(np.int64)

    def integer(self, column: str, least: int, most: int | None = None) -> int:
        """Return a single integer."""
        return check_integer(self.place(column), self._single(column), least, most)

    def number(self, column: str, default: float, least: float, most: float) -> float:
        """Return a single number, or the default if there is none."""
        return check_number(self.place(column), self._single(column), least, most) if column in self else default

    def flag(self, column: str) -> bool:
        """Return a single truth value; False if there is none."""
        value = self._single(column) if column in self else False
        return check_flag(self.place(column), bool(value) if isinstance(value, np.bool_) else value)

    def _single(self, column: str) -> Any:
        """Return a single value, which a table holds in every row."""
        value = self._values[column]
        if not self.is_table or np.ndim(value) == 0:
            return value
        different = list(dict.fromkeys(np.asarray(value).ravel().tolist()))
        if len(different) != 1:
            got = "none" if not different else f"{different[0]} and {different[1]}"
            raise ValueError(f"{self.place(column)}: expected one value in all rows, got {got}")
        return different[0]

    def rows(self, column: str) -> int:
        """Return the number of rows of an array; 0 if it is not there."""
        return len(np.atleast_1d(_plain(self.place(column), self[column]))) if column in self else 0

    def same_length(self, *columns: str) -> None:
        """Raise ValueError unless all of these arrays that are there hold equally many rows."""
        lengths = {column: self.rows(column) for column in columns if column in self}
        first, *rest = lengths
        for column in rest:
            if lengths[column] != lengths[first]:
                got = f"got {lengths[column]} and {lengths[first]}"
                raise ValueError(f"{self.place(column)}: expected as many values as of {first!r}, {got}")


def _plain(place: str, value: Any) -> Array:
    """Return numbers as an array of their own."""
    if isinstance(value, list | tuple):
        value = [_plain(place, item) if isinstance(item, Tensor) else item for item in value]
    if isinstance(value, Tensor):
        check_tensor(place, value)
        value = value.detach().cpu()
        value = (value.double() if not value.is_complex() else value.resolve_conj()).numpy()
    try:
        values = np.array(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: expected numbers, got {described(value)} ({error})") from None
    if values.dtype.kind not in "iuf":
        raise ValueError(f"{place}: expected numbers, got {described(value)} of type {values.dtype}")
    return values.astype(np.float64)
