"""While tests run, every call is checked against its annotations: types, shapes, and names of axes over one call."""

from collections.abc import Iterator
from dataclasses import dataclass

import jaxtyping
import pytest
import torch
from jaxtyping import Float, Int, TypeCheckError
from torch import Tensor

from infopo import estimators
from shape_checker import checked


@checked
def product(a: Float[Tensor, "n k"], b: Float[Tensor, "k m"]) -> Float[Tensor, "n m"]:
    return a @ b


@checked
def transposed(a: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
    return a.T


@checked
def listed(tensors: list[Float[Tensor, " n"]], scale: float, name: "str | None" = None) -> int:
    return len(tensors)


@checked
def counted(n: int) -> Iterator[int]:
    yield from range(n)


@checked
def unknown(value: "OfTypeCheckersOnly", more: "list[OfTypeCheckersOnly] | None" = None) -> object:  # type: ignore[name-defined]
    return value


@checked
def quoted(values: list["str"]) -> int:
    return len(values)


@checked
@dataclass(frozen=True)
class Batch:
    ids: Int[Tensor, " n"]
    logps: Float[Tensor, " n"]


@checked
def scaled(x: Float[Tensor, " n"], by: float) -> Float[Tensor, " n"]:
    return x * by


class Model:
    @checked
    def scores(self, ids: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        return scaled(ids.float().repeat(2), 2)[: len(ids)]


def test_an_axis_has_one_length_in_a_call_and_another_in_the_next() -> None:
    assert product(torch.ones(2, 3), torch.ones(3, 4)).shape == (2, 4)
    assert product(torch.ones(5, 1), torch.ones(1, 2)).shape == (5, 2)
    with pytest.raises(TypeCheckError):
        product(torch.ones(2, 3), torch.ones(4, 3))


def test_what_is_returned_is_checked_against_the_parameters() -> None:
    assert transposed(torch.ones(2, 2)).shape == (2, 2)
    with pytest.raises(TypeCheckError):
        transposed(torch.ones(2, 3))


def test_types_are_checked_in_containers_and_behind_quotes() -> None:
    assert listed([torch.ones(2), torch.zeros(2)], 1, "a") == 2  # an integer is a float, as type checkers say
    for wrong in (
        lambda: listed([torch.ones(2, 2)], 1.0),
        lambda: listed([torch.ones(2, dtype=torch.long)], 1.0),
        lambda: listed([], "1"),
        lambda: listed([], 1.0, 3),
        lambda: quoted([1]),
    ):
        with pytest.raises(TypeCheckError):
            wrong()
    assert unknown(3, [4]) == 3
    assert quoted(["1"]) == 1
    assert list(counted(2)) == [0, 1]
    with pytest.raises(TypeCheckError):
        list(counted("2"))


def test_fields_of_dataclasses_are_checked_together() -> None:
    Batch(torch.ones(3, dtype=torch.long), torch.ones(3))
    with pytest.raises(TypeCheckError):
        Batch(torch.ones(3, dtype=torch.long), torch.ones(2))


def test_a_call_within_a_call_has_its_own_names() -> None:
    assert Model().scores(torch.ones(3, dtype=torch.long)).tolist() == [2.0] * 3
    with pytest.raises(TypeCheckError):
        Model().scores(torch.ones(3))


def test_functions_of_infopo_are_checked() -> None:
    with pytest.raises(TypeCheckError):
        estimators.donsker_varadhan(torch.ones(2, 2), torch.ones(2))


def test_the_switch_of_jaxtyping_lets_everything_pass() -> None:
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        assert transposed(torch.ones(2, 3)).shape == (3, 2)
        assert listed([], "1") == 0
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
