import pickle

from medseg.errors import DataError, Problems


def fault(where: str | None, message: str = "is empty; remove it", error_id: str = "E-A") -> DataError:
    return DataError(error_id, message, where)


def test_one_problem_reads_as_the_fault_itself():
    assert str(Problems([fault("case a")])) == "E-A case a: is empty; remove it"
    assert str(Problems([fault(None)])) == "E-A is empty; remove it"


def test_different_problems_have_a_line_each():
    problems = Problems([fault("case a"), fault("case b", "is gone"), fault("case c", error_id="E-B"), fault(None)])
    assert str(problems).splitlines() == [str(error) for error in problems.errors]


def test_a_problem_of_many_cases_is_one_line_that_names_the_first():
    problems = Problems([fault(f"case {n}") for n in range(12)])
    assert str(problems) == "E-A case 0, case 1, case 2 and 9 more: is empty; remove it"
    assert len(problems.errors) == 12


def test_problems_that_differ_in_numbers_are_told_one_by_one_while_they_are_few():
    few = [fault(f"case {n}", f"shape ({n}, -1.5, 2e-05) mm") for n in range(3)]
    assert str(Problems(few)).splitlines() == [str(error) for error in few]
    many = Problems([*few, *(fault(f"case {n}", f"shape ({n}, 2) mm") for n in range(3, 9))])
    assert str(many) == "E-A case 0: shape (0, -1.5, 2e-05) mm; likewise case 1, case 2, case 3 and 5 more"


def test_problems_without_a_place_are_merged_only_if_they_are_equal():
    problems = Problems([fault(None, f"{n} is no fold") for n in (1, 2, 3, 4, 4)])
    assert str(problems).splitlines() == [f"E-A {n} is no fold" for n in (1, 2, 3, 4)]


def test_problems_among_problems_are_told_too_and_survive_a_process():
    problems = pickle.loads(pickle.dumps(Problems([fault("a"), Problems([fault("b"), fault("c", "is gone")])])))
    assert str(problems).splitlines() == ["E-A a, b: is empty; remove it", "E-A c: is gone"]
