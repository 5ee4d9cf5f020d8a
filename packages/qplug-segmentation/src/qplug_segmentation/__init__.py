"""qcore plug-in for referring segmentation.  It registers nothing yet."""
