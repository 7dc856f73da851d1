"""Inputs that would run code if anything executed them, and what counts as a clean refusal."""

import builtins
import os
import re

import pytest

from experiments.launch import cli

TRAP = '__import__("builtins").__dict__.__setitem__("SPRUNG", 1)'
REFUSED = object()
CURES = r"remove|delete|run again|move .* out of it|another folder"


class Trap:
    """Springs when it is unpickled."""

    def __reduce__(self):
        return exec, (TRAP,)


@pytest.fixture(autouse=True)
def nothing_is_executed(monkeypatch):
    """In every test of a module that imports it; files are not forced to the disk there."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    yield
    assert not hasattr(builtins, "SPRUNG")


def answer(call, path):
    """What `call` gives, or REFUSED: by an error whose one line names the file and a cure."""
    try:
        return call()
    except (ValueError, OSError) as error:
        told = cli.describe(error)
        assert str(path) in told and re.search(CURES, told), told
        assert told.isprintable() and len(told) < 2500, told
        return REFUSED
