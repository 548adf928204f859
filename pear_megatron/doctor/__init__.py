"""What is installed here, what a run would use of it, and what does not fit together; `pear-megatron doctor`."""

from pear_megatron.doctor.report import Finding, examine

__all__ = ["Finding", "examine"]
