"""What became of each submission."""

from dataclasses import dataclass, field

MARKED, UNUSABLE, FAILED = "marked", "unusable", "failed"


@dataclass
class Record:
    """What became of a submission.

    Attributes:
        submission, version: digests of what was handed in, and of unit and grader (`execute.unit_version`).
        due: when it was due, and what lateness costs, as that was when it was marked.
        status: marked; unusable, by the student's doing; or failed, by the grader's, and tried again at the next run.
        reason: why there is no mark.
        notes: sentences on what an instructor might want to look at.
        mistakes: what each failed check said, by the id of its cell.
        seconds: by stage.
    """

    student: str
    submission: str = ""
    version: str = ""
    due: str = ""
    status: str = FAILED
    reason: str = ""
    notes: list[str] = field(default_factory=list)
    mistakes: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: float = 0.0
    peak_bytes: int = 0
