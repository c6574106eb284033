"""Errors: one line, an exit code, nothing that could reach a terminal as a command."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv4tools import errors
from dsv4tools.errors import (
    EXIT_CODES,
    Dsv4Error,
    InputError,
    Interrupted,
    ResourceError,
    UsageError,
    VerifyError,
    printable,
)

CODES = {Dsv4Error: 1, UsageError: 2, InputError: 3, ResourceError: 4, VerifyError: 5}


@pytest.mark.parametrize(("cls", "code"), CODES.items())
def test_exit_codes(cls, code):
    error = cls("file", "is wrong", hint="mend it")
    assert (error.exit_code, str(error)) == (code, "file: is wrong; mend it")
    assert (error.where, error.what, error.hint) == ("file", "is wrong", "mend it")
    assert isinstance(error, Dsv4Error)
    assert code in EXIT_CODES


def test_every_class_has_a_documented_code():
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, Dsv4Error)]
    codes = {c.exit_code for c in classes if c is not Interrupted} | {130, 143}
    assert codes | {0} == set(EXIT_CODES)


def test_an_interruption_has_the_code_of_its_signal():
    assert [Interrupted(number, "stopped").exit_code for number in (2, 15)] == [130, 143]
    assert str(Interrupted(2, "stopped", hint="run it again")) == "stopped; run it again"


def test_without_a_place_or_a_hint():
    assert str(InputError("", "is wrong")) == "is wrong"
    assert str(InputError("file", "is wrong")) == "file: is wrong"


def test_what_is_not_printable_is_escaped():
    error = InputError("a\nb", "c\x1b[2Jd\x00", hint="\u202ee\u2028\x7f")
    assert str(error) == "a\\x0ab: c\\x1b[2Jd\\x00; \\u202ee\\u2028\\x7f"
    assert error.where == "a\nb"   # as it was found, for whoever looks at it in Python


def test_what_may_be_kept():
    assert printable("a\tb\n", keep="\t") == "a\tb\\x0a"
    assert printable("grüße 漢字 ｜▁") == "grüße 漢字 ｜▁"


@given(st.text(), st.text(), st.text())
def test_any_error_is_one_printable_line(where, what, hint):
    text = str(InputError(where, what, hint=hint))
    assert text.isprintable()
    text.encode()


def test_errors_travel_between_processes():
    made = [cls("file", "is wrong", hint="mend it") for cls in CODES]
    for error in (*made, Interrupted(15, "stopped", hint="go on")):
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy), copy.exit_code) == (type(error), str(error), error.exit_code)
        assert (copy.where, copy.what, copy.hint) == (error.where, error.what, error.hint)
