"""Renames tensors, with every one of them accounted for."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from ghm_d2.errors import UserError


def shape_of(state: Mapping[str, Tensor], name: str, dims: int) -> tuple[int, ...]:
    """The shape of a tensor that must be there, have `dims` dimensions and not be empty.

    Raises:
        UserError: it is missing, or of another kind.
    """
    if name not in state:
        raise UserError(f"the tensor {name} is missing.")
    shape = tuple(state[name].shape)
    if len(shape) != dims or 0 in shape:
        raise UserError(f"the tensor {name} has the shape {shape} instead of {dims} dimensions.")
    return shape


def rename(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """`state` renamed by `names` (old name to new), in the order of `names`.

    Raises:
        UserError: a tensor is missing, or there is one without a new name.
    """
    _refuse([x for x in names if x not in state], "is missing")
    _refuse([x for x in state if x not in names], "does not belong to such a network")
    return {new: state[old] for old, new in names.items()}


def check_shapes(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], names: Mapping[str, str]
) -> None:
    """Compares shapes; `state` and `expected` are looked up by the values of `names`.

    Raises:
        UserError: a shape differs; the message gives the tensor's key in `names`.
    """
    for old, new in names.items():
        found, wanted = tuple(state[new].shape), tuple(expected[new].shape)
        if found != wanted:
            raise UserError(f"the tensor {old} has the shape {found} instead of {wanted}.")


def _refuse(names: Sequence[str], what: str) -> None:
    if names:
        others = f" ({len(names)} such tensors)" if len(names) > 1 else ""
        raise UserError(f"the tensor {names[0]} {what}{others}.")
