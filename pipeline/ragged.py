"""Lists of different lengths as flat arrays: where each begins, and what is gathered from them.

Names: `lengths` has one entry a list, `bounds` one more: list i is values[bounds[i]:bounds[i + 1]].
"""

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Ints: TypeAlias = npt.NDArray[np.int64]
Bools: TypeAlias = npt.NDArray[np.bool_]


def bounds_of(lengths: npt.NDArray[Any]) -> Ints:
    """Return where lists of these lengths begin and end, laid one after the other."""
    bounds = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=bounds[1:])
    return bounds


def list_lengths(column: pa.Array) -> Ints:
    """Return the length of each list of an Arrow column; a null has none."""
    counted = pc.fill_null(pc.list_value_length(column), 0)
    return counted.to_numpy(zero_copy_only=False).astype(np.int64)


def numbers(column: pa.Array, missing: float) -> npt.NDArray[Any]:
    """Return a column as numpy has it, `missing` where it is null; a view where it can be."""
    if column.null_count:
        column = pc.fill_null(column, pa.scalar(missing, column.type))
    return column.to_numpy(zero_copy_only=False)


def ranges(starts: npt.NDArray[Any], lengths: npt.NDArray[Any]) -> Ints:
    """Return start, start + 1, ... for each start, as many as its length, in one array."""
    bounds = bounds_of(lengths)
    return np.repeat(starts - bounds[:-1], lengths) + np.arange(bounds[-1])


def sums(values: npt.NDArray[Any], bounds: Ints) -> Ints:
    """Return the sum of each list's values; of none it is 0. The lists are all there is."""
    found = np.zeros(len(bounds) - 1, dtype=np.int64)
    held = np.diff(bounds) > 0
    if held.any():
        # Empty lists take no room, so that a list ends where the next one that isn't empty begins.
        found[held] = np.add.reduceat(values, bounds[:-1][held], dtype=np.int64)
    return found


def anywhere(marks: Bools, bounds: Ints) -> Bools:
    """Mark the lists of which a value is marked."""
    found = np.zeros(len(bounds) - 1, dtype=bool)
    held = np.diff(bounds) > 0
    if held.any():
        found[held] = np.logical_or.reduceat(marks, bounds[:-1][held])
    return found


def owners(bounds: Ints) -> Ints:
    """Return for each value the place of its list."""
    return np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))


def lists(bounds: Ints, values: Any, missing: Bools | None = None) -> pa.Array:
    """Return an Arrow column of these lists; null where one is missing (it must have no values)."""
    assert bounds[-1] < 2**31, "a batch has fewer values than Arrow's offsets can count"
    if not isinstance(values, pa.Array):
        values = pa.array(values)
    mask = None if missing is None or not missing.any() else pa.array(missing)
    return pa.ListArray.from_arrays(pa.array(bounds, pa.int32()), values, mask=mask)
