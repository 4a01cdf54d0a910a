"""Ranks that are threads of one process."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rank:
    """What is asked of a process group, of one of its members."""

    number: int
    degree: int

    @property
    def group_name(self) -> str:
        return f"thread {self.number} of {self.degree}"

    def rank(self) -> int:
        return self.number

    def size(self) -> int:
        return self.degree
