"""Analysis of a target: where it attends, which layers need visual tokens, and how many of them a draft needs."""

from .answered import Conversation, read_conversations
from .figures import draw_figures
from .run import analyze
from .summary import Recommendation, recommend

__all__ = ["Conversation", "Recommendation", "analyze", "draw_figures", "read_conversations", "recommend"]
