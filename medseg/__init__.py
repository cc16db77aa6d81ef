"""medseg: segmentation of organs and lesions in medical images, in 3D and 2D."""

__version__ = "0.1.0"
