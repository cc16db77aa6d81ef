from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from medseg.data.dicom.folder import Series, find_series, read_series

Write = Callable[..., Path]

EVEN = tuple(range(0, 16, 2))


def flat(value: float) -> np.ndarray:
    return np.full((3, 4), value, np.uint16)


def write_scan(write_slice: Write, zs: tuple[int, ...], value: int, **elements: object) -> None:
    """Slices whose voxels are `value` plus their place in the scan; a function of that place is asked for it."""
    for k, z in enumerate(zs):
        own = {key: found(k) if callable(found) else found for key, found in elements.items()}
        write_slice(f"{value}_{k}", z, flat(value + k), **own)


def scans(folder: Path) -> list[list[int]]:
    """The voxels of each volume, slice by slice."""
    return [read_series(one).array[0, 0, 0].tolist() for one in find_series(folder).series]


def notes(folder: Path) -> list[str]:
    return [note for one in find_series(folder).series for note in one.notes]


def only(folder: Path) -> Series:
    (series,) = find_series(folder).series
    return series


@pytest.mark.parametrize(
    ("key", "modality"),
    [
        ("AcquisitionNumber", "CT"),
        ("TemporalPositionIdentifier", "MR"),
        ("EchoTime", "MR"),
        ("KVP", "CT"),
    ],
)
@pytest.mark.parametrize("offset", [2, 1])
def test_two_scans_whose_slices_alternate_are_two_volumes(
    tmp_path: Path, write_slice: Write, key: str, modality: str, offset: int
) -> None:
    more = {"modality": modality, "RescaleSlope": 1, "RescaleIntercept": 0}
    write_scan(write_slice, (0, 4, 8, 12), 100, **{key: 1}, **more)
    write_scan(write_slice, tuple(offset + z for z in (0, 4, 8, 12)), 200, **{key: 2}, **more)
    assert scans(tmp_path) == [[100, 101, 102, 103], [200, 201, 202, 203]]
    assert [one.geometry.spacing_mm[2] for one in find_series(tmp_path).series] == [4, 4]
    assert [note.split(": ")[1] for note in notes(tmp_path)] == [f"{key} 1", f"{key} 2"]


def test_a_slice_missing_of_one_of_two_alternating_scans_is_that_scans_alone(
    tmp_path: Path, write_slice: Write
) -> None:
    write_scan(write_slice, (0, 4, 12, 16, 20), 100, TemporalPositionIdentifier=1)
    write_scan(write_slice, (2, 6, 10, 14, 18, 22), 200, TemporalPositionIdentifier=2)
    one, two = find_series(tmp_path).series
    assert "1 of 6 slices missing" in one.problems[0].message
    assert not two.problems


def test_an_acquisition_that_another_continues_is_one_scan(tmp_path: Path, write_slice: Write) -> None:
    write_scan(write_slice, (0, 2, 4, 6), 100, AcquisitionNumber=1, modality="CT")
    write_scan(write_slice, (8, 10, 12, 14), 200, AcquisitionNumber=2, modality="CT")
    assert len(only(tmp_path).frames) == 8
    assert notes(tmp_path) == []


def test_odd_and_even_slices_of_an_mr_made_in_two_passes_are_one_scan_with_a_warning(
    tmp_path: Path, write_slice: Write
) -> None:
    write_scan(write_slice, EVEN, 100, AcquisitionNumber=lambda k: k % 2 + 1)
    assert scans(tmp_path) == [list(range(100, 108))]
    assert notes(tmp_path) == ["W-DICOM-MIXED slices differ in AcquisitionNumber: is it one scan?"]


def test_so_they_are_where_a_slice_is_missing(tmp_path: Path, write_slice: Write) -> None:
    places = [2 * k for k in range(14) if k != 5]
    write_scan(write_slice, places, 100, AcquisitionNumber=lambda k: places[k] // 2 % 2 + 1)
    assert len(only(tmp_path).frames) == 13
    assert [problem.error_id for problem in only(tmp_path).problems] == ["E-DICOM-MISSING-SLICE"]


def test_a_slice_that_was_taken_again_stays_in_its_scan(tmp_path: Path, write_slice: Write) -> None:
    write_scan(write_slice, EVEN, 100, AcquisitionNumber=lambda k: 2 if k == 3 else 1, modality="CT")
    assert len(only(tmp_path).frames) == 8


def test_what_jitters_from_slice_to_slice_splits_nothing(tmp_path: Path, write_slice: Write) -> None:
    jitter = (0, 0, 1, 0, 1, 1, 0, 1)
    write_scan(write_slice, EVEN, 100, TriggerTime=lambda k: jitter[k], AcquisitionNumber=lambda k: jitter[k])
    assert len(only(tmp_path).frames) == 8
    assert notes(tmp_path) == []


def test_echoes_are_told_by_what_gives_as_many_volumes_as_there_are_images_of_a_place(
    tmp_path: Path, write_slice: Write
) -> None:
    for echo in (0, 1):
        write_scan(
            write_slice,
            EVEN,
            100 * (echo + 1),
            EchoTime=5 + echo,
            AcquisitionNumber=lambda k, e=echo: 2 * e + k % 2 + 1,
        )
    assert scans(tmp_path) == [list(range(100, 108)), list(range(200, 208))]
    assert any(note.endswith("EchoTime 5") for note in notes(tmp_path))


def test_a_split_that_would_mix_echoes_gives_way_to_one_that_does_not(tmp_path: Path, write_slice: Write) -> None:
    for echo in (0, 1):
        write_scan(
            write_slice, EVEN, 100 * (echo + 1), EchoTime=5 + echo, AcquisitionNumber=lambda k, e=echo: 1 + (e + k) % 2
        )
    assert scans(tmp_path) == [list(range(100, 108)), list(range(200, 208))]


@pytest.mark.parametrize("key", ["AcquisitionTime", "ContentTime", "AcquisitionDateTime"])
def test_phases_told_by_the_clock_alone_are_ordered_by_it_and_no_time_is_named(
    tmp_path: Path, write_slice: Write, key: str
) -> None:
    start = "20200101" if key.endswith("DateTime") else ""
    for phase in (2, 0, 1):
        write_scan(write_slice, EVEN, 100 * (phase + 1), **{key: lambda k, p=phase: f"{start}10{p:02d}{k:02d}.250000"})
    assert scans(tmp_path) == [list(range(start, start + 8)) for start in (100, 200, 300)]
    assert notes(tmp_path)[0] == f"W-DICOM-SPLIT volume 1 of 3 of the series: number 1 of 3 of each position by {key}"


def test_a_cine_whose_trigger_times_drift_along_the_stack_is_told_by_their_order(
    tmp_path: Path, write_slice: Write
) -> None:
    for phase in range(3):
        write_scan(write_slice, EVEN, 100 * (phase + 1), TriggerTime=lambda k, p=phase: 40 * p + 0.1 * k)
    assert scans(tmp_path) == [list(range(start, start + 8)) for start in (100, 200, 300)]


def test_times_round_midnight_without_a_date_tell_no_phases(tmp_path: Path, write_slice: Write) -> None:
    for phase in range(2):
        seconds = [86_390 + 10 * phase + 2 * k for k in range(8)]
        write_scan(
            write_slice,
            EVEN,
            100 * (phase + 1),
            AcquisitionTime=lambda k, s=seconds: f"{s[k] // 3600 % 24:02d}{s[k] // 60 % 60:02d}{s[k] % 60:02d}",
        )
    assert [problem.error_id for problem in only(tmp_path).problems] == ["E-DICOM-DUPLICATE-POSITION"]


def test_a_scan_that_was_sent_twice_at_another_time_is_one_scan(tmp_path: Path, write_slice: Write) -> None:
    for copy in (0, 1):
        for k, z in enumerate(EVEN):
            write_slice(f"{copy}_{k}", z, flat(100 + k), ContentTime=f"1000{copy}0")
    assert scans(tmp_path) == [list(range(100, 108))]
    assert notes(tmp_path) == ["W-DICOM-DUPLICATE 8 copies of slices left out"]


@pytest.mark.parametrize(
    ("elements", "why"),
    [
        ({"ImageOrientationPatient": [0.0, 1.0, 0.0, 0.0, 0.0, -1.0]}, "orientation"),
        ({"FrameOfReferenceUID": "1.2.826.0.1.99"}, "frame of reference"),
        ({"PixelSpacing": [0.6, 0.75]}, "pixel spacing"),
    ],
)
def test_the_note_of_a_split_says_what_its_volumes_differ_in(
    tmp_path: Path, write_slice: Write, elements: dict[str, object], why: str
) -> None:
    write_slice("a", 0)
    write_slice("b", 0, **elements)
    assert [note.split(": ")[1] for note in notes(tmp_path)] == [f"they differ in {why}"] * 2
