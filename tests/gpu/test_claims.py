"""Every CPU test of the ops, the weights and the loss, again on CUDA tensors."""

from tests.gpu.claims import claims
from tests.gpu.device import needs_device

pytestmark = needs_device

globals().update(claims())
