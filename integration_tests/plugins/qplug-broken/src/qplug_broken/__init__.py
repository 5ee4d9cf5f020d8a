"""Imports something that is not there, as a plug-in does whose dependency went missing."""

import a_dependency_that_went_missing  # noqa: F401
