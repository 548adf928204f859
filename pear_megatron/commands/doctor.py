"""`pear-megatron doctor`: what is installed, what a run would use, and what does not fit together."""

from __future__ import annotations

import warnings

import typer

EPILOG = "Example: pear-megatron doctor > doctor.txt    (plain text, to paste into an issue)"


def doctor() -> None:
    """Print versions, compiled ops, GPUs and what a run here would use. Exit code 1 if something does not fit."""
    warnings.filterwarnings("ignore")  # of libraries; what matters is a line of the report
    from pear_megatron.doctor import examine

    found = examine()
    width = max(len(finding.name) for finding in found)
    section = ""
    for finding in found:
        if finding.section != section:
            section = finding.section
            print(f"{section}:")
        mark = "!" if finding.fault else " "
        print(f"{mark} {finding.name:<{width}}  {finding.value}")
    faults = [finding.fault for finding in found if finding.fault]
    if not faults:
        print("\nno faults")
        return
    print("\n".join(["", f"faults: {len(faults)}", *(f"! {fault}" for fault in faults)]))
    raise typer.Exit(1)
