from hypothesis import given
from hypothesis import strategies as st

from gpt1_jax.evaluation.windows import Window, windows


def test_windows_by_hand():
    assert list(windows(10, 4, 4)) == [Window(0, 4, 0), Window(4, 8, 4), Window(8, 10, 8)]
    assert list(windows(9, 4, 2)) == [Window(0, 4, 0), Window(2, 6, 4), Window(4, 8, 6), Window(6, 9, 8)]
    assert list(windows(8, 4, 2)) == [Window(0, 4, 0), Window(2, 6, 4), Window(4, 8, 6)]
    assert list(windows(3, 4, 1)) == [Window(0, 3, 0)]
    assert list(windows(0, 4, 4)) == []


@given(st.integers(0, 200), st.integers(1, 20), st.data())
def test_every_token_is_counted_once_with_enough_context(length, context_length, data):
    stride = data.draw(st.integers(1, context_length))
    counted = []
    for index, window in enumerate(windows(length, context_length, stride)):
        assert window.start == index * stride
        assert window.stop - window.start <= context_length and window.stop <= length
        assert window.start <= window.counted < window.stop
        assert index == 0 or window.counted - window.start >= context_length - stride
        counted += range(window.counted, window.stop)
    assert counted == list(range(length))
