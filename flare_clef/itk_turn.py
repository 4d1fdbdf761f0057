"""Threads take turns in those parts of ITK that damage the heap in two threads at once."""

from __future__ import annotations

from threading import Lock

ITK_TURN = Lock()
"""Held while a NIfTI header is read or written by ITK (SimpleITK 2.5), and while connected parts
are found: both are short.

Without it five of six runs that prepared 800 cases in two threads crashed. With the headers alone
taking turns one did, and some two hundred after it did not: that the search for parts beside them
was the cause is a guess.
"""
