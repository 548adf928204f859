"""Text rows become exactly the tokens that a policy sampled, with its decisions marked."""

from pear_megatron.data.chat.conversation import Conversation, Encoded
from pear_megatron.data.chat.encoder import ChatEncoder

__all__ = ["ChatEncoder", "Conversation", "Encoded"]
