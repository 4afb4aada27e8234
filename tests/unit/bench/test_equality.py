"""Whether variants compute the same. Oracle: gradients written down by hand."""

from __future__ import annotations

import pytest
import torch

from mhc_dist.bench.equality import Equality, all_of, compared

ONE = torch.tensor([1.0, 2.0])
NEXT = torch.nextafter(ONE, torch.tensor(9.0))
NAN = torch.tensor([1.0, float("nan")])


def test_equal_gradients_are_counted() -> None:
    """Oracle: two names, twice."""
    found = compared({"a": ONE, "b": NEXT}, {"b": NEXT.clone(), "a": ONE.clone()}, "placed")
    assert (found + found).figures() == {"gradients_bit_equal": True, "gradients_compared": 4}
    found.check()


@pytest.mark.parametrize(
    ("got", "names"),
    [
        ({"a": NEXT, "b": ONE}, ("placed: a",)),
        ({"a": ONE}, ("placed: b",)),
        ({"a": ONE, "b": ONE, "c": ONE}, ("placed: c",)),
        ({"a": NAN, "b": ONE[:1]}, ("placed: a", "placed: b")),
    ],
    ids=["last bit", "one too few", "one too many", "not a number, another shape"],
)
def test_what_differs_is_named_and_refused(got: dict[str, torch.Tensor], names: tuple[str, ...]) -> None:
    """Oracle: as above; another rank that found nothing wrong changes nothing."""
    want = {"a": ONE, "b": ONE}
    found = all_of([compared(want, want, "placed"), compared(want, got, "placed")])
    assert found.different == names
    assert found.figures()["gradients_bit_equal"] is False
    with pytest.raises(RuntimeError, match=f"compared: {names[0]}.*times say nothing"):
        found.check()


def test_a_gradient_that_is_not_a_number_equals_nothing() -> None:
    """Oracle: IEEE 754."""
    assert compared({"a": NAN}, {"a": NAN.clone()}, "placed").different == ("placed: a",)


def test_nothing_compared_is_nothing_shown() -> None:
    """Oracle: no gradient was seen, so none can be claimed equal."""
    assert not Equality().holds
    with pytest.raises(RuntimeError, match="none were compared"):
        Equality().check()
