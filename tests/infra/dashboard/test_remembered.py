"""Answers are kept while their data are open, the last few of them."""

import gc
import weakref

from lodeset.infra.dashboard.remembered import remembered


class Some:
    """Stands for the data of a run."""


def test_answers_are_kept_as_long_as_their_data() -> None:
    asked: list[int] = []

    @remembered(2)
    def twice(data: Some, number: int) -> int:
        asked.append(number)
        return 2 * number

    data, other = Some(), Some()
    assert [twice(data, n) for n in (1, 2, 1, 3, 1, 2)] == [2, 4, 2, 6, 2, 4]
    assert asked == [1, 2, 3, 2]  # 2 was the one that had not been asked for longest
    assert twice(other, 1) == 2 and asked[-1] == 1
    seen = weakref.ref(data)
    del data
    gc.collect()
    assert seen() is None
