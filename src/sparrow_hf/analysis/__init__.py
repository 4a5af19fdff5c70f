"""Looking into a target: where it attends, how far up it needs its visual rows, and what these do to a draft."""

from .answered import Conversation, read_conversations
from .figures import draw_figures
from .run import analyze
from .summary import Recommendation, recommend

__all__ = ["Conversation", "Recommendation", "analyze", "draw_figures", "read_conversations", "recommend"]
