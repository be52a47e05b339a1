"""What the data holds, in the words that models ask for: features and their numbers of ids, tasks, times."""

from __future__ import annotations

from dataclasses import dataclass, field

ITEM, ACTION = "item", "action"
"""Keys of the items and the actions in a batch."""


@dataclass(frozen=True)
class FeatureSchema:
    """Features of a data set, with the number of ids of each.

    Attributes:
        num_items: V; item ids are 0 .. V - 1.
        num_actions: Number of action ids, 0 where events have no action.
        side_features: Item side features by name -> number of ids. 0 stands for unknown.
        contextual_features: User features by name -> number of ids. 0 stands for unknown.
        tasks: Names of the binary labels, in the order of the bits.
        has_value: Whether events have a numeric value (a rating, seconds watched): the label "value".
        has_timestamps: Whether events have times.
    """

    num_items: int
    num_actions: int = 0
    side_features: dict[str, int] = field(default_factory=dict)
    contextual_features: dict[str, int] = field(default_factory=dict)
    tasks: list[str] = field(default_factory=list)
    has_value: bool = False
    has_timestamps: bool = True

    @property
    def action_feature(self) -> str | None:
        """Key of the actions in a batch, None without."""
        return ACTION if self.num_actions else None
