"""Checks of public arguments: every failure names the argument, what it was and what it must be."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

FLOATS = ("bfloat16", "float16", "float32")
# A window that reaches further reaches everything; more, added to a position, would overflow int32.
FURTHEST = 2**30


def require(ok: bool, name: str, got: object, must: str) -> None:
    if not ok:
        raise ValueError(f"{name}: got {got}, must be {must}")


def check_rank(name: str, x: Any, dims: str) -> None:
    """`dims` is written as in the docstrings, for example "B T H D"."""
    is_array = hasattr(x, "shape") and hasattr(x, "dtype")
    require(is_array, name, type(x).__name__, f"an array [{dims}]")
    require(len(x.shape) == len(dims.split()), name, f"shape {tuple(x.shape)}", f"an array [{dims}]")


def check_shape(name: str, x: Any, shape: tuple[int, ...], dims: str) -> None:
    check_rank(name, x, dims)
    require(tuple(x.shape) == shape, name, f"shape {tuple(x.shape)}", f"[{dims}] = {shape}")


def check_float(name: str, x: Any) -> None:
    require(x.dtype.name in FLOATS, name, f"dtype {x.dtype}", f"one of {', '.join(FLOATS)}")


def check_ints(name: str, x: Any, shape: tuple[int, ...], dims: str) -> None:
    check_shape(name, x, shape, dims)
    # An empty list becomes a float array.
    require(x.size == 0 or jnp.issubdtype(x.dtype, jnp.integer), name, f"dtype {x.dtype}", "an integer dtype")


def int32(x: Any) -> Array:
    """Integers as int32; one that it does not hold as the nearest that it does, instead of another altogether."""
    if x.dtype == jnp.int32 or x.size == 0:
        return jnp.asarray(x, jnp.int32)
    library: Any = np if isinstance(x, np.ndarray) else jnp
    bounds, own = np.iinfo(np.int32), np.iinfo(x.dtype)
    return jnp.asarray(library.clip(x, max(bounds.min, own.min), min(bounds.max, own.max)).astype(np.int32))


def segment_ids(q_ids: Any, kv_ids: Any) -> tuple[Array, Array]:
    """Both in one dtype that holds all of them; int32 where that is enough for NumPy's, whose default is 64 bits."""
    q_ids, kv_ids = _ids_of_numpy("q_segment_ids", q_ids), _ids_of_numpy("kv_segment_ids", kv_ids)
    common = np.promote_types(q_ids.dtype, kv_ids.dtype)
    held = np.issubdtype(common, np.integer) and jnp.dtype(jax.dtypes.canonicalize_dtype(common)) == common
    require(held, "kv_segment_ids", f"dtype {kv_ids.dtype}", f"one that goes with q_segment_ids' {q_ids.dtype}")
    return jnp.asarray(q_ids, common), jnp.asarray(kv_ids, common)


def _ids_of_numpy(name: str, x: Any) -> Any:
    if not isinstance(x, np.ndarray):
        return x
    least, most = int(x.min()), int(x.max())
    fits = least >= -(2**31) and most < 2**31
    require(fits or jax.config.jax_enable_x64, name, f"ids from {least} to {most}", "of 32 bits without jax_enable_x64")
    return x.astype(np.int32) if fits else x


def check_mask(name: str, x: Any, rows: int) -> None:
    check_shape(name, x, (rows,), "R")
    require(x.dtype == bool, name, f"dtype {x.dtype}", "bool")


def check_dtype(name: str, dtype: Any, known: tuple[str, ...]) -> np.dtype:
    """As a dtype, which must be one of `known`."""
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    require(found is not None and found.name in known, name, repr(dtype), f"one of {', '.join(known)}")
    return found


def check_positive_int(name: str, x: Any) -> None:
    require(is_int(x) and x > 0, name, repr(x), "a positive int")


def check_bool(name: str, x: Any) -> None:
    require(isinstance(x, (bool, np.bool_)), name, repr(x), "True or False, known at trace time")


def static_float(name: str, x: Any) -> float:
    must = "a finite number known at trace time"
    require(not isinstance(x, (str, bytes, bool)), name, repr(x), must)
    try:
        number = float(x)
    except (TypeError, ValueError, OverflowError) as error:  # a tracer's ConcretizationTypeError is one, too
        raise ValueError(f"{name}: got {x!r}, must be {must}") from error
    require(math.isfinite(number), name, x, must)
    return number


def static_scale(scale: float | None, head_dim: int) -> float:
    return head_dim**-0.5 if scale is None else static_float("scale", scale)


def static_softcap(softcap: float | None) -> float | None:
    if softcap is None:
        return None
    cap = static_float("softcap", softcap)
    require(cap > 0, "softcap", softcap, "a positive number or None")
    return cap


def window_bounds(window: Any, causal: bool) -> tuple[int | None, int | None]:
    """(left, right): how many keys before and after its own position a query may see; None = all."""
    must = "an int >= 1, a pair (left, right) of ints >= 0 or None, or None"
    left, right = _window_pair(window, must)
    require(left is None or left >= 0, "window", window, must)
    require(right is None or right >= 0, "window", window, must)
    left, right = (None if x is None else min(x, FURTHEST) for x in (left, right))
    if causal:
        right = 0
    return left, right


def _window_pair(window: Any, must: str) -> tuple[int | None, int | None]:
    if window is None:
        return None, None
    if is_int(window):
        return int(window) - 1, None
    pair = isinstance(window, (tuple, list)) and len(window) == 2
    require(pair and all(x is None or is_int(x) for x in window), "window", window, must)
    left, right = window
    return None if left is None else int(left), None if right is None else int(right)


def is_int(x: Any) -> bool:
    return hasattr(x, "__index__") and not isinstance(x, (bool, Array, np.ndarray))


def check_sinks(sinks: Any, num_heads: int) -> None:
    if sinks is not None:
        check_shape("sinks", sinks, (num_heads,), "H")
        check_float("sinks", sinks)


def check_groups(num_heads: int, num_kv_heads: int, name: str) -> None:
    whole = num_kv_heads > 0 and num_heads % num_kv_heads == 0
    require(whole, name, f"{num_kv_heads} KV heads for {num_heads} query heads", "a divisor of the query heads")


def static_int(name: str, x: Any, least: int, below: int) -> int:
    """A Python int, also of an array of one integer."""
    must = f"an int from {least} to {below - 1}, known at trace time"
    whole = is_int(x) or (getattr(x, "ndim", None) == 0 and jnp.issubdtype(x.dtype, jnp.integer))
    require(whole, name, repr(x), must)
    try:
        number = int(x)
    except TypeError as error:  # a tracer's ConcretizationTypeError is one
        raise ValueError(f"{name}: got {x!r}, must be {must}") from error
    require(least <= number < below, name, repr(x), must)
    return number


def static_float32(name: str, x: Any) -> float:
    """A number that float32 holds, and does not make 0: devices take what is below the smallest normal number for 0."""
    require(getattr(x, "ndim", 0) == 0, name, repr(x), "one number")
    number, kinds = static_float(name, x), jnp.finfo(jnp.float32)
    must = f"0 or from {kinds.tiny:.3g} to {kinds.max:.3g} in size, as float32 holds it"
    require(number == 0 or float(kinds.tiny) <= abs(number) <= float(kinds.max), name, repr(x), must)
    return number


def token_ids(name: str, x: Any, below: int = 2**31) -> np.ndarray:
    """As an array [any] of ids from 0 up to, and without, `below`."""
    try:
        ids = np.asarray(x)
    except (TypeError, ValueError):  # a ragged one
        ids = np.asarray(None)
    whole = ids.ndim == 1 and (ids.size == 0 or np.issubdtype(ids.dtype, np.integer))
    if not (whole and bool(np.all((ids >= 0) & (ids < below)))):
        raise ValueError(f"{name}: got {repr(x)[:80]}, must be a sequence of token ids below {below}")
    return ids
