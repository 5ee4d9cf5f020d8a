"""qcore plug-in for number formats and packings of accelerators.  It registers nothing yet."""
