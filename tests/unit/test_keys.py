"""Names and key components: both conversions are injective and have an inverse."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from distckpt.layout.keys import child_key, dict_key, edge_name, escape, join, slot_key, unescape

# Mostly the characters that mean something, so that clashes are found if there are any.
names = st.text("./\0SEi0512-ax") | st.text()
dict_keys = names | st.integers() | st.integers(-20, 20)


@pytest.mark.parametrize(
    ("key", "component"),
    [
        ("weight", "weight"),
        ("a.b", "a..b"),
        ("a/b", "a.Sb"),
        ("", ".E"),
        ("\0", ".0"),
        ("\0abc", ".0abc"),
        (5, ".i5"),
        (-5, ".i-5"),
        (0, ".i0"),
        ("5", "5"),
        (".i5", "..i5"),
        (".E", "..E"),
        ("\0i5", ".0i5"),
        ("\0\0i5", ".0.0i5"),
        ("\0i05", ".0i05"),
        (".slots", "..slots"),
    ],
)
def test_components(key: str | int, component: str) -> None:
    assert escape(edge_name(key)) == component


@given(dict_keys, dict_keys)
@example(5, "\0i5")
@example("\0i5", "\0\0i5")
@example(0, "\0i0")
@example("", ".E")
def test_different_keys_have_different_components(a: str | int, b: str | int) -> None:
    assert (escape(edge_name(a)) == escape(edge_name(b))) == (a == b)


@given(names, names)
def test_different_names_have_different_components(a: str, b: str) -> None:
    assert (escape(a) == escape(b)) == (a == b)


@given(dict_keys)
def test_conversions_have_inverses(key: str | int) -> None:
    name = edge_name(key)
    assert dict_key(name) == key
    assert type(dict_key(name)) is type(key)
    assert unescape(escape(name)) == name


@given(dict_keys)
def test_a_component_is_no_path_and_not_reserved(key: str | int) -> None:
    component = escape(edge_name(key))
    assert component
    assert "/" not in component
    assert "\0" not in component
    assert component not in {".", ".slots", ".rank", ".value", ".state", ".extra_state"}


@pytest.mark.parametrize("component", ["", ".", ".slots", ".value", ".i", ".i05", ".ix", "a/b", "a.", "\0", ".Ea"])
def test_reserved_components_are_no_names(component: str) -> None:
    with pytest.raises(ValueError, match="is no escaped name"):
        unescape(component)


def test_keys_are_joined_below_the_root() -> None:
    assert join("", "model") == "model"
    assert join("model", "w") == "model/w"
    assert child_key("", "a.b", per_rank=False) == "a..b"
    assert child_key("model", "0", per_rank=False) == "model/0"
    assert child_key("rng", "3", per_rank=True) == "rng/.rank/3"
    assert child_key("", "3", per_rank=True) == ".rank/3"
    assert slot_key("optimizer", "model/w", "exp_avg") == "optimizer/.slots/model/w/exp_avg"
    assert slot_key("", "w", "a/b") == ".slots/w/a.Sb"
    assert slot_key("optimizer", "", "m") == "optimizer/.slots/m"
