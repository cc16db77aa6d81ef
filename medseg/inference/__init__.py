"""From a scan to its segmentation: windows, mirrors, the way back to the scan's own grid."""
