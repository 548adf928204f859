"""The doctor's verdicts on packages, against what is installed here."""

from __future__ import annotations

from importlib.metadata import version

from packaging.requirements import Requirement

from pear_megatron.doctor.packages import examine_extras, examine_packages


def test_what_is_missing_or_unsupported_is_a_fault_and_what_is_optional_is_none() -> None:
    wanted = [Requirement(text) for text in ("torch>=2.6", "pydantic>=99", "no-such-thing>=1", "rich>=13")]
    found = {finding.name: finding for finding in examine_packages(wanted)}
    assert found["torch"].fault is None
    assert found["torch"].value == version("torch")
    assert found["pydantic"].fault == f"pydantic is {version('pydantic')}; pip install 'pydantic>=99'"
    assert found["no-such-thing"].fault == "no-such-thing is missing; pip install 'no-such-thing>=1'"
    assert found["apex"].fault is None
    assert found["apex"].value in ("not installed", found["apex"].value)


def test_a_wheel_for_another_torch_says_how_to_build() -> None:
    found = {finding.name: finding for finding in examine_packages([Requirement("torch==1.2.*")])}
    assert "was built for torch ==1.2.*; build it again" in str(found["torch"].fault)


def test_an_extra_says_what_it_lacks() -> None:
    wanted = [
        Requirement("rich>=13"),
        Requirement('pydantic>=99; extra == "old"'),
        Requirement('no-such-thing; extra == "absent"'),
        Requirement('rich; extra == "there"'),
        Requirement('rich; extra == "older" and python_version < "3"'),
    ]
    found = {
        finding.name: finding
        for finding in examine_extras(wanted, ["absent", "dev", "old", "older", "there"])
    }
    assert set(found) == {"absent", "old", "older", "there"}
    assert found["absent"].value == "missing no-such-thing: pip install 'pear-megatron[absent]'"
    assert found["absent"].fault is None
    assert "pydantic>=99" in str(found["old"].fault)
    assert (found["there"].value, found["there"].fault) == ("complete", None)
    assert found["older"].value == "nothing for this Python"
