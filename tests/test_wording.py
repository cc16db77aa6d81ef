from medseg.wording import counted, listed


def test_one_is_singular_and_all_else_plural():
    assert [counted(n, "case") for n in (0, 1, 2)] == ["0 cases", "1 case", "2 cases"]


def test_names_beyond_the_first_are_counted():
    assert listed("abc", 3) == "a, b, c"
    assert listed(iter("abcde"), 3) == "a, b, c and 2 more"
    assert listed([]) == ""
