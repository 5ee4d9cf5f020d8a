"""qcore plug-in for selection of samples by submodular functions.  It registers nothing yet."""
