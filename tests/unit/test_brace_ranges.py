"""Names written short with braces: what they stand for, and the forms that are refused."""

from __future__ import annotations

import pytest

from robusthash.apps.collection.image_source import expanded


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("s-{000..002}.tar", ["s-000.tar", "s-001.tar", "s-002.tar"]),
        ("s-{9..11}.tar", ["s-9.tar", "s-10.tar", "s-11.tar"]),
        ("s-{7..7}.tar", ["s-7.tar"]),
        ("{a,b}/s-{0..1}.tar", ["a/s-0.tar", "a/s-1.tar", "b/s-0.tar", "b/s-1.tar"]),
    ],
)
def test_patterns_stand_for_these_names(pattern, names):
    assert expanded(pattern) == names


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("s-{000..099.tar", "not closed, or nested"),
        ("s-000..099}.tar", "not closed, or nested"),
        ("s-{0{1..2}}.tar", "not closed, or nested"),
        ("s-{}.tar", "{} in 's-{}.tar' is not understood"),
        ("s-{5}.tar", "is not understood; write a range of numbers such as {000..099}, or a list"),
        ("s-{a..c}.tar", "is not understood"),
        ("s-{0..9..2}.tar", "is not understood"),
        ("s-{0...9}.tar", "is not understood"),
        ("s-{-1..3}.tar", "is not understood"),
        ("s-{1,,2}.tar", "is not understood"),
        ("s-{0..9,12}.tar", "is not understood"),
        ("s-{9..2}.tar", "counts down; write {2..9}"),
        ("s-{00..100}.tar", "ends of unlike widths; did you mean {000..100}?"),
        ("s-{1..01}.tar", "ends of unlike widths; did you mean {01..01}?"),
        ("s-{0..99999999999}.tar", "more than 1,000,000 names"),
        ("s-{0000..1999}{0000..1999}.tar", "4,000,000 names"),
        ("s-{1,1}.tar", "the same name more than once"),
    ],
)
def test_other_forms_are_refused_in_a_line(pattern, said):
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        expanded(pattern)
    assert said in str(refused.value)
