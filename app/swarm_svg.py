"""Pure: the pictures of the status page as shapes, for its template to draw, and the badge as a whole file.

A policy that allows no inline styles leaves only attributes and classes, so everything here is coordinates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from app.swarm_report import NodeReport, SwarmStatus
from swarm_protocol.spans import Span

MAX_PIECE_BLOCKS = 40
"""In one row on a phone: 8 pixels each at 360."""

MAX_LANES = 12
"""Bars above each other; nodes beyond that are in the table only."""


@dataclass(frozen=True, slots=True)
class Cell:
    """Blocks `[start, end)` that are alike: `kind` is `none`, `one` or `more`."""

    start: int
    end: int
    kind: str


@dataclass(frozen=True, slots=True)
class Bar:
    """A node in a lane: where it begins and ends in this piece."""

    lane: int
    start: int
    end: int
    node: NodeReport


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a model's blocks, beside the others on a wide screen and below them on a phone.

    All pieces are `width` blocks wide, the last one may have fewer.
    """

    blocks: Span
    width: int
    cells: tuple[Cell, ...]
    bars: tuple[Bar, ...]
    num_lanes: int


def coverage(replicas: Sequence[int], nodes: Sequence[NodeReport]) -> list[Piece]:
    """Return the picture of who has which block, in pieces of equal width."""
    num_blocks = len(replicas)
    if not num_blocks:
        return []
    width = -(-num_blocks // -(-num_blocks // MAX_PIECE_BLOCKS))
    lanes = in_lanes([node for node in nodes if node.state == "online" and node.blocks.start < num_blocks])
    pieces = []
    for start in range(0, num_blocks, width):
        end = min(start + width, num_blocks)
        bars = tuple(
            Bar(lane, max(node.blocks.start, start) - start, min(node.blocks.end, end) - start, node)
            for lane, node in lanes
            if node.blocks.start < end and node.blocks.end > start
        )
        num_lanes = 1 + max((lane for lane, _ in lanes), default=-1)
        pieces.append(Piece(Span(start, end), width, _cells(replicas[start:end]), bars, num_lanes))
    return pieces


def in_lanes(nodes: Sequence[NodeReport]) -> list[tuple[int, NodeReport]]:
    """Return nodes with the first lane in which none of those before them is in their way."""
    ends: list[int] = []
    found = []
    for node in sorted(nodes, key=lambda node: (node.blocks.start, -node.blocks.end, node.short_id)):
        lane = next((lane for lane, end in enumerate(ends) if end <= node.blocks.start), len(ends))
        if lane >= MAX_LANES:
            continue
        ends[lane : lane + 1] = [node.blocks.end]
        found.append((lane, node))
    return found


def _cells(replicas: Sequence[int]) -> tuple[Cell, ...]:
    return tuple(
        Cell(block, block + 1, "none" if count == 0 else "one" if count == 1 else "more")
        for block, count in enumerate(replicas)
    )


BADGE_COLOURS: dict[SwarmStatus, str] = {
    "ready": "#2a7d4f",
    "degraded": "#8a6100",
    "incomplete": "#b3261e",
    "down": "#b3261e",
    "loading": "#5f6368",
    "failed": "#b3261e",
    "unknown": "#5f6368",
}
"""White text is readable on all of them (at least 4.5 to 1)."""

_CHAR_PIXELS = 6.6
"""Of Verdana at 11 pixels, an average; the text is stretched to fit."""


def badge(name: str, state: SwarmStatus, words: str) -> str:
    """Return a badge: the model's name, and its state in words, as an SVG file."""
    left, right = (round(len(text) * _CHAR_PIXELS) + 12 for text in (name, words))
    title, name, words = escape(f"{name}: {words}"), escape(name), escape(words)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + right}" height="20" role="img" aria-label="{title}">'
        f"<title>{title}</title>"
        f'<rect width="{left}" height="20" fill="#3c4043"/>'
        f'<rect x="{left}" width="{right}" height="20" fill="{BADGE_COLOURS[state]}"/>'
        '<g fill="#fff" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11" text-anchor="middle">'
        f'<text x="{left / 2}" y="14" textLength="{left - 12}">{name}</text>'
        f'<text x="{left + right / 2}" y="14" textLength="{right - 12}">{words}</text></g></svg>'
    )
