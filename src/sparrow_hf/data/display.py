"""How a player places a decoded picture: with square pixels, turned and mirrored as its display matrix says."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from av import VideoFrame

#: One, in the numbers of a display matrix.
FIXED_POINT = 65536


def with_square_pixels(width: int, height: int, pixel_aspect: Fraction | None) -> tuple[int, int]:
    """The size at which no row and no column is lost."""
    # Beyond that, the header is damaged.
    if not pixel_aspect or not Fraction(1, 10) <= pixel_aspect <= 10:
        return width, height
    return (round(width * pixel_aspect), height) if pixel_aspect > 1 else (width, round(height / pixel_aspect))


def display_matrix(frame: VideoFrame) -> np.ndarray | None:
    """`(9,)`: how a player places the picture, see `turned`."""
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    return None if matrix is None else np.frombuffer(bytes(matrix), np.int32)


def turned(picture: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """A picture turned by a multiple of 90 degrees, mirrored or both.

    Args:
        matrix: `(9,)`, of which a player shows the pixel (x, y) at (a x + c y, b x + d y):
            a b ·
            c d ·
            · · ·
    """
    across, down = matrix[0], matrix[4]
    if abs(matrix[1]) > abs(matrix[0]):
        # Rows become columns: x comes from y by c, y from x by b.
        picture, across, down = picture.transpose(1, 0, 2), matrix[3], matrix[1]
    return picture[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1]
