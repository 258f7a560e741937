"""What is sealed comes back as it was, and not a byte of it may change."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt1_jax.data.manifest import sealed, unsealed

KEYS = st.text(max_size=6).filter(lambda key: key != "sha256")
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
CONTENTS = st.dictionaries(KEYS, VALUES, max_size=4)


@settings(deadline=None)
@given(content=CONTENTS)
def test_what_is_sealed_comes_back(content):
    found = unsealed(sealed(content))
    assert found == content and list(found) == list(content)


@settings(deadline=None, max_examples=300)
@given(content=CONTENTS, data=st.data())
def test_any_other_byte_is_noticed(content, data):
    whole = sealed(content)
    at = data.draw(st.integers(0, len(whole) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda byte: byte != whole[at]))
    for changed in (
        whole[:at] + bytes([byte]) + whole[at + 1 :],
        whole[:at],
        whole[:at] + whole[at + 1 :],
        whole[:at] + bytes([byte]) + whole[at:],
    ):
        with pytest.raises(ValueError):
            unsealed(changed)
