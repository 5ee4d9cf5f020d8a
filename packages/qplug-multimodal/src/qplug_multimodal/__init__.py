"""qcore plug-in for vision-language models.  It registers nothing yet."""
