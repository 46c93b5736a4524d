"""cni.result: frozen values with the spec's defaults."""

import msgspec
import pytest

from cni.result import DNS, Interface, IPConfig, Result, Route


def test_an_empty_result_has_nothing() -> None:
    assert Result() == Result((), (), (), DNS())
    assert not Result().dns


@pytest.mark.parametrize(
    "value", [Interface("eth0"), IPConfig("10.0.0.2/24"), Route("0.0.0.0/0"), DNS(domain="x"), Result()]
)
def test_values_are_frozen_hashable_and_equal_by_value(value: msgspec.Struct) -> None:
    name = value.__struct_fields__[0]
    with pytest.raises(AttributeError):
        setattr(value, name, "other")
    same = msgspec.structs.replace(value)
    assert same == value
    assert len({same, value}) == 1


@pytest.mark.parametrize("dns", [DNS(("10.0.0.1",)), DNS(domain="x"), DNS(search=("x",)), DNS(options=("rotate",))])
def test_dns_is_true_with_anything_in_it(dns: DNS) -> None:
    assert dns
