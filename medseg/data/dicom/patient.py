"""Whose scan a DICOM series is: told apart, never told."""

from __future__ import annotations

import hmac
import re
from pathlib import Path

from pydicom import dcmread

from medseg.data.dicom.folder import WITHOUT_UID, is_dicom, split_series_path
from medseg.data.dicom.values import text_of, tolerant

_TAGS = ["PatientID", "SeriesInstanceUID"]


def patient_digest(path: Path, key: bytes) -> str | None:
    """A keyed hash of the PatientID of a series, from the first of its files.

    Args:
        path: A folder, ``folder#uid``, or a file.
        key: Random, and forgotten with the process: nobody can find an id by hashing guesses.

    Returns:
        The hash; None where the files name no patient.
    """
    folder, name = split_series_path(path)
    uid_end = re.sub(r"-[0-9]+$", "", name or "")  # without the part of a series that holds several volumes
    files = sorted(file for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else [folder]
    for file in files:
        try:
            if not is_dicom(file):
                continue
            with tolerant():
                header = dcmread(file, force=True, specific_tags=_TAGS, stop_before_pixels=True)
        except Exception:  # damaged bytes fail anywhere in the parser, and are told where their pixels are read
            continue
        uid = text_of(header, "SeriesInstanceUID") or WITHOUT_UID
        if uid.endswith(uid_end):
            patient = text_of(header, "PatientID")
            return hmac.digest(key, patient.encode(), "sha256").hex() if patient else None
    return None
