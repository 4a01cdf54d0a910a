"""Stop strings against a reference that looks at the whole text, one character at a time."""

from hypothesis import example, given
from hypothesis import strategies as st

from archwright.runtime.stopping import StopScanner

small_text = st.text("ab.", max_size=12)
stop_strings = st.lists(st.text("ab.", min_size=1, max_size=4), max_size=3)


def reference(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Grow the text by single characters until it ends in a stop string; the longest that does is cut off."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(st.lists(small_text, max_size=6), stop_strings)
@example(["ab", "c"], ["abcd", "bc"])
@example(["aab", "ab"], ["aaba", "b"])
def test_equals_the_reference_however_the_text_is_cut(pieces: list[str], stops: list[str]) -> None:
    scanner, shown = StopScanner(stops), ""
    for piece in pieces:
        shown += scanner.push(piece)
        if scanner.found is not None:
            break
    else:
        shown += scanner.flush()
    assert (shown, scanner.found) == reference("".join(pieces), stops)


@given(small_text, stop_strings)
def test_nothing_is_held_back_without_need(text: str, stops: list[str]) -> None:
    """What is not shown yet is the beginning of a stop string: anything else is shown at once."""
    scanner, shown = StopScanner(stops), ""
    for end, character in enumerate(text, 1):
        shown += scanner.push(character)
        if scanner.found is not None:
            return
        held = text[len(shown) : end]
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)
