from medseg.wording import counted, duration, listed


def test_one_is_singular_and_all_else_plural():
    assert [counted(n, "case") for n in (0, 1, 2)] == ["0 cases", "1 case", "2 cases"]


def test_a_duration_has_the_unit_that_suits_it():
    assert [duration(s) for s in (59, 119, 150, 7199, 9000)] == [
        "59 s",
        "119 s",
        "2 minutes",
        "120 minutes",
        "2.5 hours",
    ]


def test_names_beyond_the_first_are_counted():
    assert listed("abc", 3) == "a, b, c"
    assert listed(iter("abcde"), 3) == "a, b, c and 2 more"
    assert listed([]) == ""
