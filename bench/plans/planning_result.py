"""What one case of the planning bench came to."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Result:
    """A plan in figures: predicted seconds of the step and of others, its bound, and the seconds of planning."""

    section: str
    name: str
    model: str
    devices: int
    documents: int
    tokens: int
    shapes: str
    step_seconds: float
    static_degree: int
    static_seconds: float
    best_static_degree: int
    best_static_seconds: float
    lower_bound_seconds: float
    gap: float
    active_bound: str
    stage: str
    stopped_by: str
    wall_seconds: float
    core_seconds: float

    @property
    def speed_up(self) -> float:
        return self.static_seconds / self.step_seconds

    @property
    def over_best_static(self) -> float:
        return self.best_static_seconds / self.step_seconds
