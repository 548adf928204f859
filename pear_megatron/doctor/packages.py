"""Versions of the packages, against what this one declares that it needs."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, metadata, requires, version

from packaging.requirements import Requirement
from packaging.version import Version

from pear_megatron.doctor.finding import Finding

DISTRIBUTION = "pear-megatron"
NEWEST_MEGATRON = (0, 19)
# Not among the requirements, or only in an extra, and worth knowing of in every report.
_OPTIONAL = (
    "transformer-engine",
    "apex",
    "flash-attn",
    "transformers",
    "megatron-bridge",
    "nemo-rl",
    "trl",
    "vllm",
)
_EXTRAS_OF_DEVELOPERS = ("dev", "docs")


def installed(name: str) -> str | None:
    """The version of a distribution; None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def declared() -> list[Requirement]:
    """What the installed package's metadata require; nothing where it runs from a checkout, uninstalled."""
    try:
        return [Requirement(line) for line in requires(DISTRIBUTION) or []]
    except PackageNotFoundError:
        return []


def declared_extras() -> list[str]:
    """Their names, sorted; see ``declared``."""
    try:
        return sorted(metadata(DISTRIBUTION).get_all("Provides-Extra") or [])
    except PackageNotFoundError:
        return []


def examine_packages(requirements: list[Requirement]) -> list[Finding]:
    """Every requirement, and what else a run may use; at fault is what is missing or of an unsupported version."""
    needed = {r.name: r for r in requirements if _applies(r, "")}
    needed = {
        "torch": Requirement("torch>=2.6"),
        "megatron-core": Requirement("megatron-core>=0.16"),
    } | needed
    return [_package(name, needed.get(name)) for name in dict.fromkeys([*needed, *_OPTIONAL])]


def _package(name: str, requirement: Requirement | None) -> Finding:
    found = installed(name)
    if found is None:
        fault = f"{name} is missing; pip install '{requirement}'" if requirement else None
        return Finding("packages", name, "not installed", fault)
    if requirement and not requirement.specifier.contains(found, prereleases=True):
        return Finding("packages", name, found, _wrong_version(name, found, requirement))
    if name == "megatron-core" and Version(found).release[:2] > NEWEST_MEGATRON:
        found += " (not tested; 0.16 to {}.{} are)".format(*NEWEST_MEGATRON)
    return Finding("packages", name, found)


def _wrong_version(name: str, found: str, requirement: Requirement) -> str:
    if name == "torch" and any(specifier.operator == "==" for specifier in requirement.specifier):
        return (
            f"torch is {found} and this pear-megatron was built for torch {requirement.specifier}; build it again: "
            f"pip install --no-build-isolation . , or pip install '{requirement.name}{requirement.specifier}'"
        )
    return f"{name} is {found}; pip install '{requirement.name}{requirement.specifier}'"


def examine_extras(requirements: list[Requirement], extras: list[str]) -> list[Finding]:
    """For each extra, what of it is missing; a wrong version of what is there is a fault."""
    return [
        _extra(extra, [r for r in requirements if _applies(r, extra) and not _applies(r, "")])
        for extra in extras
        if extra not in _EXTRAS_OF_DEVELOPERS
    ]


def _extra(extra: str, wanted: list[Requirement]) -> Finding:
    missing, wrong = [], []
    for requirement in wanted:
        found = installed(requirement.name)
        if found is None:
            missing.append(requirement.name)
        elif not requirement.specifier.contains(found, prereleases=True):
            wrong.append(_wrong_version(requirement.name, found, requirement))
    value = "complete" if wanted else "nothing for this Python"
    if missing:
        value = f"missing {', '.join(missing)}: pip install '{DISTRIBUTION}[{extra}]'"
    return Finding("extras", extra, value, "; ".join(wrong) or None)


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})
