"""Where the tests of this folder run: on CUDA, or on another device to try the tests themselves.

PEAR_TEST_DEVICE=cpu pytest tests/gpu
"""

import os

import pytest

DEVICE = os.environ.get("PEAR_TEST_DEVICE", "cuda")

# For a module's pytestmark.
needs_device = [pytest.mark.gpu] if DEVICE == "cuda" else []
needs_cuda = pytest.mark.gpu
