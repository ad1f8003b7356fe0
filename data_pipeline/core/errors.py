"""Errors that are shown to the user as they are."""

from __future__ import annotations


class UserError(Exception):
    """A mistake that the user can mend: one or two lines with what, where and what to do."""


class Unresolved(UserError):
    """Something a plan needs that can't be known here and now (a hub that can't be reached)."""
