"""Answers about videos, one row after the other: from a video, a folder or rows, to lines of JSON."""

from .answers import Totals, answer_all, check_writable, given_before, open_answers, total
from .caption import NO_DRAFT, Captioner, load_models
from .sources import QUESTION, Question, Questions, built_in_clip, read_questions

__all__ = [
    "NO_DRAFT",
    "QUESTION",
    "Captioner",
    "Question",
    "Questions",
    "Totals",
    "answer_all",
    "built_in_clip",
    "check_writable",
    "given_before",
    "load_models",
    "open_answers",
    "read_questions",
    "total",
]
