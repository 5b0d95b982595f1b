"""Long lists keep their first items and the number of all items."""

import copy
import dataclasses

from fcvit.data.listed import LISTED, Listed, ListedMapping, total


def test_short_lists_equal_tuples_and_dicts():
    assert Listed("abc") == ("a", "b", "c") and total(Listed("abc")) == total("abc") == 3
    assert ListedMapping({"a": 5}) == {"a": 5} and total(ListedMapping({"a": 5})) == 1
    assert total(Listed("abc", 7)) == 7 and total(ListedMapping({"a": 5}, 5)) == 5


def test_long_lists_keep_the_first_items_and_their_number():
    items = Listed(range(LISTED + 5))
    entries = ListedMapping((number, -number) for number in range(LISTED + 5))
    assert items == tuple(range(LISTED)) and [*entries] == [*items] and entries[3] == -3
    assert total(items) == total(entries) == total(copy.copy(items)) == LISTED + 5


def test_long_lists_are_fields_of_a_result():
    @dataclasses.dataclass
    class Result:
        items: tuple

    assert dataclasses.asdict(Result(Listed("ab", 9))) == {"items": ("a", "b")}
    assert dataclasses.asdict(Result(ListedMapping({"a": 1}, 9))) == {"items": {"a": 1}}
