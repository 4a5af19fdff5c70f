"""From a row as other libraries write it to plain turns: a `role`, and a `content` of text or parts.

turns      `messages`; ShareGPT's `conversations` of `from` and `value`; TRL's `prompt` and `completion`
system     a `system` column, or a turn of that role
media      parts that hold them (transformers, Qwen, OpenAI); or columns `videos`, `images`, `video`, `image`, whose
           entries stand where the texts say `<video>` and `<image>` (LLaMA-Factory, ms-swift) or where parts without
           a source are (TRL), and before the first user's text if the row says nowhere
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import MessagesError
from .parts import MEDIA_TYPES, MediaKind, named_sources
from .sources import is_missing, shown

#: Columns that hold turns. A `prompt` of text is no conversation: it has no roles.
MESSAGES, CONVERSATIONS, PROMPT, COMPLETION = "messages", "conversations", "prompt", "completion"
TURN_COLUMNS = (MESSAGES, CONVERSATIONS, PROMPT)
#: Kind of media → columns that name them.
MEDIA_COLUMNS: dict[MediaKind, tuple[str, str]] = {"video": ("videos", "video"), "image": ("images", "image")}
#: Columns that change what the target reads and that no target here can take.
REFUSED_COLUMNS = {"audios": "audio", "audio": "audio", "tools": "tools"}
#: Roles as other libraries call them → as chat templates do.
ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    **{"human": "user", "gpt": "assistant", "observation": "tool"},
}


def has_turns(row: Mapping[str, Any]) -> bool:
    """Whether a row is a conversation, well-formed or not."""
    return MESSAGES in row or CONVERSATIONS in row or isinstance(row.get(PROMPT), (list, tuple))


def without_turns(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row says beside its conversation: all columns that [`plain_turns`] does not read."""
    read = {*TURN_COLUMNS, COMPLETION, "system", *REFUSED_COLUMNS}
    return {name: value for name, value in row.items() if name not in read.union(*MEDIA_COLUMNS.values())}


def plain_turns(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The turns of a row of any dialect, each with a `role` and a `content`, media in parts of the content.

    Raises:
        MessagesError: The row has no turns or names them twice; a turn is malformed; there are more or fewer places
            for media than media; or the row has audio or tools.
    """
    for column, what in REFUSED_COLUMNS.items():
        if not _is_empty(row.get(column)):
            raise MessagesError(f"the row has {what} in its column {column!r}, which is not supported: take it out")
    turns = [_plain_turn(turn) for turn in _turns(row)]
    system = row.get("system")
    if system is not None and system != "":
        if not isinstance(system, str):
            raise MessagesError(f"the column 'system' must be text, found {shown(system)}")
        if any(turn["role"] == "system" for turn in turns):
            raise MessagesError("the row has a column 'system' and a system turn: leave one of them")
        turns.insert(0, {"role": "system", "content": system})
    if any(column in row for columns in MEDIA_COLUMNS.values() for column in columns):
        for kind, columns in MEDIA_COLUMNS.items():
            turns = _with_media(turns, kind, [column for column in columns if not _is_empty(row.get(column))], row)
    return turns


def _turns(row: Mapping[str, Any]) -> list[Any]:
    """The turns as the row has them, from whichever column."""
    given = [column for column in (MESSAGES, CONVERSATIONS) if row.get(column) is not None]
    if isinstance(row.get(PROMPT), (list, tuple)):
        given.append(PROMPT)
    if len(given) > 1:
        raise MessagesError(f"{' and '.join(map(repr, given))} both hold turns: leave one of them")
    name = given[0] if given else next((column for column in TURN_COLUMNS if column in row), MESSAGES)
    turns = row.get(name)
    if not isinstance(turns, (list, tuple)) or not turns:
        raise MessagesError(f"{name!r} must be a list of turns, found {shown(turns)}")
    if name != PROMPT:
        return list(turns)
    if row.get(COMPLETION) is None and (row.get("chosen") is not None or row.get("rejected") is not None):
        raise MessagesError("'chosen' and 'rejected' are two answers: name the one to learn 'completion'")
    completion = row.get(COMPLETION) or []
    if not isinstance(completion, (list, tuple)):
        raise MessagesError(f"'completion' must be a list of turns like 'prompt', found {shown(completion)}")
    return [*turns, *completion]


def _plain_turn(turn: Any) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise MessagesError(f"a turn needs a 'role' and a 'content' of text or parts, found {shown(turn)}")
    given = {str(key): value for key, value in turn.items() if value is not None}
    shared = "from" in given or "value" in given
    names = ("from", "value") if shared else ("role", "content")
    role, content = given.pop(names[0], None), given.pop(names[1], None)
    if not isinstance(role, str) or not isinstance(content, (str, list, tuple)):
        raise MessagesError(
            f"a turn needs a 'role' and a 'content' of text or parts, found {names[0]} {shown(role)} and {names[1]} "
            f"{shown(content)}"
        )
    if role not in ROLES:
        close = difflib.get_close_matches(role, ROLES, n=1)
        raise MessagesError(
            f"a turn has the unknown role {shown(role)}: "
            + (f"did you mean {close[0]!r}?" if close else f"there are {', '.join(ROLES)}")
        )
    unknown = [name for name, value in given.items() if not _is_empty(value)]
    if unknown:
        raise MessagesError(f"a turn has {' and '.join(map(shown, unknown))}, which is not supported: take it out")
    return {"role": ROLES[role], "content": content if isinstance(content, str) else list(content)}


def _with_media(
    turns: list[dict[str, Any]], kind: MediaKind, columns: list[str], row: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The turns with the media of the columns that have some in the places for them, in order."""
    if len(columns) > 1:
        raise MessagesError(f"{' and '.join(map(repr, columns))} both name {kind}s: leave one of them")
    named = row[columns[0]] if columns else []
    media = list(named) if isinstance(named, (list, tuple)) else [named]
    contents = [list(_pieces(turn["content"], kind)) for turn in turns]
    if media and any(_shows(piece, kind) for pieces in contents for piece in pieces):
        raise MessagesError(f"{kind}s stand in the messages and in {columns[0]!r} too: leave them in one of the two")
    places = sum(_is_place(piece, kind) for pieces in contents for piece in pieces)
    if media and not places:
        first = next((index for index, turn in enumerate(turns) if turn["role"] == "user"), None)
        if first is None:
            raise MessagesError(f"there is no user's turn to show the {kind}s of {columns[0]!r} in")
        contents[first] = [*({"type": kind} for _ in media), *contents[first]]
        places = len(media)
    if places != len(media):
        raise MessagesError(
            f"there are {places} places for {kind}s (<{kind}> in a text, or a part without a source) and {len(media)} "
            f"{kind}s in the row's columns: there must be as many"
        )
    sources = iter(media)
    return [
        {**turn, "content": [_filled(piece, kind, sources) for piece in pieces]}
        if any(_is_place(piece, kind) for piece in pieces)
        else turn
        for turn, pieces in zip(turns, contents, strict=True)
    ]


def _filled(piece: Any, kind: MediaKind, sources: Iterator[Any]) -> Any:
    """A piece as it is, or, if it is a place, the part that shows the next source there."""
    if not _is_place(piece, kind):
        return piece
    settings = {name: value for name, value in piece.items() if name not in ("type", "text")}
    return settings | {"type": kind, kind: next(sources)}


def _pieces(content: str | list[Any], kind: MediaKind) -> Iterator[Any]:
    """The parts of a content, texts cut at their marks:  "<video>and <video>?" → "<video>", "and ", "<video>", "?"."""
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        if isinstance(text, str) and f"<{kind}>" in text:
            yield from ({**part, "text": piece} for piece in re.split(f"(<{kind}>)", text) if piece)
        else:
            yield part


def _is_place(piece: Any, kind: MediaKind) -> bool:
    """Whether a piece is a mark, or a part that says that something is shown but not what."""
    if isinstance(piece, Mapping) and piece.get("type") == "text":
        return piece.get("text") == f"<{kind}>"
    return _is_of(piece, kind) and not named_sources(piece, kind)


def _shows(piece: Any, kind: MediaKind) -> bool:
    return _is_of(piece, kind) and bool(named_sources(piece, kind))


def _is_of(piece: Any, kind: MediaKind) -> bool:
    found = piece.get("type") if isinstance(piece, Mapping) else None
    return isinstance(found, str) and MEDIA_TYPES.get(found) == kind


def _is_empty(value: Any) -> bool:
    return is_missing(value) or (isinstance(value, (str, list, tuple)) and not value)
