import pytest

from adaptive.errors import PolicyError
from adaptive.inference.calibration.budget_argument import Budget


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("0.5", 0.5, "share"),
        ("1", 1.0, "share"),
        ("120M", 120e6, "MACs"),
        ("1.5 GMACs", 1.5e9, "MACs"),
        ("2.5e7", 2.5e7, "MACs"),
        ("300k", 3e5, "MACs"),
        ("0.5M", 5e5, "MACs"),
        ("3.5ms", 3.5, "ms"),
        ("0.02 ms", 0.02, "ms"),
        ("95%", 95.0, "top1"),
        ("0.5%", 0.5, "top1"),
    ],
)
def test_what_is_understood(text: str, value: float, unit: str) -> None:
    found = Budget.parse(text)
    assert found.unit == unit
    assert found.value == pytest.approx(value)


@pytest.mark.parametrize(
    "text", ["", "half", "-1", "0", "0ms", "1.2.3", "5 apples", "101%", "nan", "inf", "1e999", "M"]
)
def test_what_is_not(text: str) -> None:
    with pytest.raises(PolicyError, match="--budget") as caught:
        Budget.parse(text)
    assert text in str(caught.value)
    assert "give" in str(caught.value)
