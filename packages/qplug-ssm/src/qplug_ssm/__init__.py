"""qcore plug-in for state-space and recurrent models (Mamba, RWKV).  It registers nothing yet."""
