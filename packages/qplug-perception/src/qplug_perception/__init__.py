"""qcore plug-in for 3-D perception (PETR, Gaussian splatting, multi-view tracking).  It registers nothing yet."""
