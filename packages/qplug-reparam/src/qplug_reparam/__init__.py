"""qcore plug-in for re-parameterized networks (RepVGG and its kin).  It registers nothing yet."""
