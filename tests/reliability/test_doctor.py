"""`python -m nde.doctor` on this machine, and what it says of settings that hurt."""

import jax

from nde import doctor


def test_this_machine_is_well(capsys):
    assert doctor.main() == 0
    out = capsys.readouterr().out
    for words in (
        "jax ",
        "cpu 0",
        "float64 is allowed",
        "exp(-t) within",
        "agree within",
        "all is well",
    ):
        assert words in out


def test_what_hurts_is_said():
    with jax.debug_nans(True):
        assert any("HURTS   jax_debug_nans" in line for line in doctor._precision())


def test_a_check_that_fails_is_counted(monkeypatch, capsys):
    def broken():
        raise RuntimeError("no solver\nat all")
        yield

    monkeypatch.setattr(doctor, "_solve", broken)
    monkeypatch.setattr(doctor, "_gradient", lambda: iter([doctor._verdict(False, "off by a lot")]))
    assert doctor.main() == 2
    out = capsys.readouterr().out
    assert "FAILED  RuntimeError: no solver\n" in out and "2 of 5 checks failed" in out
