"""DICOM in: folders of images (`folder`), and what is drawn on them (`seg`, `rtstruct`, `mask_stack`)."""
