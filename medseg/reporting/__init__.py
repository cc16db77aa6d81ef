"""Pictures and pages that let people judge a segmentation."""
